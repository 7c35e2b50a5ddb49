"""Every product `x W (+ b)` of a graph with a stored weight W, whatever its form.

| form | |
|---|---|
| MatMul, FusedMatMul, Gemm | W as it is, transposed, or behind DequantizeLinear, Transpose and Cast |
| MatMulNBits, MatMulBnb4 | W in blocks of a few bits |
| DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul | 8 bits, x quantised on the way |
| DynamicQuantizeMatMul, MatMulIntegerToFloat | the same in one node |

A product's x is what the projection reads in the model: what comes before quantisation, and before a scale for each
channel that AWQ took out of the weights. Its output has the bias, where nothing else reads what comes before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MICROSOFT = "com.microsoft"
_OF_BLOCKS = ("MatMulNBits", "MatMulBnb4")
_QUANTISING = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
# What leaves the numbers of a weight in their places, or moves all of them alike.
_MOVING = ("Transpose", "Cast", "Identity", "DequantizeLinear")
_ROOTS = ("Rsqrt", "Sqrt", "Reciprocal", "Pow", "ReduceL2")
_NORMS = ("LpNormalization",)
# How exporters call AWQ's scale.
_SCALE = re.compile(r"(?i)pre_quant|awq|smooth")


@dataclass(frozen=True)
class Part:
    """Columns of a product that are read by themselves; `value` is None where an operator takes the whole apart."""

    start: int
    end: int
    value: ir.Value | None


@dataclass(frozen=True)
class Integers:
    """What a product of integers is made of.

    Attributes:
        codes: [in, out], 8 bits. scale, zero_point: of them, one number or one for each column; None: 0.
        bias: that the operator itself adds.
        result: what it gives as numbers, before another node adds a bias.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    bias: ir.Value | None
    result: ir.Value


@dataclass(frozen=True, eq=False)
class Product:
    """A projection of a foreign graph.

    Attributes:
        node: that multiplies.
        form: what kind it is, for people.
        x: [.., in_features]. output: [.., out_features], of `dtype`.
        names: of the nodes, weights and values that belong to it.
        weight: where W is stored. scale: what AWQ took out of its rows and multiplies x with; the projection's weight
            in the model is the product of both.
        parts: where its columns are read in parts, in their order; nothing where it is read as one.
        integers: of a product of integers, which rounds x to 8 bits.
    """

    node: ir.Node
    form: str
    x: ir.Value
    output: ir.Value
    in_features: int
    out_features: int
    dtype: ir.DataType
    names: tuple[str, ...]
    weight: ir.Value
    scale: ir.TensorProtocol | None = None
    parts: tuple[Part, ...] = field(default=())
    integers: Integers | None = None


@dataclass(frozen=True)
class Span:
    """Columns of a product."""

    product: Product
    start: int
    end: int

    @property
    def is_whole(self) -> bool:
        return (self.start, self.end) == (0, self.product.out_features)

    def __str__(self) -> str:
        columns = "" if self.is_whole else f", columns {self.start} to {self.end}"
        return f"{self.product.node.name or self.product.output.name:.120}{columns}"


@dataclass(frozen=True)
class _Stored:
    """A weight, as a product reads it: where it is stored, its sizes, the nodes it comes through."""

    value: ir.Value
    shape: tuple[int, ...]
    dtype: ir.DataType
    nodes: tuple[ir.Node, ...] = ()


def find_products(graph: ir.Graph) -> list[Product]:
    """The products of a graph, in its order."""
    return [product for node in graph if (product := _as_product(node)) is not None]


def has_codes(graph: ir.Graph) -> bool:
    """Whether a graph has a product whose weight is quantised."""
    return any(_is_quantised(product.node) for product in find_products(graph))


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


def release(product: Product) -> None:
    """Unmap what was read of a product's weight: a mapped file counts as memory in use."""
    for value in (product.weight, *product.node.inputs):
        held = value.const_value if value is not None else None
        if isinstance(held, ir.ExternalTensor):
            held.release()


