"""What a model's inputs and outputs are called for each task, and the axes that they have."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError

# Names of the dynamic axes.
BATCH, SEQUENCE, PAST, TOTAL, CAPACITY = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "capacity",
)
# Where a layer's tokens see no further back: the capacity of its buffers is named after the tokens that they see.
_WINDOW = re.compile(r"window_([1-9]\d{0,8})")
# Of the model's input that says which slot's adapter each row has.
ADAPTER_NAME = "adapter"
_CACHE = re.compile(r"past_key_values\.\d+\.(key|value)")
_NUMBERS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# What each task is asked for.
_RESULTS = {
    "text-generation": ("logits",),
    "feature-extraction": ("last_hidden_state",),
    "sentence-embedding": ("sentence_embedding",),
    "text-classification": ("logits",),
}
TASKS = tuple(_RESULTS)


@dataclass(frozen=True)
class Port:
    """An input or output of the model. Sizes are integers or names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def refuse_unknown_task(task: str) -> None:
    """
    Raises:
        ExportError: it is neither "auto" nor one of `TASKS`.
    """
    if task not in (*TASKS, "auto"):
        raise ExportError(f"--task {task}: unknown. Use auto, {', '.join(TASKS[:-1])} or {TASKS[-1]}.")


def keeps_in_place(inputs: Sequence[Port]) -> bool:
    """Whether a model of these inputs writes into buffers of one size, in place of a cache that grows."""
    return any(map(is_capacity, (size for port in inputs for size in port.shape)))


def is_capacity(size: int | str | None) -> bool:
    """Whether an axis of this size or name is that of a cache in place, which holds tokens."""
    return size == CAPACITY or window_of(size) is not None


def window_capacity(window: int) -> str:
    """The name of the capacity of a layer whose tokens see themselves and the `window` - 1 before (`window_of`)."""
    return f"window_{window}"


def window_of(size: int | str | None) -> int | None:
    """How many tokens are seen in a layer whose cache has an axis of this size or name; None: all, or it is no such
    axis."""
    match = _WINDOW.fullmatch(size) if isinstance(size, str) else None
    return int(match[1]) if match else None


def fits_task(inputs: Sequence[Port], outputs: Sequence[Port], task: str, dtype: str) -> bool:
    """Whether a model in `dtype` has what every runtime takes for granted of one for this task."""
    caches = [port for port in inputs if _CACHE.fullmatch(port.name)]
    numbers = [port for port in inputs if port not in caches]
    given = {port.name for port in outputs}
    return (
        any(port.name == "input_ids" for port in numbers)
        and all(port.name in _NUMBERS and port.dtype == "int64" and len(port.shape) == 2 for port in numbers)
        and all(_is_cache(port, dtype, given) for port in caches)
        and bool(caches) == (task == "text-generation")
        and bool(given.intersection(_RESULTS[task]))
    )


def _is_cache(port: Port, dtype: str, given: Collection[str]) -> bool:
    """Of a form that runtimes can make an empty one of, and with an output that takes its place."""
    sizes = [port.shape[axis] for axis in (1, 3)] if len(port.shape) == 4 else [None]
    return (
        port.dtype == DTYPES[dtype].onnx
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and port.name.replace("past_key_values", "present") in given
    )
