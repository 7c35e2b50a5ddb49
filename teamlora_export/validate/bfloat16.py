"""Lets a bfloat16 graph run where there are no bfloat16 kernels: float32 arithmetic, every result rounded to bfloat16.

Each node then computes what a bfloat16 kernel with float32 accumulation does, so its errors are the format's own.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def emulate_bfloat16(model: ir.Model) -> None:
    """Rewrite `model` (bodies inlined) in place. Inputs and outputs become float32."""
    common.ShapeInferencePass()(model)
    graph = model.graph
    nodes = list(graph)
    for weight in [v for v in graph.initializers.values() if v.dtype == _BF16]:
        widened = _cast(weight, _FP32, f"{weight.name}.float32")
        ir.convenience.replace_all_uses_with(weight, widened)
        widened.producer().replace_input_with(0, weight)  # type: ignore[union-attr]
        graph.insert_before(nodes[0], widened.producer())  # type: ignore[arg-type]
    for value in graph.inputs:
        if value.dtype == _BF16:
            value.type = ir.TensorType(_FP32)
    for node in nodes:
        _widen_attributes(node)
        for value in node.outputs:
            if value.dtype == _BF16:
                _round_after(graph, node, value)


def _round_after(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Everything that read `value` now reads it rounded to bfloat16 and widened again, under its own name."""
    name = value.name
    value.type, value.name = ir.TensorType(_FP32), f"{name}.exact"
    narrow = _cast(value, _BF16, f"{name}.bfloat16")
    wide = _cast(narrow, _FP32, f"{name}.rounded")
    ir.convenience.replace_all_uses_with(value, wide, replace_graph_outputs=True)
    narrow.producer().replace_input_with(0, value)  # type: ignore[union-attr]
    graph.insert_after(node, [narrow.producer(), wide.producer()])  # type: ignore[list-item]
    wide.name = name


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BF16:
            tensor = ir.tensor(attribute.as_tensor().numpy().astype("float32"))
            node.attributes[name] = ir.AttrTensor(name, tensor)
        elif name == "to" and attribute.as_int() == _BF16:
            node.attributes[name] = ir.AttrInt64(name, _FP32)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), value.shape
    return output
