"""The tables of a rotary embedding, halved: models hold the cosine and sine of each angle twice, the operator reads
them once."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import onnx_ir as ir

from teamlora_export.graph.passes.match import both_ways, integers, is_last_axis, is_list, made_by, numbers, scalar


class Layout(Enum):
    """Where the two numbers stand that one angle turns."""

    # In the same place of either half of the last axis (Llama).
    HALVES = 0
    # Beside each other (GPT-J).
    PAIRS = 1


class RotaryTables:
    """Finds half of a table that is proven to hold everything twice, in a `Layout`. Equal questions get one answer."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._halves: dict[tuple[ir.Value, Layout], ir.Value] = {}
        self._tables: dict[tuple[ir.Value, int], ir.Value] = {}

    def halves(self, tables: Sequence[ir.Value], heads_axis: int, x: ir.Value, layout: Layout) -> list[ir.Value] | None:
        """Half of each of `tables`, as [batch, sequence, size / 2], when x [.., size] is multiplied by them, all heads
        of x, on `heads_axis`, by the same numbers. None where the halves of one are not proven to be equal."""
        if not all(self._fits(table, heads_axis, x) and _is_doubled(table, layout) for table in tables):
            return None
        return [self._for_operator(self._half(table, layout), heads_axis, x) for table in tables]

    def _fits(self, table: ir.Value, heads_axis: int, x: ir.Value) -> bool:
        if x.shape is None or table.shape is None or len(table.shape) != 4 or table.dtype != x.dtype:
            return False
        batch, sequence = table.shape[0], 3 - heads_axis
        return (
            table.shape[heads_axis] == 1
            and (table.shape[sequence], table.shape[3]) == (x.shape[sequence], x.shape[3])
            and (batch == x.shape[0] or (batch == 1 and self._input_of_batch(x) is not None))
        )

    def _input_of_batch(self, x: ir.Value) -> ir.Value | None:
        """An input of the graph with as many rows as x."""
        assert x.shape is not None
        return next((v for v in self._graph.inputs if v.shape is not None and v.shape[0] == x.shape[0]), None)

    def _half(self, value: ir.Value, layout: Layout) -> ir.Value:
        """Half of a doubled value: what it holds twice, or the same computed of that."""
        key = value, layout
        if key not in self._halves:
            self._halves[key] = _doubled(value, layout) or self._computed_of_half(value, layout)
        return self._halves[key]

    def _computed_of_half(self, value: ir.Value, layout: Layout) -> ir.Value:
        node, source = value.producer(), _computed_of(value)
        assert node is not None
        assert source is not None
        assert value.shape is not None
        half = self._half(source, layout)
        inputs = [half if given is source else given for given in node.inputs]
        made = self._add(node.op_type, inputs, dict(node.attributes), f"{value.name}.half", after=node)
        made.type, made.shape = value.type, ir.Shape([*list(value.shape)[:-1], half.shape[-1]])  # type: ignore[index]
        return made

    def _for_operator(self, half: ir.Value, heads_axis: int, x: ir.Value) -> ir.Value:
        key = half, heads_axis
        if key not in self._tables:
            self._tables[key] = self._of_whole_batch(self._without_heads(half, heads_axis), x)
        return self._tables[key]

    def _without_heads(self, half: ir.Value, heads_axis: int) -> ir.Value:
        unsqueeze = made_by(half, "Unsqueeze")
        if unsqueeze is not None and is_list(unsqueeze.inputs[1], heads_axis):
            return unsqueeze.inputs[0]  # type: ignore[return-value]
        axes = integers(self._graph, f"{half.name}.heads_axis", [heads_axis])
        made = self._add("Squeeze", [half, axes], {}, f"{half.name}.squeezed", after=half.producer())
        batch, *sizes = half.shape  # type: ignore[misc]
        made.type, made.shape = half.type, ir.Shape([batch, sizes[2 - heads_axis], sizes[2]])
        return made

    def _of_whole_batch(self, half: ir.Value, x: ir.Value) -> ir.Value:
        """`half` for each row of x, where the model computes it for one row and broadcasts."""
        assert half.shape is not None
        assert x.shape is not None
        if half.shape[0] == x.shape[0]:
            return half
        source = self._input_of_batch(x)
        ones = integers(self._graph, f"{half.name}.ones", [1, 1])
        batch = self._add("Shape", [source], {"start": 0, "end": 1}, f"{half.name}.batch", after=half.producer())
        batch.type, batch.shape = ones.type, ir.Shape([1])
        sizes = self._add("Concat", [batch, ones], {"axis": 0}, f"{half.name}.sizes", after=batch.producer())
        sizes.type, sizes.shape = ones.type, ir.Shape([3])
        made = self._add("Expand", [half, sizes], {}, f"{half.name}.expanded", after=sizes.producer())
        made.type, made.shape = half.type, ir.Shape([x.shape[0], *list(half.shape)[1:]])
        return made

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict, name: str, *, after: ir.Node | None
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = name
        assert after is not None
        self._graph.insert_after(after, node)
        return node.outputs[0]


def _doubled(value: ir.Value, layout: Layout) -> ir.Value | None:
    """The value that `value` holds twice along its last axis: behind itself, or each number beside itself."""
    if layout == Layout.HALVES:
        concat = made_by(value, "Concat")
        if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
            return None
        return concat.inputs[0] if is_last_axis(concat.attributes["axis"].as_int(), value) else None
    reshape = made_by(value, "Reshape")
    tile = made_by(reshape.inputs[0], "Tile") if reshape is not None else None
    unsqueeze = made_by(tile.inputs[0], "Unsqueeze") if tile is not None else None
    source = unsqueeze.inputs[0] if unsqueeze is not None else None
    if source is None or source.shape is None or value.shape is None or tile is None or unsqueeze is None:
        return None
    rank = len(source.shape)
    if not (is_list(unsqueeze.inputs[1], rank) or is_list(unsqueeze.inputs[1], -1)):
        return None
    if not is_list(tile.inputs[1], *[1] * rank, 2):
        return None
    size = source.shape[-1]
    merged = [*list(source.shape)[:-1], 2 * size] if isinstance(size, int) else None
    return source if list(value.shape) == merged else None


def _is_doubled(value: ir.Value, layout: Layout) -> bool:
    """Whether `value` is proven to hold everything twice."""
    if value.shape is None:
        return False
    source = _computed_of(value)
    return _doubled(value, layout) is not None or (source is not None and _is_doubled(source, layout))


def _computed_of(value: ir.Value) -> ir.Value | None:
    """What `value` is computed of number by number, the last axis staying where it is."""
    node = value.producer()
    if node is None or node.domain != "" or value.shape is None:
        return None
    if node.op_type in ("Cos", "Sin", "Cast"):
        return node.inputs[0]
    if node.op_type == "Mul":
        return next((source for source, factor in both_ways(node) if scalar(factor) is not None), None)
    axes = numbers(node.inputs[1]) if node.op_type == "Unsqueeze" else None
    before_last = axes is not None and all(0 <= int(axis) < len(value.shape) - 1 for axis in axes.reshape(-1))
    return node.inputs[0] if before_last else None
