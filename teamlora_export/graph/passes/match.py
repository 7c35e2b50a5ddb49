"""What rewrites ask of the values that they meet: which node made this, and is that number exactly this one.

Every answer is exact. A constant equals a number where its type's rounding of that number is what the graph holds, and
never within a tolerance: next to 1/2 is not 1/2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from teamlora_export.graph.passes.module_outputs import MODULES_KEY
from teamlora_export.graph.weights import recipe_of

FLOATING = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The standard node of that type that `value` is the first output of."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type != op_type or node.outputs[0] is not value:
        return None
    return node


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """What a constant of the graph holds; None for a weight, which has no numbers yet, and for what is computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None and recipe_of(value) is None else None
    return None if tensor is None else tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The one number of a constant."""
    array = numbers(value)
    return None if array is None or array.size != 1 else float(array.reshape(-1)[0])


def is_scalar(value: ir.Value | None, number: float) -> bool:
    """Whether a constant is `number`, as its type rounds it."""
    array = numbers(value)
    return array is not None and array.size == 1 and bool(array.reshape(-1)[0] == np.asarray(number, array.dtype))


def is_list(value: ir.Value | None, *expected: int) -> bool:
    """Whether a constant holds these integers."""
    array = numbers(value)
    return array is not None and array.reshape(-1).tolist() == list(expected)


def both_ways(node: ir.Node | None) -> Iterator[tuple[ir.Value, ir.Value]]:
    """The two inputs of a commutative node, in either order; nothing without a node."""
    if node is not None and None not in node.inputs:
        first, second = node.inputs
        yield first, second  # type: ignore[misc]
        yield second, first  # type: ignore[misc]


def is_last_axis(axis: int, value: ir.Value) -> bool:
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)


def is_mean(value: ir.Value | None, of: ir.Value, like: ir.Value) -> bool:
    """Whether `value` is the mean of `of` (of the shape of `like`) over its last axis, which stays with size 1."""
    mean = made_by(value, "ReduceMean")
    if mean is None or mean.inputs[0] is not of or len(mean.inputs) != 2 or mean.attributes.get_int("keepdims", 1) != 1:
        return False
    axes = numbers(mean.inputs[1])
    return axes is not None and axes.size == 1 and is_last_axis(int(axes.reshape(-1)[0]), like)


def is_inner(value: ir.Value) -> bool:
    """Whether `value` matters to its one reader alone: it is no output, no module's value, and read by nothing else."""
    return len(value.uses()) == 1 and not value.is_graph_output() and MODULES_KEY not in value.metadata_props


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` take over name, type, readers and modules of `old`, its node being inserted before the maker of `old`
    where it is in no graph yet; what made `old` goes where nothing else needs it."""
    producer, maker, name = old.producer(), new.producer(), old.name
    assert producer is not None
    assert maker is not None
    if maker.graph is None:
        graph.insert_before(producer, maker)
    new.type, new.shape = old.type, old.shape
    new.metadata_props.update(old.metadata_props)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    _remove_unread(graph, producer)
    new.name = name


def integers(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    """A new constant int64 [len(numbers)]."""
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(numbers)]))
    value.const_value = ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=name)
    graph.initializers.add(value)
    return value


def _remove_unread(graph: ir.Graph, node: ir.Node) -> None:
    """Remove `node`, where nothing reads what it makes, and then what it alone read."""
    if node.graph is not graph or any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    producers = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for producer in producers:
        if producer is not None:
            _remove_unread(graph, producer)
