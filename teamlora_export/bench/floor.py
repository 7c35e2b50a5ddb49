"""What a model's experts cost at least: what they add to the bytes that are read and to the products that are made.

A step of decoding reads every weight once, whatever the batch, and a prefill multiplies every weight once with each of
its tokens. Attention and its cache are left out: both graphs have the same, so that the true floor is a little lower
after long prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.graph.passes.last_logits import constants_of
from teamlora_export.graph.quantized import is_quantised

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Work:
    """What the weights of a graph take.

    Attributes:
        bytes: of the weights.
        each: multiply-adds with weights for each token. last: those for the last token of a prompt alone.
        slot: bytes of an adapter in a slot, where rows have adapters of their own.
        adapters: how many of them the rows of a batch have, at most.
    """

    bytes: int
    each: int
    last: int
    slot: int = 0
    adapters: int = 0

    def bytes_of(self, batch: int) -> int:
        """Of the weights that a batch of so many rows reads."""
        return self.bytes + self.slot * min(self.adapters, batch)

    def operations(self, tokens: int) -> int:
        """Multiply-adds with weights, for a sequence of so many new tokens."""
        return self.each * tokens + self.last


@dataclass(frozen=True)
class Floor:
    """The least ratio to the graph without experts, were bytes alone, or operations alone, to take time."""

    bytes: float
    operations: float


def floor(adapted: Work, bypassed: Work, tokens: int, batch: int = 1) -> Floor:
    """For a call of `tokens` new tokens of each of `batch` rows: 1 in a step of decoding."""
    return Floor(
        adapted.bytes_of(batch) / bypassed.bytes_of(batch), adapted.operations(tokens) / bypassed.operations(tokens)
    )


def work_of(model: ir.Model) -> Work:
    """The work of a graph, with an adapter in one slot where it has any. A table from which rows are taken is not read
    whole, and counts nothing."""
    constants = constants_of(model.graph)
    size = slot = each = last = 0
    for weight in model.graph.initializers.values():
        tensor, readers = weight.const_value, list(_readers(weight, constants))
        coded = bool(readers) and all(map(is_quantised, readers))
        if tensor is None or not (coded or tensor.dtype in _FLOATS) or not readers:
            continue
        if weight.is_graph_input():
            slot += tensor.nbytes
        else:
            size += tensor.nbytes
        if coded:
            # Its codes; scales and zero points are read, and multiply nothing by themselves.
            products = _products(readers[0]) if readers[0].inputs[1] is weight else 0
        else:
            products = tensor.size if len(tensor.shape) > 1 else 0
        if all(map(_has_one_token, readers)):
            last += products
        else:
            each += products
    return Work(size, each, last, slot, adapters=1 if slot else 0)


def _products(node: ir.Node) -> int:
    """Multiply-adds of a product with codes, for a token."""
    return node.attributes["K"].as_int() * node.attributes["N"].as_int()


def _readers(weight: ir.Value, constants: Collection[ir.Value]) -> Iterator[ir.Node]:
    """The nodes that bring a weight together with what depends on the input, past those that only rearrange it."""
    waiting, seen = [weight], {weight}
    while waiting:
        for use in waiting.pop().uses():
            rearranged = [value for value in use.node.outputs if value in constants]
            is_table = use.node.op_type == "Gather" and use.idx == 0 and not weight.is_graph_input()
            if not rearranged and not is_table:
                yield use.node
            waiting += [value for value in rearranged if value not in seen]
            seen.update(rearranged)


def _has_one_token(node: ir.Node) -> bool:
    """Whether it is behind the place where a deployed graph goes on with the last token alone."""
    shape = node.outputs[0].shape
    return shape is not None and len(shape) == 3 and shape[1] == 1
