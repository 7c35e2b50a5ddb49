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

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from teamlora_export.attach.parts import Part, parts_of
from teamlora_export.attach.scales import Scaling, find_scaling
from teamlora_export.attach.stored import (
    FLOATS,
    MICROSOFT,
    OF_BLOCKS,
    QUANTISING,
    Stored,
    before_quantising,
    constant_of,
    input_of,
    is_quantised,
    is_row,
    name_of,
    needed_input,
    needed_size,
    only_reader,
    stored_behind,
)


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
        weight: where W is stored.
        scaling: a factor for each channel ahead of it, whether it was taken out of W's rows or not.
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
    scaling: Scaling | None = None
    parts: tuple[Part, ...] = field(default=())
    integers: Integers | None = None

    @property
    def taken_out(self) -> Scaling | None:
        """What was taken out of the rows of W: the projection's weight in the model is the product of both."""
        return self.scaling if self.scaling is not None and self.x is self.scaling.before else None

    def read_otherwise(self) -> Product | None:
        """The same with the factor ahead of it taken for the other of the two things that it may be."""
        if self.scaling is None:
            return None
        x = self.scaling.before if self.taken_out is None else self.scaling.after
        return dataclasses.replace(self, x=x)


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
        return f"{name_of(self.product.node)}{columns}"


def find_products(graph: ir.Graph) -> list[Product]:
    """The products of a graph, in its order."""
    return [product for node in graph if (product := _as_product(node)) is not None]


def has_codes(graph: ir.Graph) -> bool:
    """Whether a graph has a product whose weight is quantised."""
    return any(is_quantised(product.node) for product in find_products(graph))


def release(product: Product) -> None:
    """Unmap what was read of a product's weight: a mapped file counts as memory in use."""
    for value in (product.weight, *product.node.inputs):
        held = constant_of(value)
        if isinstance(held, ir.ExternalTensor):
            held.release()


def _as_product(node: ir.Node) -> Product | None:
    if node.domain == MICROSOFT and node.op_type in OF_BLOCKS:
        return _of_blocks(node)
    if node.domain == MICROSOFT and node.op_type in QUANTISING:
        return _quantising(node)
    if (node.domain, node.op_type) in (("", "MatMul"), ("", "Gemm"), (MICROSOFT, "FusedMatMul")):
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
    stored = stored_behind(needed_input(node, 1))
    if stored is None or len(stored.shape) != 2 or stored.dtype not in FLOATS:
        return None
    sizes = stored.shape[::-1] if node.attributes.get_int("transB", 0) else stored.shape
    form = f"{node.op_type} of quantised weights" if is_quantised(node) else node.op_type
    return _product(node, form, needed_input(node, 0), sizes, stored.dtype, stored)


def _of_blocks(node: ir.Node) -> Product | None:
    x, codes, scales = (needed_input(node, index) for index in range(3))
    sizes = needed_size(node, "K"), needed_size(node, "N")
    if constant_of(codes) is None or scales.dtype is None:
        return None
    bits = node.attributes.get_int("bits", 4)
    stored = Stored(codes, sizes, scales.dtype)
    form = f"{node.op_type}, {bits} bits"
    return _product(node, form, x, sizes, scales.dtype, stored)


def _quantising(node: ir.Node) -> Product | None:
    stored = stored_behind(needed_input(node, 1))
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
    codes, stored = node.inputs[1], stored_behind(needed_input(node, 1))
    x = before_quantising(needed_input(node, 0))
    cast = only_reader(node.outputs[0], "Cast")
    if codes is None or stored is None or len(stored.shape) != 2 or x is None or cast is None:
        return None
    scaled = _scaled(cast.outputs[0])
    if scaled is None:
        return None
    nodes, scale = scaled
    dtype = ir.DataType(cast.attributes["to"].as_int())
    zero_point = input_of(node, 3)
    integers = Integers(codes, scale, zero_point, None, nodes[-1].outputs[0])
    return _product(node, "MatMulInteger", x, stored.shape, dtype, stored, (cast, *nodes), integers)


def _scaled(sums: ir.Value) -> tuple[list[ir.Node], ir.Value] | None:
    """The nodes that multiply sums with both sides' scales, at once or one after the other, and that of the weight."""
    nodes: list[ir.Node] = []
    scale: ir.Value | None = None
    of_x = False
    while not (of_x and scale is not None):
        node = only_reader(sums, "Mul")
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
    stored: Stored,
    behind: Sequence[ir.Node] = (),
    integers: Integers | None = None,
) -> Product | None:
    if x is None or dtype not in FLOATS:
        return None
    nodes = [node, *stored.nodes, *behind]
    output = nodes[-1].outputs[0] if behind else node.outputs[0]
    read = before_quantising(x) or x
    scaling = find_scaling(read, sizes[0])
    total, bias = _with_bias(output, sizes[1])
    values = [*node.inputs[1:], stored.value, output, total, bias]
    if total is not output:
        nodes.append(total.producer())  # type: ignore[arg-type]
    names = [each.name for each in (*nodes, *values) if each is not None and each.name]
    return Product(
        node=node,
        form=form,
        x=scaling.before if scaling is not None and scaling.is_likely else read,
        output=total,
        in_features=sizes[0],
        out_features=sizes[1],
        dtype=dtype,
        names=tuple(dict.fromkeys(names)),
        weight=stored.value,
        scaling=scaling,
        parts=tuple(parts_of(total, sizes[1])),
        integers=integers,
    )


def _with_bias(output: ir.Value, width: int) -> tuple[ir.Value, ir.Value | None]:
    """What a product gives with its bias, and the bias."""
    node = only_reader(output, "Add")
    if node is None:
        return output, None
    for value in node.inputs:
        tensor = constant_of(value)
        if tensor is not None and is_row(tensor, width):
            return node.outputs[0], value
    return output, None
