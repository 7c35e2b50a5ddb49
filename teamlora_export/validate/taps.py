"""What of a graph's inside can be looked at: each module's output, and the parts of each adapted projection.

The tracer marked which value each module returned. An adapted projection is the sum of two: what the base computes and
what the experts add; both, and what they read, are looked at by themselves, so that a small contribution is judged by
its own size. A node of the op shows the sum alone: what its experts add is the difference from its base, and holds the
rounding of the sum.

A tap's name is its mark (`graph/marks.py`); of several values with one mark, all but the last have `#n` behind it.
Parts of an adapted projection are `PATH/input`, `PATH/base` and `PATH/experts`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from teamlora_export.graph import op
from teamlora_export.graph.passes.module_outputs import COLUMNS_KEY, MODULES_KEY

INPUT, BASE, EXPERTS = "input", "base", "experts"
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Masks hold numbers like float16's lowest; which one does not matter.
_MASKING = 1e4


@dataclass(frozen=True)
class Tap:
    """A value of the graph, or some of its columns where siblings share it.

    Attributes:
        base: where it is given, the tap is `value` less this one, in float64.
        one_token: `value` is [batch, 1, ..], and the module's is [batch, ..].
    """

    value: str
    columns: tuple[int, int] | None = None
    base: str | None = None
    one_token: bool = False

    def of(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        array = values[self.value][:, 0] if self.one_token else values[self.value]
        if self.base is not None:
            with np.errstate(invalid="ignore"):
                array = array.astype(np.float64) - values[self.base]
        return array if self.columns is None else array[..., slice(*self.columns)]


def module_of(tap: str) -> str:
    """The module that a tap belongs to."""
    return tap.partition("/")[0].partition("#")[0].removesuffix(".input")


def whole_of(part: str) -> str:
    """The tap that a part belongs to."""
    return part.partition("/")[0]


def is_part(tap: str) -> bool:
    """Whether it is a part of an adapted projection, and no mark of its own."""
    return tap.endswith((f"/{INPUT}", f"/{BASE}", f"/{EXPERTS}"))


def expert_inputs(model: ir.Model) -> dict[str, str]:
    """What each node of the op reads, by the name of what it gives; none where bodies are inlined."""
    return {str(node.outputs[0].name): str(node.inputs[0].name) for node in model.graph if op.is_op(node)}  # type: ignore[union-attr]


def find_taps(model: ir.Model, adapted: Collection[str], inputs: Mapping[str, str]) -> dict[str, Tap]:
    """Every tap of `model` by name, in the order of the graph.

    Args:
        adapted: paths of the adapted projections.
        inputs: what `expert_inputs` gave before bodies were inlined.
    """
    taps: dict[str, Tap] = {}
    for value, modules in marked_values(model):
        for module, columns in zip(modules, _columns(value, len(modules)), strict=True):
            if module.partition("#")[0] in adapted:
                taps |= _parts(module, value, columns, inputs)
            taps[module] = Tap(str(value.name), columns)
    return taps


def marked_values(model: ir.Model) -> Iterator[tuple[ir.Value, list[str]]]:
    """Each value that modules returned, with their names; several modules' own columns of it count as well."""
    values = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *values):
        if MODULES_KEY in value.metadata_props:
            yield value, value.metadata_props[MODULES_KEY].split(",")


def _columns(value: ir.Value, modules: int) -> list[tuple[int, int] | None]:
    """Of each module that returned `value`: its columns, where the value holds those of several."""
    if COLUMNS_KEY not in value.metadata_props:
        return [None] * modules
    borders = [columns.split(":") for columns in value.metadata_props[COLUMNS_KEY].split(",")]
    return [(int(start), int(end)) for start, end in borders]


def _parts(module: str, value: ir.Value, columns: tuple[int, int] | None, inputs: Mapping[str, str]) -> dict[str, Tap]:
    """The parts of an adapted projection that gives `columns` of `value`; none where the graph no longer has their
    form."""
    node = value.producer()
    one_token = node is not None and node.op_type == "Squeeze"
    if one_token:
        # A place of each text, as a text of one token (`passes/take_adapters.py`).
        whole, value = value, node.inputs[0]  # type: ignore[union-attr,assignment]
        node = value.producer()
    if node is not None and node.op_type == "Split":
        widths = _widths(node)
        start = sum(widths[: value.index()])  # type: ignore[arg-type,misc]
        columns = start, start + widths[value.index()]  # type: ignore[index]
        value = node.inputs[0]  # type: ignore[assignment]
        node = value.producer()
    if node is None or None in node.inputs:
        return {}
    if op.is_op(node) and one_token:
        x, rest = (str(v.producer().inputs[0].name) for v in node.inputs[:2])  # type: ignore[union-attr]
        return {
            f"{module}/{INPUT}": Tap(x),
            f"{module}/{BASE}": Tap(rest),
            f"{module}/{EXPERTS}": Tap(str(whole.name), base=rest),
        }
    if op.is_op(node):
        x, rest = (str(v.name) for v in node.inputs[:2] if v is not None)
        return {
            f"{module}/{INPUT}": Tap(x),
            f"{module}/{BASE}": Tap(rest, columns),
            f"{module}/{EXPERTS}": Tap(str(value.name), columns, rest),
        }
    if node.op_type != "Add":
        return {}
    base, experts = node.inputs
    parts = {
        f"{module}/{part}": Tap(str(added.name), columns, one_token=one_token)  # type: ignore[union-attr]
        for part, added in ((BASE, base), (EXPERTS, experts))
    }
    read = inputs.get(str(value.name)) or _read_by(experts)  # type: ignore[arg-type]
    return ({f"{module}/{INPUT}": Tap(read, one_token=one_token)} if read else {}) | parts


