"""What rows of texts, and who runs them, need of an open model, whatever runs it: `Session` on ONNX Runtime,
`EngineSession` on TensorRT; and what its inputs and outputs are called."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, NO_ADAPTER, Adapters, Memory, rows_adapter
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.model_folder import Settings
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, NO_ADAPTER, Adapters, Memory, rows_adapter
    from failure import ModelError
    from model_folder import Settings

# What results are called, the best one first, and what goes in beside a cache.
RESULTS = ("sentence_embedding", "logits", "last_hidden_state")
NUMBERS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# By the names that ONNX Runtime has for types.
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# By its bits, in memory that a runtime is told the type of: NumPy has no bfloat16.
SLOT_TYPES: dict[str, type] = {**NUMPY, "tensor(bfloat16)": np.uint16}
# The names of the axis that holds the tokens of a cache in place, and of one whose layer sees so many tokens only.
CAPACITY = re.compile(r"capacity|window_([1-9]\d{0,8})")


class CachePort(Protocol):
    """An input that is a cache: [batch, heads, places, size], and the name of its type as ONNX Runtime has it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Sequence[Any]: ...

    @property
    def type(self) -> str: ...


class CacheMemory(Protocol):
    """Where the rows of a cache are; zeros at first."""

    shape: tuple[int, ...]

    @property
    def address(self) -> int: ...

    def numpy(self) -> np.ndarray: ...

    def clear(self, row: int) -> None: ...


# Of a cache: where its first row is, the shape of the rows of a call, and the NumPy type that has their size.
Place = tuple[int, tuple[int, ...], type]
# Calls of the model with its caches in place: what it is fed with, then which adapter each row has -> the logits, of
# the last token of each row at least.
Call = Callable[[Mapping[str, np.ndarray], Memory], np.ndarray]


class ModelSession(ABC):
    """An open model.

    Attributes:
        runtime: what runs it, as people call it.
        device: its kind and its number.
        inputs: their names, without those of adapters; caches: those that are keys and values. outputs: their names.
        capacity: places that a cache in place has, where that is fixed. rows: of a call, at most; None: any number.
        adapters: those that its rows can have; None where it has one of its own.
    """

    runtime: str
    folder: Path
    settings: Settings
    device: tuple[str, int]
    inputs: Mapping[str, Any]
    outputs: Sequence[str]
    caches: Sequence[CachePort]
    adapters: Adapters | None
    capacity: int | None = None
    rows: int | None = None

    @abstractmethod
    def cache_memory(self, shape: tuple[int, ...], kind: type) -> CacheMemory:
        """Memory for a cache on the device.

        Raises:
            ModelError: the model does not read its caches there.
            Exception: the runtime's own, where there is not so much memory.
        """

    @abstractmethod
    def bound(self, caches: Mapping[str, Place]) -> Call:
        """Calls with the caches at these places, at both ends of the model."""

    @abstractmethod
    def run(self, output: str, feeds: Mapping[str, np.ndarray], names: Sequence[str | None]) -> np.ndarray:
        """One of the outputs, for rows with these adapters.

        Raises:
            ModelError: there are more of them than slots, others are at work in these, or one cannot be read; or the
                model cannot be run.
        """

    @property
    def slot_memory(self) -> Memory:
        """The inputs of the adapters' slots, where the model takes any."""
        return {} if self.adapters is None else self.adapters.memory

    def taken(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the model has inputs for."""
        return {name: value for name, value in feeds.items() if name in self.inputs}

    @contextmanager
    def rows_of(self, names: Sequence[str | None]) -> Iterator[Memory]:
        """Which adapter each row has, as the model is told, for rows with these adapters, which are in slots inside of
        the block."""
        slots: dict[str, int] = {}
        try:
            for name in {name for name in names if name is not None}:
                assert self.adapters is not None
                slot = self.adapters.take(self.adapters.find(name))
                if slot is None:
                    raise ModelError(f"{self.folder}: has {self.adapters.slots} slots, and others are at work in them.")
                slots[name] = slot
            rows = [NO_ADAPTER if name is None else slots[name] for name in names]
            yield {} if self.adapters is None else {ADAPTER: rows_adapter(rows)}
        finally:
            for slot in slots.values():
                assert self.adapters is not None
                self.adapters.give(slot)


def present_of(past: str) -> str:
    """The output that takes the place of an input that is a cache."""
    return past.replace("past_key_values", "present", 1)
