"""Computes in float32 where a model asks for its result in float32."""

from __future__ import annotations

import onnx_ir as ir

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class WidenFirst(ir.passes.InPlacePass):
    """Replaces Cast(Softmax(x)), from 16 bits to float32, by Softmax(Cast(x)); ReduceMean likewise.

    `softmax(x, dtype=float32)` widens x before it computes, and onnxscript 0.7 translates it the other way round
    (tests/graph/test_widen_first.py tells when this can go). Routers of experts ask for it: in 16 bits, scores tie.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for cast in list(model.graph):
            node = cast.inputs[0].producer() if cast.op_type == "Cast" and cast.inputs[0] is not None else None
            if node is not None and _is_widened(node, cast):
                _exchange(model.graph, node, cast)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_widened(node: ir.Node, cast: ir.Node) -> bool:
    """Whether all that reads what `node` gives is `cast`, to float32."""
    result = node.outputs[0]
    return (
        node.op_type in ("Softmax", "ReduceMean")
        and result.dtype in _NARROW
        and cast.attributes["to"].as_int() == ir.DataType.FLOAT
        and len(result.uses()) == 1
        and not result.is_graph_output()
    )


def _exchange(graph: ir.Graph, node: ir.Node, cast: ir.Node) -> None:
    x, *rest = node.inputs
    assert x is not None
    wide = ir.node("Cast", [x], {"to": int(ir.DataType.FLOAT)})
    wide.outputs[0].name, wide.outputs[0].shape = f"{x.name}.wide", x.shape
    wide.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    widened = ir.Node(node.domain, node.op_type, [wide.outputs[0], *rest], list(node.attributes.values()))
    ir.convenience.replace_nodes_and_values(graph, node, [node, cast], [wide, widened], cast.outputs, widened.outputs)
