"""The tables of a rotary embedding, halved: models hold the cosine and sine of each angle twice, the operator reads
them once."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import onnx_ir as ir

from teamlora_export.graph.passes.match import integers, is_last_axis, is_list, made_by, numbers, scalar


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
        self._halves: dict[tuple[ir.Value, Layout], ir.Value | None] = {}
        self._tables: dict[tuple[ir.Value, int], ir.Value | None] = {}

    def half(self, table: ir.Value, heads_axis: int, x: ir.Value, layout: Layout) -> ir.Value | None:
        """Half of `table`, as [batch, sequence, size / 2], when x [.., size] is multiplied by it and all heads of x,
        on `heads_axis`, by the same numbers. None where the halves are not proven to be equal."""
        if x.shape is None or table.shape is None or len(table.shape) != 4 or table.shape[3] != x.shape[3]:
            return None
        if table.shape[heads_axis] != 1 or table.shape[3 - heads_axis] != x.shape[3 - heads_axis]:
            return None
        half = self._half(table, layout)
        if half is None or half.dtype != x.dtype:
            return None
        key = half, heads_axis
        if key not in self._tables:
            self._tables[key] = self._of_whole_batch(self._without_heads(half, heads_axis), x)
        return self._tables[key]

    def _half(self, value: ir.Value | None, layout: Layout) -> ir.Value | None:
        if value is None:
            return None
        key = value, layout
        if key not in self._halves:
            self._halves[key] = _doubled(value, layout) or self._computed(value, layout)
        return self._halves[key]

    def _computed(self, value: ir.Value, layout: Layout) -> ir.Value | None:
        """Half of what is computed number by number of a doubled value."""
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in ("Cos", "Sin", "Cast", "Mul", "Unsqueeze"):
            return None
        inputs = list(node.inputs)
        if node.op_type == "Mul" and scalar(inputs[0]) is not None:
            inputs.reverse()
        if node.op_type == "Mul" and scalar(inputs[1]) is None:
            return None
        if node.op_type == "Unsqueeze" and not _is_before_the_last(inputs[1], value):
            return None
        half = self._half(inputs[0], layout)
        if half is None or value.shape is None:
            return None
        made = self._add(node.op_type, [half, *inputs[1:]], dict(node.attributes), f"{value.name}.half", after=node)
        made.type, made.shape = value.type, ir.Shape([*list(value.shape)[:-1], half.shape[-1]])  # type: ignore[index]
        return made

    def _without_heads(self, half: ir.Value, heads_axis: int) -> ir.Value:
        unsqueeze = made_by(half, "Unsqueeze")
        if unsqueeze is not None and is_list(unsqueeze.inputs[1], heads_axis):
            return unsqueeze.inputs[0]  # type: ignore[return-value]
        axes = integers(self._graph, f"{half.name}.heads_axis", [heads_axis])
        made = self._add("Squeeze", [half, axes], {}, f"{half.name}.squeezed", after=half.producer())
        batch, *sizes = half.shape  # type: ignore[misc]
        made.type, made.shape = half.type, ir.Shape([batch, sizes[2 - heads_axis], sizes[2]])
        return made

    def _of_whole_batch(self, half: ir.Value, x: ir.Value) -> ir.Value | None:
        """`half` for each row of x, where the model computes it for one row and broadcasts."""
        assert half.shape is not None
        assert x.shape is not None
        if half.shape[0] == x.shape[0]:
            return half
        source = next((v for v in self._graph.inputs if v.shape is not None and v.shape[0] == x.shape[0]), None)
        if half.shape[0] != 1 or source is None:
            return None
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


def _is_before_the_last(axes: ir.Value | None, unsqueezed: ir.Value) -> bool:
    """Whether none of the new axes is the last one."""
    array = numbers(axes)
    if array is None or unsqueezed.shape is None:
        return False
    return all(0 <= int(axis) < len(unsqueezed.shape) - 1 for axis in array.reshape(-1))
