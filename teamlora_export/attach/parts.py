"""How the columns of a product are taken apart: by Split, by Slices, or inside of an attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from teamlora_export.attach.stored import constant_of, readers_of


@dataclass(frozen=True)
class Part:
    """Columns of a product that are read by themselves; `value` is None where an operator takes the whole apart."""

    start: int
    end: int
    value: ir.Value | None


def parts_of(output: ir.Value, width: int) -> Iterator[Part]:
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
