"""Lifts Gaussian error linear units that are written out to ONNX's `Gelu` (opset 20)."""

from __future__ import annotations

import math

import onnx_ir as ir

from teamlora_export.graph.passes.match import FLOATING, both_ways, is_inner, is_scalar, made_by, replace


class LiftGelu(ir.passes.InPlacePass):
    """Replaces `x / 2 * (1 + erf(x / sqrt(2)))` and `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.

    Constants must be those of the definition, as the graph's type rounds them. `Swish` (opset 24) is not lifted:
    ONNX Runtime 1.32 has no kernel of its own for it, and what it expands it to takes 1.7 times as long as Sigmoid and
    Mul (which it fuses), with the same error.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.graph is model.graph and node.domain == "" and node.op_type == "Mul":
                modified |= _lift(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _lift(graph: ir.Graph, node: ir.Node) -> bool:
    factors = _factors(node)
    others = [value for value in factors if not is_scalar(value, 0.5)]
    if len(factors) != 3 or len(others) != 2:
        return False
    for x, gate in (others, reversed(others)):
        for curve, one in both_ways(made_by(gate, "Add")):
            approximation = _approximation(curve, x) if is_scalar(one, 1) and x.dtype in FLOATING else None
            if approximation is not None:
                replace(graph, node.outputs[0], ir.node("Gelu", [x], {"approximate": approximation}).outputs[0])
                return True
    return False


def _factors(node: ir.Node) -> list[ir.Value]:
    """What `node` and the products that it alone reads multiply."""
    factors: list[ir.Value] = []
    for value in node.inputs:
        product = made_by(value, "Mul")
        assert value is not None
        factors += _factors(product) if product is not None and is_inner(value) else [value]
    return factors


def _approximation(curve: ir.Value, x: ir.Value) -> str | None:
    """The operator's name for how `curve` approximates 2 Phi(x) - 1."""
    if (erf := made_by(curve, "Erf")) is not None:
        return "none" if _is_scaled(erf.inputs[0], x) else None
    tanh = made_by(curve, "Tanh")
    for polynomial, factor in both_ways(made_by(tanh.inputs[0], "Mul") if tanh is not None else None):
        if is_scalar(factor, math.sqrt(2 / math.pi)) and _is_polynomial(polynomial, x):
            return "tanh"
    return None


def _is_scaled(value: ir.Value | None, x: ir.Value) -> bool:
    """value = x / sqrt(2)."""
    division = made_by(value, "Div")
    if division is not None:
        return division.inputs[0] is x and is_scalar(division.inputs[1], math.sqrt(2))
    return any(a is x and is_scalar(b, math.sqrt(0.5)) for a, b in both_ways(made_by(value, "Mul")))


def _is_polynomial(value: ir.Value, x: ir.Value) -> bool:
    """value = x + 0.044715 x^3."""
    for linear, cubic in both_ways(made_by(value, "Add")):
        for power, factor in both_ways(made_by(cubic, "Mul")):
            cube = made_by(power, "Pow")
            if linear is x and is_scalar(factor, 0.044715) and cube is not None:
                return cube.inputs[0] is x and is_scalar(cube.inputs[1], 3)
    return False
