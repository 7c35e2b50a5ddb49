"""Lifts root-mean-square norms to ONNX's `RMSNormalization` (opset 23)."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.graph.passes.match import (
    FLOATING,
    both_ways,
    is_inner,
    is_mean,
    is_scalar,
    made_by,
    replace,
    scalar,
)


class LiftRMSNorms(ir.passes.InPlacePass):
    """Replaces `x / sqrt(mean(x^2) + epsilon) * weight` over the last axis by one node.

    Only where the norm is computed in float32, which is what the operator does of any type (`stash_type` 1). A 16-bit
    model that casts back before it multiplies by the weight (Llama) is the operator's own definition and loses its
    casts; one that multiplies in float32 (Gemma) keeps them around the node. `weight` is any vector of the last axis'
    size: a stored one, or Gemma's 1 + weight.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain == "" and node.op_type == "Mul":
                modified |= any(_lift(model.graph, node, *order) for order in both_ways(node))
        return ir.passes.PassResult(model, modified)


def _lift(graph: ir.Graph, node: ir.Node, normalized: ir.Value, weight: ir.Value) -> bool:
    """Replace `node`, when it is `normalized * weight` and the first is a norm."""
    cast = made_by(normalized, "Cast")
    exact = cast.inputs[0] if cast is not None else normalized
    found = _normalized(exact)
    if found is None or not is_inner(normalized) or not is_inner(exact):  # type: ignore[arg-type]
        return False
    x, epsilon = found
    if cast is not None:
        # In float32 between two casts of the model's own type.
        widened = made_by(x, "Cast")
        if widened is None or widened.inputs[0] is None or widened.inputs[0].dtype != normalized.dtype:
            return False
        x = widened.inputs[0]
    if not _is_vector_for(weight, x):
        return False
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": int(ir.DataType.FLOAT)}
    replace(graph, node.outputs[0], ir.node("RMSNormalization", [x, weight], attributes).outputs[0])
    return True


def _normalized(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """x and epsilon, when `value` is x / sqrt(mean(x^2) + epsilon), in float32."""
    if value is None or value.dtype != ir.DataType.FLOAT:
        return None
    for x, factor in both_ways(made_by(value, "Mul")):
        if (epsilon := _inverse_root(factor, x)) is not None:
            return x, epsilon
    division = made_by(value, "Div")
    if division is not None and (x := division.inputs[0]) is not None:  # type: ignore[assignment]
        epsilon = _root(division.inputs[1], x)
        return None if epsilon is None else (x, epsilon)
    return None


def _inverse_root(value: ir.Value, x: ir.Value) -> float | None:
    """Epsilon, when `value` is 1 / sqrt(mean(x^2) + epsilon)."""
    if (node := made_by(value, "Reciprocal")) is not None:
        return _root(node.inputs[0], x)
    if (node := made_by(value, "Div")) is not None and is_scalar(node.inputs[0], 1):
        return _root(node.inputs[1], x)
    return None


def _root(value: ir.Value | None, x: ir.Value) -> float | None:
    """Epsilon, when `value` is sqrt(mean(x^2) + epsilon)."""
    node = made_by(value, "Sqrt")
    total = made_by(node.inputs[0], "Add") if node is not None else None
    for mean, epsilon in both_ways(total):
        if _is_mean_of_squares(mean, x):
            return scalar(epsilon)
    return None


def _is_mean_of_squares(value: ir.Value, x: ir.Value) -> bool:
    mean = made_by(value, "ReduceMean")
    square = mean.inputs[0] if mean is not None else None
    if square is None or not is_mean(value, square, x):
        return False
    if (power := made_by(square, "Pow")) is not None:
        return power.inputs[0] is x and is_scalar(power.inputs[1], 2)
    product = made_by(square, "Mul")
    return product is not None and product.inputs[0] is x and product.inputs[1] is x


def _is_vector_for(weight: ir.Value, x: ir.Value) -> bool:
    """Whether `weight` has one number for each place of the last axis of `x`, and the type of what is multiplied."""
    if x.shape is None or weight.shape is None or weight.dtype != x.dtype or x.dtype not in FLOATING:
        return False
    return len(weight.shape) == 1 and isinstance(weight.shape[0], int) and weight.shape[0] == x.shape[-1]
