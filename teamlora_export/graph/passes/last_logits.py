"""Cuts a text generator's logits down to those of the last token, for programs that read no others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from teamlora_export.graph import op
from teamlora_export.graph.quantized import OP_TYPE, is_quantised

LOGITS = "logits"
# What computes each token by itself, where all but one of its inputs are constants.
_EACH_BY_ITSELF = {"MatMul", "Add", "Sub", "Mul", "Div", "Tanh", "Cast", "CastLike", "Identity"}
_PRODUCTS = {"MatMul", OP_TYPE, op.NAME}


class LastLogits(ir.passes.InPlacePass):
    """Takes the last token ahead of the product with the vocabulary: `logits` [batch, sequence, vocabulary] become
    [batch, 1, vocabulary], the last row of what they were.

    From `logits` it goes back as far as tokens are computed one by one from constants. Where there is no product on
    that way, or something else reads a value of it, the graph stays as it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
        constants = constants_of(model.graph)
        nodes = _way_back(logits, constants) if logits is not None else []
        if logits is None or not any(node.op_type in _PRODUCTS for node in nodes):
            return ir.passes.PassResult(model, False)
        made = [value for node in nodes for value in node.outputs]
        if any(value is not logits and (value.is_graph_output() or not _users(value) <= set(nodes)) for value in made):
            return ir.passes.PassResult(model, False)
        starts = [v for v in dict.fromkeys(v for node in nodes for v in _tokens_of(node, constants)) if v not in made]
        if not all(_has_tokens(v, logits) for v in (*starts, *made)) or any(v.producer() is None for v in starts):
            return ir.passes.PassResult(model, False)
        for start in starts:
            _take_last(start, set(nodes))
        for value in made:
            _shorten(value)
        return ir.passes.PassResult(model, True)


def constants_of(graph: ir.Graph) -> set[ir.Value]:
    """Weights, and what is computed of weights alone."""
    known = set(graph.initializers.values())
    for node in graph:
        if all(value is None or value in known for value in node.inputs):
            known.update(node.outputs)
    return known


def _way_back(logits: ir.Value, constants: set[ir.Value]) -> list[ir.Node]:
    """The nodes that make `logits`, up to those that are no longer for each token by itself."""
    found: list[ir.Node] = []
    open_values = [logits]
    while open_values:
        node = open_values.pop().producer()
        if node is not None and node not in found and _is_each_by_itself(node, constants):
            found.append(node)
            open_values += _tokens_of(node, constants)
    return found


def _is_each_by_itself(node: ir.Node, constants: set[ir.Value]) -> bool:
    if op.is_op(node):
        return all(value in constants for value in node.inputs[2:])
    # A product's weights are its second input: a first one that is constant would mix the tokens.
    known = (node.domain == "" and node.op_type in _EACH_BY_ITSELF) or is_quantised(node)
    return known and len(_tokens_of(node, constants)) == 1 and (node.op_type != "MatMul" or node.inputs[1] in constants)


def _tokens_of(node: ir.Node, constants: set[ir.Value]) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and value not in constants]


def _users(value: ir.Value) -> set[ir.Node]:
    return {use.node for use in value.uses()}


def _has_tokens(value: ir.Value, logits: ir.Value) -> bool:
    """[batch, sequence, something]"""
    if value.shape is None or logits.shape is None or not len(value.shape) == len(logits.shape) == 3:
        return False
    return value.shape[:2] == logits.shape[:2]


def _take_last(value: ir.Value, readers: set[ir.Node]) -> None:
    """Let `readers` have the last token of `value` alone."""
    source = value.producer()
    assert source is not None
    graph = source.graph
    assert isinstance(graph, ir.Graph)
    bounds = []
    for name, bound in (("start", -1), ("end", np.iinfo(np.int64).max), ("axis", 1)):
        bounds.append(ir.val(f"{value.name}.last_{name}", const_value=ir.tensor(np.array([bound]))))
        graph.register_initializer(bounds[-1])
    cut = ir.node("Slice", [value, *bounds], name=f"{value.name}/last")
    last = cut.outputs[0]
    last.name, last.type, last.shape = f"{value.name}.last", value.type, value.shape
    _shorten(last)
    reading = [(use.node, use.idx) for use in value.uses() if use.node in readers]
    graph.insert_after(source, cut)
    for node, index in reading:
        node.replace_input_with(index, last)


def _shorten(value: ir.Value) -> None:
    assert value.shape is not None
    value.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