def readers_of(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each once."""
    return list(dict.fromkeys(value.consumers()))


def _as_product(node: ir.Node) -> Product | None:
    if node.domain == _MICROSOFT and node.op_type in _OF_BLOCKS:
        return _of_blocks(node)
    if node.domain == _MICROSOFT and node.op_type in _QUANTISING:
        return _quantising(node)
    if (node.domain, node.op_type) in (("", "MatMul"), ("", "Gemm"), (_MICROSOFT, "FusedMatMul")):
        return _plain(node)
    if node.domain == "" and node.op_type == "MatMulInteger":
        return _of_integers(node)
    return None


def _plain(node: ir.Node) -> Product | None:
    if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return None
    # A factor may stand for one that the model has elsewhere (attention's scale), which the experts would need as well.
    if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return None
    stored = _stored(node.inputs[1])
    if stored is None or len(stored.shape) != 2 or stored.dtype not in FLOATS:
        return None
    sizes = stored.shape[::-1] if node.attributes.get_int("transB", 0) else stored.shape
    form = f"{node.op_type} of quantised weights" if _is_quantised(node) else node.op_type
    return _product(node, form, node.inputs[0], sizes, stored.dtype, stored)


def _of_blocks(node: ir.Node) -> Product | None:
    codes, scales = node.inputs[1], node.inputs[2]
    if codes is None or scales is None or constant_of(codes) is None or scales.dtype is None:
        return None
    sizes = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    bits = node.attributes.get_int("bits", 4)
    stored = _Stored(codes, sizes, scales.dtype)
    form = f"{node.op_type}, {bits} bits"
    return _product(node, form, node.inputs[0], sizes, scales.dtype, stored)


def _quantising(node: ir.Node) -> Product | None:
    stored = _stored(node.inputs[1])
    codes, given = node.inputs[1], [*node.inputs, *[None] * 7]
    x, scale, zero_point, bias = given[0], *given[2:5]
    if node.op_type == "MatMulIntegerToFloat":
        x, scale, zero_point, bias = before_quantising(x), given[3], *given[5:7]
    if stored is None or len(stored.shape) != 2 or codes is None or scale is None or scale.dtype is None:
        return None
    integers = Integers(codes, scale, zero_point, bias, node.outputs[0])
    return _product(node, node.op_type, x, stored.shape, scale.dtype, stored, integers=integers)


def _of_integers(node: ir.Node) -> Product | None:
    """MatMulInteger -> Cast -> Mul: the sums become numbers again by the scales of both sides."""
    codes, stored = node.inputs[1], _stored(node.inputs[1])
    x = before_quantising(node.inputs[0])
    cast = _only_reader(node.outputs[0], "Cast")
    if codes is None or stored is None or len(stored.shape) != 2 or x is None or cast is None:
        return None
    scaled = _scaled(cast.outputs[0])
    if scaled is None:
        return None
    nodes, scale = scaled
    dtype = ir.DataType(cast.attributes["to"].as_int())
    zero_point = node.inputs[3] if len(node.inputs) > 3 else None
    integers = Integers(codes, scale, zero_point, None, nodes[-1].outputs[0])
    return _product(node, "MatMulInteger", x, stored.shape, dtype, stored, (cast, *nodes), integers)


def _scaled(sums: ir.Value) -> tuple[list[ir.Node], ir.Value] | None:
    """The nodes that multiply sums with both sides' scales, at once or one after the other, and that of the weight."""
    nodes: list[ir.Node] = []
    scale: ir.Value | None = None
    of_x = False
    while not (of_x and scale is not None):
        node = _only_reader(sums, "Mul")
        if node is None:
            return None
        nodes.append(node)
        other = next((value for value in node.inputs if value is not sums), None)
        maker = other.producer() if other is not None else None
        both = list(maker.inputs) if maker is not None and maker.op_type == "Mul" else [other]
        for factor in both:
            of_x = of_x or constant_of(factor) is None
            scale = factor if constant_of(factor) is not None else scale
        sums = node.outputs[0]
    return nodes, scale


def _product(
    node: ir.Node,
    form: str,
    x: ir.Value | None,
    sizes: Sequence[int],
    dtype: ir.DataType,
    stored: _Stored,
    behind: Sequence[ir.Node] = (),
    integers: Integers | None = None,
) -> Product | None:
    if x is None or dtype not in FLOATS:
        return None
    nodes = [node, *stored.nodes, *behind]
    output = nodes[-1].outputs[0] if behind else node.outputs[0]
    read, scale = _before_scale(before_quantising(x) or x, sizes[0])
    total, bias = _with_bias(output, sizes[1])
    values = [*node.inputs[1:], stored.value, output, total, bias]
    if total is not output:
        nodes.append(total.producer())  # type: ignore[arg-type]
    names = [each.name for each in (*nodes, *values) if each is not None and each.name]
    return Product(
        node=node,
        form=form,
        x=read,
        output=total,
        in_features=sizes[0],
        out_features=sizes[1],
        dtype=dtype,
        names=tuple(dict.fromkeys(names)),
        weight=stored.value,
        scale=scale,
        parts=tuple(_parts(total, sizes[1])),
        integers=integers,
    )


def _stored(value: ir.Value | None) -> _Stored | None:
    """What is behind a weight that a product reads."""
    tensor = constant_of(value)
    if value is not None and tensor is not None:
        return _Stored(value, tuple(tensor.shape.numpy()), tensor.dtype)
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in _MOVING:
        return None
    inner = _stored(node.inputs[0])
    if inner is None:
        return None
    shape, dtype = inner.shape, inner.dtype
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", range(len(shape))[::-1])
        shape = tuple(shape[axis] for axis in order)
    if node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "DequantizeLinear":
        scale = _stored(node.inputs[1])
        if scale is None:
            return None
        dtype = scale.dtype
    return _Stored(inner.value, shape, dtype, (*inner.nodes, node))


def _with_bias(output: ir.Value, width: int) -> tuple[ir.Value, ir.Value | None]:
    """What a product gives with its bias, and the bias."""
    node = _only_reader(output, "Add")
    if node is None:
        return output, None
    for value in node.inputs:
        tensor = constant_of(value)
        if tensor is not None and _is_row(tensor, width):
            return node.outputs[0], value
    return output, None


def before_quantising(value: ir.Value | None) -> ir.Value | None:
    """What was quantised to a value, to codes or to numbers again; None where that was not."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "DequantizeLinear":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node.inputs[0] if node is not None and node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear") else None


def _before_scale(x: ir.Value, width: int) -> tuple[ir.Value, ir.TensorProtocol | None]:
    """What AWQ's scale for each channel is applied to, and the scale, where there is one in front of the product.

    The weight of a norm that is written out in pieces has the same form, and stays; so does any factor in front of
    weights that nobody quantised, unless its name says what it is.
    """
    node = x.producer()
    if node is None or node.op_type != "Mul" or node.domain != "":
        return x, None
    tensors = [constant_of(value) for value in node.inputs]
    index = next((i for i, tensor in enumerate(tensors) if tensor is not None and _is_row(tensor, width)), None)
    if index is None or width == 1 or x.is_graph_output():
        return x, None
    rest, scale = node.inputs[1 - index], node.inputs[index]
    readers = [far for reader in readers_of(x) for far in _past_quantising(reader)]
    if rest is None or scale is None or _is_normalised(rest) or not all(_reads_as_x(each, width) for each in readers):
        return x, None
    is_named = any(_SCALE.search(name) for name in (scale.name, node.name, x.name) if name)
    return (rest, tensors[index]) if is_named or all(map(_is_quantised, readers)) else (x, None)


def _past_quantising(node: ir.Node) -> list[ir.Node]:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return [far for reader in readers_of(node.outputs[0]) for far in _past_quantising(reader)]
    return [node]


def _reads_as_x(node: ir.Node, width: int) -> bool:
    """Whether a node is a product of this width by a stored weight."""
    if node.op_type in _OF_BLOCKS:
        return node.attributes["K"].as_int() == width
    if node.op_type not in ("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", *_QUANTISING):
        return False
    stored = _stored(node.inputs[1])
    return stored is not None and width in stored.shape


def _is_quantised(node: ir.Node) -> bool:
    """Whether a product's weight is stored as codes."""
    stored = _stored(node.inputs[1])
    behind = stored.nodes if stored is not None else ()
    is_plain = node.op_type in ("MatMul", "Gemm", "FusedMatMul")
    return not is_plain or any(each.op_type == "DequantizeLinear" for each in behind)


def _is_normalised(value: ir.Value) -> bool:
    """Whether a value was just divided by its own size (a norm in pieces, before its weight)."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        return node is not None and node.op_type in _NORMS
    # 1 / sqrt(size) is one node or two.
    makers = [each.producer() for each in node.inputs if each is not None]
    inner = [
        each.producer()
        for maker in makers
        if maker is not None and maker.op_type in ("Div", "Cast")
        for each in maker.inputs
        if each is not None
    ]
    return any(maker is not None and maker.op_type in _ROOTS for maker in (*makers, *inner))


def _parts(output: ir.Value, width: int) -> Iterator[Part]:
    """How the columns of a product are taken apart."""
    readers = readers_of(output)
    if len(readers) == 1 and readers[0].op_type == "Split" and readers[0].domain == "":
        yield from _split_parts(readers[0], width)
    elif len(readers) > 1 and all(node.op_type == "Slice" for node in readers):
        yield from _sliced_parts(readers, width)
    elif len(readers) == 1 and readers[0].op_type == "GroupQueryAttention":
        yield from _packed_heads(readers[0], output, width)


def _split_parts(node: ir.Node, width: int) -> Iterator[Part]:
    axis = node.attributes.get_int("axis", 0)
    given = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    sizes = [int(size) for size in given.numpy()] if given is not None else node.attributes.get_ints("split", ())
    if not sizes and len(node.inputs) < 2:
        sizes = [-(-width // len(node.outputs))] * len(node.outputs)
    if axis != 0 and sum(sizes) == width and len(sizes) == len(node.outputs) > 1:
        start = 0
        for size, value in zip(sizes, node.outputs, strict=True):
            yield Part(start, start + size, value)
            start += size


def _sliced_parts(nodes: Sequence[ir.Node], width: int) -> Iterator[Part]:
    parts = []
    for node in nodes:
        bounds = [constant_of(value) for value in node.inputs[1:]]
        if len(bounds) < 3 or any(tensor is None or math.prod(tensor.shape.numpy()) != 1 for tensor in bounds):
            return
        start, end, axis, *step = (int(tensor.numpy().reshape(-1)[0]) for tensor in bounds if tensor is not None)
        if axis in (0, 1) or step not in ([], [1]):
            return
        parts.append(Part(start + width * (start < 0), min(end + width * (end < 0), width), node.outputs[0]))
    parts.sort(key=lambda part: part.start)
    if [part.start for part in parts] == [0, *(part.end for part in parts[:-1])] and parts[-1].end == width:
        yield from parts


def _packed_heads(node: ir.Node, output: ir.Value, width: int) -> Iterator[Part]:
    """GroupQueryAttention takes queries, keys and values side by side as its first input, where it has no others."""
    if node.inputs[0] is not output or any(value is not None for value in node.inputs[1:3]):
        return
    heads, shared = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
    size, rest = divmod(width, heads + 2 * shared)
    if rest == 0:
        ends = [0, heads * size, (heads + shared) * size, width]
        for start, end in pairwise(ends):
            yield Part(start, end, None)


def _is_row(tensor: ir.TensorProtocol, width: int) -> bool:
    """One number for each column, and nothing else."""
    shape = tuple(tensor.shape.numpy())
    return bool(shape) and shape[-1] == width and math.prod(shape) == width and tensor.dtype in FLOATS


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = readers_of(value)
    if len(readers) != 1 or value.is_graph_output() or (readers[0].domain, readers[0].op_type) != ("", op_type):
        return None
    return readers[0]
