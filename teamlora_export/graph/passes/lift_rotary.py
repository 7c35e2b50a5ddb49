"""Lifts rotary position embeddings to ONNX's `RotaryEmbedding` (opset 23)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from teamlora_export.graph.passes import match
from teamlora_export.graph.passes.match import FLOATING, both_ways, is_inner, is_last_axis, is_list, made_by
from teamlora_export.graph.passes.rotary_tables import Layout, RotaryTables

_HEADS, _EXCHANGED = 1, 2
_TRANSPOSED = [0, 2, 1, 3]


class LiftRotary(ir.passes.InPlacePass):
    """Replaces `x * cos + turned(x) * sin` by one node that reads half of each table.

    x is [batch, heads, sequence, size], or has heads and sequence exchanged and is transposed right after. `turned`
    exchanges the halves of the last axis, or the numbers of each pair (GPT-J), and negates what comes first. Tables
    must be proven to hold each angle twice, in the same places (`rotary_tables.py`). Where only a first part of x is
    turned and the rest put behind it again, the node does that too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tables = RotaryTables(model.graph)
        modified = False
        for node in list(model.graph):
            if node.graph is model.graph and node.domain == "" and node.op_type == "Add":
                modified |= _lift(model.graph, node, tables)
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Rotation:
    """`result` is `x` with its first `size` numbers turned; all of them where `size` is 0."""

    x: ir.Value
    result: ir.Value
    size: int = 0


def _lift(graph: ir.Graph, node: ir.Node, tables: RotaryTables) -> bool:
    for x, turned, cos, sin in _products(node):
        layout = _layout(turned, x)
        if layout is None or x.dtype not in FLOATING:
            continue
        rotation = _with_rest(_Rotation(x, node.outputs[0]))
        for heads_axis in (_HEADS, _EXCHANGED):
            end = rotation.result if heads_axis == _HEADS else _transposed(rotation.result)
            if end is None:
                continue
            halves = tables.halves((cos, sin), heads_axis, x, layout)
            if halves is not None:
                source = rotation.x if heads_axis == _HEADS else _transpose(graph, rotation, end)
                attributes = {"interleaved": int(layout == Layout.PAIRS), "rotary_embedding_dim": rotation.size}
                node = ir.node("RotaryEmbedding", [source, *halves], attributes)
                match.replace(graph, end, node.outputs[0])
                return True
    return False


def _products(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value, ir.Value, ir.Value]]:
    """Every way to read `node` as x * cos + turned * sin."""
    for left, right in both_ways(node):
        for x, cos in both_ways(made_by(left, "Mul")):
            for turned, sin in both_ways(made_by(right, "Mul")):
                yield x, turned, cos, sin


def _layout(turned: ir.Value, x: ir.Value) -> Layout | None:
    """How `turned` was made of `x` [.., .., .., an even, known size]."""
    widened, source = made_by(turned, "Cast"), made_by(x, "Cast")
    if widened is not None and source is not None and turned.dtype == x.dtype:
        # Of a 16-bit model whose tables are float32 (OLMo 2): what is exchanged and negated is not rounded by that.
        turned, x = widened.inputs[0], source.inputs[0]  # type: ignore[assignment]
    if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int) or x.shape[3] % 2:
        return None
    if _is_half_turned(turned, x):
        return Layout.HALVES
    return Layout.PAIRS if _is_pairwise_turned(turned, x) else None


def _is_half_turned(turned: ir.Value, x: ir.Value) -> bool:
    """turned = [-second half, first half]."""
    concat = made_by(turned, "Concat")
    if concat is None or len(concat.inputs) != 2 or not is_last_axis(concat.attributes["axis"].as_int(), turned):
        return False
    negated = made_by(concat.inputs[0], "Neg")
    if negated is None:
        return False
    half = int(str(x.shape[3])) // 2  # type: ignore[index]
    return _is_part(negated.inputs[0], x, half, 2 * half) and _is_part(concat.inputs[1], x, 0, half)


