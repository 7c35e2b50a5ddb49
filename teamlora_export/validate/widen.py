"""Lets a graph in 16 bits run in float32 arithmetic.

rounded: every node's result is rounded to the 16-bit type, as a kernel with float32 accumulation does. This is how
    bfloat16 runs where there are no kernels for it: errors are the format's own.
not rounded: the graph and its weights as they are in the file, without the noise of the format. What is wrong with
    the graph itself shows at float32's precision.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.errors import ExportError

_FP32 = ir.DataType.FLOAT


def widen(model: ir.Model, narrow: ir.DataType, rounded: bool) -> None:
    """Rewrite `model` (bodies inlined or left out), whose 16-bit type is `narrow`, in place. Inputs and outputs become
    float32.

    Branches and bodies of loops are part of it.

    Raises:
        ExportError: it has functions of its own, whose types nobody states.
    """
    if model.functions:
        function = next(iter(model.functions.values()))
        raise ExportError(f"The graph has a function {function.name!r:.80}, which cannot be judged in wide arithmetic.")
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    for node in nodes:
        if node.op_type == "Constant":
            # onnxruntime-genai's builder (0.18) states another rank than that of the number, and inference stops there.
            node.outputs[0].shape = None
    common.ShapeInferencePass()(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        _widen_ends(graph, narrow)
    for node in nodes:
        _widen_attributes(node, narrow)
        for value in node.outputs:
            if value.dtype == narrow and rounded:
                _round_after(node, value, narrow)
            elif value.dtype == narrow:
                value.type = ir.TensorType(_FP32)


def _widen_ends(graph: ir.Graph, narrow: ir.DataType) -> None:
    """What enters a graph: weights are widened ahead of its nodes, inputs are wide already."""
    for weight in [v for v in graph.initializers.values() if v.dtype == narrow]:
        widened = _cast(weight, _FP32, f"{weight.name}.widened")
        ir.convenience.replace_all_uses_with(weight, widened, replace_graph_outputs=True)
        widened.producer().replace_input_with(0, weight)  # type: ignore[union-attr]
        if len(graph):
            graph.insert_before(graph[0], widened.producer())  # type: ignore[arg-type]
        else:
            graph.append(widened.producer())  # type: ignore[arg-type]
    for value in graph.inputs:
        if value.dtype == narrow:
            value.type = ir.TensorType(_FP32)


def _round_after(node: ir.Node, value: ir.Value, narrow: ir.DataType) -> None:
    """Everything that read `value` now reads it rounded to `narrow` and widened again, under its own name."""
    name = value.name
    value.type, value.name = ir.TensorType(_FP32), f"{name}.exact"
    rounded = _cast(value, narrow, f"{name}.rounded")
    wide = _cast(rounded, _FP32, f"{name}.widened")
    ir.convenience.replace_all_uses_with(value, wide, replace_graph_outputs=True)
    rounded.producer().replace_input_with(0, value)  # type: ignore[union-attr]
    node.graph.insert_after(node, [rounded.producer(), wide.producer()])  # type: ignore[list-item,union-attr]
    wide.name = name


def _widen_attributes(node: ir.Node, narrow: ir.DataType) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == narrow:
            tensor = ir.tensor(attribute.as_tensor().numpy().astype("float32"))
            node.attributes[name] = ir.AttrTensor(name, tensor)
        elif name in ("to", "dtype", "output_dtype") and attribute.as_int() == narrow:
            node.attributes[name] = ir.AttrInt64(name, _FP32)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(dtype), value.shape
    return output
