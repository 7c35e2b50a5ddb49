"""Says in ONNX's own operators what products with codes do: TensorRT does not know ONNX Runtime's operator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from teamlora_export.errors import ExportError
from teamlora_export.graph.quantized import is_quantised, unpacked
from teamlora_export.graph.weights import static_type

_SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}


class ExpandQuantised(ir.passes.InPlacePass):
    """Replaces `com.microsoft.MatMulNBits` by DequantizeLinear, along blocks of a weight [in, out] of signed codes, and
    MatMul. Codes are laid out anew when they are written, one weight at a time.

    Raises:
        ExportError: the codes have zero points, or 8 bits and a negative scale, which TensorRT has not, or do not fill
            their blocks.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if is_quantised(node)]
        for node in nodes:
            _expand(model.graph, node)
        for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
            del model.graph.initializers[name]
        return ir.passes.PassResult(model, bool(nodes))


def _expand(graph: ir.Graph, node: ir.Node) -> None:
    rows, columns, block, bits = (node.attributes[name].as_int() for name in ("K", "N", "block_size", "bits"))
    _x, codes, scales, zeros, order, bias = [*node.inputs, *[None] * 6][:6]
    if zeros is not None:
        raise ExportError(f"{node.name}: has zero points, which TensorRT has not. Export without --zero-points.")
    if codes is None or scales is None or order is not None or rows % block:
        raise ExportError(f"{node.name}: its codes ({rows} rows in blocks of {block}) cannot be said to TensorRT.")
    if bits == 8 and _any_negative(scales):
        raise ExportError(
            f"{node.name}: has negative scales, which TensorRT takes with codes of 4 bits alone. "
            "Export with --weights int4."
        )
    inputs = [_signed(graph, codes, bits, rows, columns), _turned(graph, scales)]
    weight = ir.node("DequantizeLinear", inputs, {"axis": 0, "block_size": block}, name=f"{node.name}/weight")
    weight.outputs[0].name = f"{codes.name}.dequantised"
    weight.outputs[0].type, weight.outputs[0].shape = scales.type, ir.Shape([rows, columns])
    graph.insert_before(node, weight)
    node.domain, node.op_type = "", "MatMul"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(1, weight.outputs[0])
    if bias is not None:
        _add(graph, node, bias)


def _any_negative(scales: ir.Value) -> bool:
    tensor = scales.const_value
    assert tensor is not None
    found = bool((tensor.numpy() < 0).any())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return found


def _signed(graph: ir.Graph, codes: ir.Value, bits: int, rows: int, columns: int) -> ir.Value:
    """Codes [out, blocks, bytes] as signed numbers [in, out]."""
    tensor = codes.const_value
    assert tensor is not None

    def numbers() -> ir.TensorProtocol:
        found = unpacked(np.array(tensor.numpy()), bits).reshape(columns, rows).T
        if isinstance(tensor, ir.ExternalTensor):
            # It would stay mapped, and the whole model with it in the end.
            tensor.release()
        signed = (found.astype(np.int16) - (1 << (bits - 1))).astype(_SIGNED[bits].numpy())
        return ir.tensor(np.ascontiguousarray(signed), dtype=_SIGNED[bits])

    return _stored(graph, f"{codes.name}.signed", _SIGNED[bits], (rows, columns), numbers)


def _turned(graph: ir.Graph, scales: ir.Value) -> ir.Value:
    """Scales [out, blocks] as [blocks, out]."""
    dtype, (columns, blocks) = static_type(scales)
    tensor = scales.const_value
    assert tensor is not None

    def numbers() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), dtype=dtype)

    return _stored(graph, f"{scales.name}.turned", dtype, (blocks, columns), numbers)


def _stored(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, int], numbers: Callable[[], ir.TensorProtocol]
) -> ir.Value:
    """One for all products with a weight."""
    if name not in graph.initializers:
        tensor = ir.LazyTensor(numbers, dtype=dtype, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
        graph.initializers.add(value)
    return graph.initializers[name]


def _add(graph: ir.Graph, node: ir.Node, bias: ir.Value) -> None:
    """The sum takes over the product's output, with its name and its marks."""
    product = node.outputs[0]
    total = ir.node("Add", [product, bias], name=f"{node.name}/Add")
    made = total.outputs[0]
    made.type, made.shape = product.type, product.shape
    made.metadata_props.update(product.metadata_props)
    product.metadata_props.clear()
    ir.convenience.replace_all_uses_with(product, made, replace_graph_outputs=True)
    total.replace_input_with(0, product)
    made.name, product.name = product.name, f"{product.name}.product"
    graph.insert_after(node, total)