def _is_pairwise_turned(turned: ir.Value, x: ir.Value) -> bool:
    """turned = [-x1, x0, -x3, x2, ..]."""
    reshape = made_by(turned, "Reshape")
    stack = made_by(reshape.inputs[0], "Concat") if reshape is not None else None
    if stack is None or len(stack.inputs) != 2 or turned.shape is None or list(turned.shape) != list(x.shape):  # type: ignore[arg-type]
        return False
    if not is_last_axis(stack.attributes["axis"].as_int(), stack.outputs[0]):
        return False
    first, second = (made_by(value, "Unsqueeze") for value in stack.inputs)
    if first is None or second is None or not all(_adds_last_axis(node) for node in (first, second)):
        return False
    negated = made_by(first.inputs[0], "Neg")
    size = int(str(x.shape[3]))  # type: ignore[index]
    return (
        negated is not None
        and _is_part(negated.inputs[0], x, 1, size, step=2)
        and _is_part(second.inputs[0], x, 0, size, step=2)
    )


def _adds_last_axis(unsqueeze: ir.Node) -> bool:
    return is_list(unsqueeze.inputs[1], -1) or is_list(unsqueeze.inputs[1], 4)


def _is_part(part: ir.Value | None, x: ir.Value, start: int, end: int, step: int = 1) -> bool:
    """Whether `part` is x[..., start:end:step]."""
    if step == 1 and part is not None and (split := part.producer()) is not None and split.op_type == "Split":
        return _is_part_of_split(part, split, x, start, end)
    node = made_by(part, "Slice")
    if node is None or node.inputs[0] is not x or x.shape is None or len(node.inputs) < 4:
        return False
    starts, ends, axes = (match.numbers(value) for value in node.inputs[1:4])
    if starts is None or ends is None or axes is None or starts.size != 1 or axes.size != 1:
        return False
    if not is_last_axis(int(axes[0]), x) or (step != 1 if len(node.inputs) < 5 else not is_list(node.inputs[4], step)):
        return False
    size = x.shape[-1]
    if not isinstance(size, int):
        return False
    given = range(size)[int(starts[0]) : int(ends[0])]
    return given == range(start, end)


def _is_part_of_split(part: ir.Value, split: ir.Node, x: ir.Value, start: int, end: int) -> bool:
    if split.domain != "" or split.inputs[0] is not x or not is_last_axis(split.attributes.get_int("axis", 0), x):
        return False
    widths = [value.shape[-1] if value.shape is not None else None for value in split.outputs]
    if not all(isinstance(width, int) for width in widths):
        return False
    before = sum(widths[: part.index()])  # type: ignore[arg-type,misc]
    return (before, before + widths[part.index()]) == (start, end)  # type: ignore[operator,index]


def _with_rest(rotation: _Rotation) -> _Rotation:
    """`rotation`, widened to all of what its x is a first part of, where the rest is put behind its result."""
    part = rotation.x.producer()
    users = rotation.result.consumers()
    if part is None or not part.inputs or part.inputs[0] is None or not is_inner(rotation.result):
        return rotation
    whole, concat = part.inputs[0], users[0]
    size, total = rotation.x.shape[-1], whole.shape[-1] if whole.shape is not None else None  # type: ignore[index]
    if not isinstance(size, int) or not isinstance(total, int) or made_by(concat.outputs[0], "Concat") is None:
        return rotation
    fits = (
        len(concat.inputs) == 2
        and concat.inputs[0] is rotation.result
        and is_last_axis(concat.attributes["axis"].as_int(), concat.outputs[0])
        and _is_part(rotation.x, whole, 0, size)
        and _is_part(concat.inputs[1], whole, size, total)
    )
    return replace(rotation, x=whole, result=concat.outputs[0], size=size) if fits else rotation


def _transposed(value: ir.Value) -> ir.Value | None:
    """`value` with axes 1 and 2 exchanged, when it is read in no other way."""
    node = value.consumers()[0] if is_inner(value) else None
    if node is None or node.op_type != "Transpose" or list(node.attributes.get_ints("perm", [])) != _TRANSPOSED:
        return None
    return node.outputs[0]


def _transpose(graph: ir.Graph, rotation: _Rotation, like: ir.Value) -> ir.Value:
    """The x of `rotation` with axes 1 and 2 exchanged, of the shape of `like`."""
    node = ir.node("Transpose", [rotation.x], {"perm": _TRANSPOSED})
    made = node.outputs[0]
    made.name, made.type, made.shape = f"{rotation.x.name}.transposed", like.type, like.shape
    producer = like.producer()
    assert producer is not None
    graph.insert_before(producer, node)
    return made
