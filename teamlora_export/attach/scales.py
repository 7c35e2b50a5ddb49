"""The factor for each channel that stands ahead of a product.

AWQ and SmoothQuant take one out of the rows of a weight and multiply what the product reads with it: the projection in
the model reads what comes before. The weight of a norm has the same form, where the norm is written out in pieces or
its operator has a weight of ones, and the projection reads what comes after. Names and what stands ahead tell which is
likely; a base's weights tell which it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from teamlora_export.attach.stored import (
    OF_BLOCKS,
    QUANTISING,
    constant_of,
    input_of,
    is_quantised,
    is_row,
    needed_size,
    readers_of,
    stored_behind,
)

_ROOTS = ("Rsqrt", "Sqrt", "Reciprocal", "Pow", "ReduceL2")
# Norms, and which input has their weight.
_NORMS = {
    "LpNormalization": None,
    "LayerNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "RMSNormalization": 1,
    "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
}
# How exporters call AWQ's scale.
_SCALE = re.compile(r"(?i)pre_quant|awq|smooth")


@dataclass(frozen=True)
class Scaling:
    """A factor for each channel.

    Attributes:
        before, after: what is multiplied, and the product.
        is_likely: names and what stands ahead say that it was taken out of the weights behind it.
    """

    before: ir.Value
    after: ir.Value
    value: ir.Value
    is_likely: bool
    is_divisor: bool

    def numbers(self) -> np.ndarray:
        """[in], float32: what x is multiplied with."""
        tensor = constant_of(self.value)
        assert tensor is not None
        numbers = tensor.numpy().astype(np.float32).reshape(-1)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        with np.errstate(divide="ignore"):
            return 1 / numbers if self.is_divisor else numbers


def find_scaling(x: ir.Value, width: int) -> Scaling | None:
    """The factor ahead of products of `width` inputs that read `x`, and of nothing else; None where there is none.

    What stands ahead of weights that nobody quantised is unlikely to be taken out of them, unless its name says so.
    """
    node = x.producer()
    if node is None or node.op_type not in ("Mul", "Div") or node.domain != "" or x.is_graph_output():
        return None
    tensors = [constant_of(value) for value in node.inputs]
    known = range(node.op_type == "Div", len(tensors))
    index = next((i for i in known if (tensor := tensors[i]) is not None and is_row(tensor, width)), None)
    readers = [far for reader in readers_of(x) for far in _past_quantising(reader)]
    if index is None or width == 1 or not all(_reads_as_x(each, width) for each in readers):
        return None
    rest, value = input_of(node, 1 - index), node.inputs[index]
    if rest is None or value is None:
        return None
    is_named = any(_SCALE.search(name) for name in (value.name, node.name, x.name) if name)
    is_likely = is_named or (all(map(is_quantised, readers)) and not _is_normalised(rest))
    return Scaling(rest, x, value, is_likely, node.op_type == "Div")


def _past_quantising(node: ir.Node) -> list[ir.Node]:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
        return [far for reader in readers_of(node.outputs[0]) for far in _past_quantising(reader)]
    return [node]


def _reads_as_x(node: ir.Node, width: int) -> bool:
    """Whether a node is a product of this width by a stored weight."""
    if node.op_type in OF_BLOCKS:
        return needed_size(node, "K") == width
    if node.op_type not in ("MatMul", "Gemm", "FusedMatMul", "MatMulInteger", *QUANTISING):
        return False
    stored = stored_behind(input_of(node, 1))
    return stored is not None and width in stored.shape


def _is_normalised(value: ir.Value) -> bool:
    """Whether a value was just divided by its own size (a norm in pieces, before its weight)."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Identity"):
        source = input_of(node, 0)
        if source is None:
            return False
        value, node = source, source.producer()
    if node is None or node.op_type not in ("Mul", "Div"):
        # Of those that add first, the others are sums.
        return node is not None and value is node.outputs[0] and _is_bare_norm(node)
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


def _is_bare_norm(node: ir.Node) -> bool:
    """Whether a node is a norm whose weight does nothing, so that its real one may follow."""
    if node.op_type not in _NORMS:
        return False
    place = _NORMS[node.op_type]
    weight = constant_of(input_of(node, place)) if place is not None else None
    is_bare = weight is None or bool((weight.numpy() == 1).all())
    if isinstance(weight, ir.ExternalTensor):
        weight.release()
    return is_bare
