"""What is behind a value that a product reads: a stored weight, a constant, what was quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.errors import ExportError

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MICROSOFT = "com.microsoft"
OF_BLOCKS = ("MatMulNBits", "MatMulBnb4")
QUANTISING = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
# What leaves the numbers of a weight in their places, or moves all of them alike.
_MOVING = ("Transpose", "Cast", "Identity", "DequantizeLinear")


@dataclass(frozen=True)
class Stored:
    """A weight, as a product reads it: where it is stored, its sizes, the nodes it comes through."""

    value: ir.Value
    shape: tuple[int, ...]
    dtype: ir.DataType
    nodes: tuple[ir.Node, ...] = ()


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None where it has not so many."""
    return node.inputs[index] if index < len(node.inputs) else None


def needed_input(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot be without.

    Raises:
        ExportError: the node has none.
    """
    value = input_of(node, index)
    if value is None:
        raise ExportError(f"{name_of(node)}: is a {node.op_type} without its input {index}. Build the model again.")
    return value


def needed_size(node: ir.Node, name: str) -> int:
    """An attribute that the operator cannot be without, a number of rows or columns.

    Raises:
        ExportError: the node has none, or one that is no size.
    """
    attribute = node.attributes.get(name)
    size = attribute.value if attribute is not None and attribute.type == ir.AttributeType.INT else None
    if size is None or size < 1:
        raise ExportError(f"{name_of(node)}: is a {node.op_type} whose {name} is no size. Build the model again.")
    return int(size)


def name_of(node: ir.Node) -> str:
    """What a node is called in messages."""
    outputs = [value.name for value in node.outputs if value.name]
    return f"{node.name or next(iter(outputs), node.op_type):.120}"


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The numbers of an initializer or of a Constant; None for anything else."""
    if value is None:
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    given = next(iter(node.attributes.values()), None)
    return ir.tensor(given.value) if given is not None else None


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each once."""
    return list(dict.fromkeys(value.consumers()))


def stored_behind(value: ir.Value | None) -> Stored | None:
    """What is behind a weight that a product reads."""
    tensor = constant_of(value)
    if value is not None and tensor is not None:
        return Stored(value, tuple(tensor.shape.numpy()), tensor.dtype)
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in _MOVING:
        return None
    inner = stored_behind(input_of(node, 0))
    if inner is None:
        return None
    shape, dtype = inner.shape, inner.dtype
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(len(shape))[::-1])
        if sorted(order) != list(range(len(shape))):
            return None
        shape = tuple(shape[axis] for axis in order)
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "DequantizeLinear":
        scale = stored_behind(input_of(node, 1))
        if scale is None:
            return None
        # Of opset 23 on.
        dtype = ir.DataType(node.attributes.get_int("output_dtype", 0) or scale.dtype)
    return Stored(inner.value, shape, dtype, (*inner.nodes, node))


def is_row(tensor: ir.TensorProtocol, width: int) -> bool:
    """One number for each column, and nothing else."""
    shape = tuple(tensor.shape.numpy())
    return bool(shape) and shape[-1] == width and math.prod(shape) == width and tensor.dtype in FLOATS


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = readers_of(value)
    if len(readers) != 1 or value.is_graph_output() or (readers[0].domain, readers[0].op_type) != ("", op_type):
        return None
    return readers[0]


def before_quantising(value: ir.Value | None) -> ir.Value | None:
    """What was quantised to a value, to codes or to numbers again; None where that was not."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "DequantizeLinear":
        codes = input_of(node, 0)
        node = codes.producer() if codes is not None else None
    is_quantising = node is not None and node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear")
    return input_of(node, 0) if node is not None and is_quantising else None


def is_quantised(node: ir.Node) -> bool:
    """Whether a product's weight is stored as codes."""
    stored = stored_behind(input_of(node, 1))
    behind = stored.nodes if stored is not None else ()
    is_plain = node.op_type in ("MatMul", "Gemm", "FusedMatMul")
    return not is_plain or any(each.op_type == "DequantizeLinear" for each in behind)