def _widths(split: ir.Node) -> list[int]:
    """How many columns each output has; a graph of another tool may not say its values' shapes."""
    if len(split.inputs) > 1 and split.inputs[1] is not None and split.inputs[1].const_value is not None:
        return [int(size) for size in split.inputs[1].const_value.numpy()]
    return [int(str(output.shape[-1])) for output in split.outputs]  # type: ignore[index]


def _read_by(experts: ir.Value) -> str | None:
    """What the product with the stacked `down` reads: the nearest product before `experts` with a transposed weight."""
    waiting, seen = [experts], {experts}
    while waiting:
        node = waiting.pop(0).producer()
        if node is None:
            continue
        second = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if second is not None and second.op_type == "Transpose" and _is_weight(second.inputs[0]):
            return node.inputs[0].name  # type: ignore[union-attr]
        waiting.extend(v for v in node.inputs if v is not None and v not in seen)
        seen.update(waiting)
    return None


# What moves the numbers of its first input.
_MOVING = ("Reshape", "Split", "Gather")


def _is_weight(value: ir.Value | None) -> bool:
    """A stored weight, or parts of stored weights put together anew."""
    node = value.producer() if value is not None else None
    if node is None:
        return value is not None and value.is_initializer()
    moved = {
        "Concat": node.inputs,
        "Reshape": node.inputs[:1],
        "Split": node.inputs[:1],
        "Gather": node.inputs[:1],
    }.get(node.op_type, ())
    return len(moved) > 0 and all(map(_is_weight, moved))


def live_values(model: ir.Model) -> set[str]:
    """Names of all values, weights among them, that an output of the graph depends on."""
    live: set[str] = set()
    waiting = list(model.graph.outputs)
    while waiting:
        value = waiting.pop()
        if value.name in live:
            continue
        live.add(str(value.name))
        node = value.producer()
        if node is not None:
            waiting.extend(v for v in node.inputs if v is not None)
            waiting.extend(_captured(node))
    return live


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the branches of a node read from around it."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from (v for v in inner.inputs if v is not None)


def with_rounded_constants(model: ir.Model, taps: Iterable[str], weights: Collection[str]) -> set[str]:
    """Which of the values `taps` are computed with a constant that the graph's 16-bit type may have rounded.

    Each value is followed back to other taps only: `model` (types its own) computes one of the others.
    """
    ends = set(taps)
    values = {value.name: value for node in model.graph for value in node.outputs}
    memo: dict[ir.Value, bool] = {}

    def rounded(value: ir.Value) -> bool:
        if value not in memo:
            memo[value] = False
            node = value.producer()
            if node is None:
                constant = value.is_initializer() and value.name not in weights
                memo[value] = constant and _may_be_rounded(value.const_value)
            elif node.op_type == "Constant":
                memo[value] = any(
                    _may_be_rounded(a.as_tensor())
                    for a in node.attributes.values()
                    if a.type == ir.AttributeType.TENSOR
                )
            else:
                memo[value] = any(rounded(v) for v in node.inputs if v is not None and v.name not in ends)
        return memo[value]

    found = set()
    for name in ends:
        node = values[name].producer() if name in values else None
        if node is not None and any(rounded(v) for v in node.inputs if v is not None and v.name not in ends):
            found.add(name)
    return found


def _may_be_rounded(tensor: ir.TensorProtocol | None) -> bool:
    """Whether numbers in 16 bits may stand for others: all but powers of two and small integers."""
    if tensor is None or tensor.dtype not in _NARROW:
        return False
    numbers = tensor.numpy().astype(np.float64)
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) < _MASKING)]
    exact = (np.abs(np.frexp(numbers)[0]) == 0.5) | ((numbers == np.round(numbers)) & (np.abs(numbers) <= 256))
    return not bool(exact.all())
