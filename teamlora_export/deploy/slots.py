"""A text generator's cache with a row for each of several texts, which stand at places of their own.

`open_slots` gives the one that fits the model: `InPlaceSlots` where the model writes into buffers that it is given,
`GrowingSlots` where it gives back the past and what is new, as one. What a row reads is the same, whoever shares its
calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, NO_ADAPTER, Shelved, rows_adapter
    from teamlora_export.deploy.session import CAPACITY, NUMPY, ModelError, Session, present_of
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, NO_ADAPTER, Shelved, rows_adapter
    from session import CAPACITY, NUMPY, ModelError, Session, present_of

_LEAST_CAPACITY = 256
MOST_SLOTS = 1024
# The mark of a row that went elsewhere.
_GONE = -1


class Slots(ABC):
    """What both kinds share.

    Args:
        slots: texts at a time. part: tokens that a row reads in one call, at most.
        most: tokens of prompt and answer together, at most; None: what the model takes.

    Attributes:
        lengths: tokens that each row holds.
    """

    def __init__(self, session: Session, slots: int, part: int, most: int | None) -> None:
        if not session.caches:
            raise ModelError(f"{session.folder}: does not generate text.")
        if not 1 <= slots <= MOST_SLOTS or part < 1:
            raise ModelError(
                f"{slots} slots, parts of {part}: give 1 to {MOST_SLOTS} slots, and parts of a token or more."
            )
        self.slots, self.part, self.settings = slots, part, session.settings
        if most is not None:
            self.settings = replace(self.settings, most=min(most, self.settings.most or most))
        self.lengths = [0] * slots
        self._session = session
        # Where the model has each row's adapter.
        self._adapters = [NO_ADAPTER] * slots

    def __del__(self) -> None:
        """Who stops in the middle of a text keeps no adapter from making room."""
        for row, slot in enumerate(getattr(self, "_adapters", ())):
            if slot != NO_ADAPTER:
                self._leave_adapter(row)

    def find_adapter(self, name: str | None) -> Shelved | None:
        """What that name stands for now; None stands for the model without an adapter.

        Raises:
            ModelError: there is none of that name.
        """
        if name is None:
            return None
        if self._session.adapters is None:
            raise ModelError(f"{self._session.folder}: has one adapter of its own, and no other ({name!r:.80}).")
        return self._session.adapters.find(name)

    def equip(self, row: int, adapter: Shelved | None) -> bool:
        """The text that begins in a row is this adapter's, until the row is cleared; False: there is no room for the
        adapter yet.

        Raises:
            ModelError: it cannot be read.
        """
        if adapter is not None:
            assert self._session.adapters is not None
            slot = self._session.adapters.take(adapter)
            if slot is None:
                return False
            self._adapters[row] = slot
        return True

    def _leave_adapter(self, row: int) -> None:
        if self._adapters[row] != NO_ADAPTER and self._session.adapters is not None:
            self._session.adapters.give(self._adapters[row])
        self._adapters[row] = NO_ADAPTER

    def _adapters_of(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """The model's input that says which adapter each row has, where it takes any."""
        if self._session.adapters is None:
            return {}
        return {ADAPTER: rows_adapter([self._adapters[row] for row in rows])}

    def read(self, row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Read more tokens, [texts, tokens], into the rows from `row` on; the logits of the last, float32 [texts,
        vocabulary].

        Where it fails, the same call may be made again.
        """
        given = np.array(ids, np.int64)
        if given.shape[1] > self.part:
            raise ModelError(f"{given.shape[1]} tokens in one call: give parts of {self.part}.")
        rows = range(row, row + len(ids))
        logits = self._run(rows, given)
        for each in rows:
            self.lengths[each] += given.shape[1]
        return logits[:, -1].astype(np.float32, copy=False)

    def swap(self, one: int, other: int) -> None:
        """Two texts exchange their rows."""
        self._adapters[one], self._adapters[other] = self._adapters[other], self._adapters[one]
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def clear(self, row: int) -> None:
        """Nothing is left of a row's text."""
        self._leave_adapter(row)
        self.lengths[row] = 0

    @abstractmethod
    def _run(self, rows: range, ids: np.ndarray) -> np.ndarray:
        """The logits after tokens [rows, tokens], of the last of each at least."""


def open_slots(session: Session, slots: int = 8, part: int = 256, most: int | None = None) -> Slots:
    """See `Slots`.

    Raises:
        ModelError: the model generates no text, or `slots` or `part` are none.
    """
    in_place = session.caches and CAPACITY.fullmatch(str(session.caches[0].shape[2]))
    return (InPlaceSlots if in_place else GrowingSlots)(session, slots, part, most)


class InPlaceSlots(Slots):
    """For each layer and kind there is one buffer [slots, heads, capacity, size], bound to both ends of the model: rows
    that are neighbours share a call. The capacity is that of the longest text; buffers are made anew when it is not
    enough, or far too much.
    """

    def __init__(self, session: Session, slots: int, part: int, most: int | None) -> None:
        super().__init__(session, slots, part, most)
        # Places that were ever written for each row: by calls that failed, some more.
        self._written = [0] * slots
        self.capacity = 0
        named = {cache.name: CAPACITY.fullmatch(str(cache.shape[2])) for cache in session.caches}
        self._windows = {name: int(found[1]) for name, found in named.items() if found and found[1]}
        self._buffers = {c.name: np.zeros((slots, c.shape[1], 0, c.shape[3]), NUMPY[c.type]) for c in session.caches}
        self._bindings: dict[tuple[int, int], Any] = {}

    def swap(self, one: int, other: int) -> None:
        used = max(self._written[one], self._written[other])
        for buffer in self._buffers.values():
            buffer[[one, other], :, :used] = buffer[[other, one], :, :used]
        self._written[one], self._written[other] = self._written[other], self._written[one]
        super().swap(one, other)

    def clear(self, row: int) -> None:
        # A number in it that is none would reach the next text, even masked out.
        for buffer in self._buffers.values():
            buffer[row, :, : self._written[row]] = 0
        self._written[row] = 0
        super().clear(row)

    def _run(self, rows: range, ids: np.ndarray) -> np.ndarray:
        count = ids.shape[1]
        ends = np.array(self.lengths[rows.start : rows.stop], np.int64) + count
        self._fit(max(*self.lengths, *ends.tolist()))
        for row, end in zip(rows, ends.tolist(), strict=True):
            self._written[row] = max(self._written[row], end)
        given = {
            "input_ids": ids,
            "attention_mask": (np.arange(ends.max()) < ends[:, None]).astype(np.int64),
            "position_ids": ends[:, None] + np.arange(-count, 0),
        }
        binding = self._bound(rows.start, rows.stop)
        for name, value in self._session.taken(given).items():
            binding.bind_cpu_input(name, value)
        adapters = self._adapters_of(rows)
        _bind_inputs(binding, adapters)
        # Its size is the call's. It is the first of the outputs, since it was bound first.
        binding.bind_output("logits")
        self._session.onnx.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    def _fit(self, needed: int) -> None:
        """Make the buffers long enough, and not much longer: a step's time grows with them."""
        if needed > self.capacity:
            most = max(needed, self.settings.most or needed)
            self._resize(min(max(needed, self.capacity * 5 // 4, _LEAST_CAPACITY), most))
        elif self.capacity > max(4 * needed, _LEAST_CAPACITY):
            self._resize(max(2 * needed, _LEAST_CAPACITY))

    def _resize(self, capacity: int) -> None:
        # All of them before the first takes its place: there may not be enough memory.
        self._buffers = {name: self._resized(name, capacity) for name in self._buffers}
        self._bindings.clear()
        self.capacity, self._written = capacity, list(self.lengths)

    def _resized(self, name: str, capacity: int) -> np.ndarray:
        old = self._buffers[name]
        # In a layer that sees a window, what is longer than the window and a part is a ring: the model writes over what
        # is not seen any more. One that is shorter than that is as long as the longest text, and has not wrapped.
        places = min(capacity, self._windows.get(name, capacity) - 1 + self.part)
        new = np.zeros((self.slots, old.shape[1], places, old.shape[3]), old.dtype)
        for row, length in enumerate(self.lengths):
            kept = min(length, places)
            new[row, :, :kept] = old[row, :, :kept]
        return new

    def _bound(self, start: int, stop: int) -> Any:
        """The rows of each buffer at both of its ends."""
        if (start, stop) not in self._bindings:
            binding = self._session.onnx.io_binding()
            binding.bind_output("logits")
            for name, buffer in self._buffers.items():
                rows = buffer[start:stop]
                for bind, end in ((binding.bind_input, name), (binding.bind_output, present_of(name))):
                    bind(end, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
            _bind_inputs(binding, self._session.slot_memory)
            self._bindings[start, stop] = binding
        return self._bindings[start, stop]


def _bind_inputs(binding: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Where they are, which must outlive the call. `bind_cpu_input` does not know inputs that have a default (ONNX
    Runtime 1.32)."""
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


@dataclass
class _Batch:
    """Rows whose keys and values are one array.

    Attributes:
        rows: in the array's order; a row that went elsewhere is `_GONE`.
        past: by the cache's name, [rows, heads, longest, size]; shorter rows begin with zeros, which are masked out.
    """

    rows: list[int]
    past: dict[str, np.ndarray]


class GrowingSlots(Slots):
    """Rows that share a call stay one batch, for as long as the same ones share the next: then the model's own copy of
    the past is the only one. Where the model takes no padding, rows of other lengths are batches of their own.
    """

    def __init__(self, session: Session, slots: int, part: int, most: int | None) -> None:
        super().__init__(session, slots, part, most)
        self._batches: list[_Batch] = []

    def swap(self, one: int, other: int) -> None:
        names = {one: other, other: one}
        for batch in self._batches:
            batch.rows = [names.get(row, row) for row in batch.rows]
        super().swap(one, other)

    def clear(self, row: int) -> None:
        self._leave([row])
        super().clear(row)

    def _run(self, rows: range, ids: np.ndarray) -> np.ndarray:
        batches = [self._together(some) for some in self._sharing(rows)]
        # All of them before the first has read: the same call may be made again.
        found = [self._step(batch, ids[[row - rows.start for row in batch.rows]]) for batch in batches]
        logits = np.empty((len(rows), *found[0][0].shape[1:]), found[0][0].dtype)
        for batch, (given, past) in zip(batches, found, strict=True):
            logits[[row - rows.start for row in batch.rows]], batch.past = given, past
        return logits

    def _sharing(self, rows: range) -> list[list[int]]:
        """Which of them can be one batch."""
        if self.settings.padded:
            return [list(rows)]
        by_length: dict[int, list[int]] = {}
        for row in rows:
            by_length.setdefault(self.lengths[row], []).append(row)
        return list(by_length.values())

    def _step(self, batch: _Batch, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The logits of more tokens, [rows, tokens, vocabulary], and the past with them."""
        lengths, count = np.array([self.lengths[row] for row in batch.rows])[:, None], ids.shape[1]
        longest = next(iter(batch.past.values())).shape[2]
        given = {
            "input_ids": ids,
            "attention_mask": (np.arange(longest + count) >= longest - lengths).astype(np.int64),
            "position_ids": lengths + np.arange(count),
        }
        outputs = ["logits", *map(present_of, batch.past)]
        adapters = self._session.slot_memory | self._adapters_of(batch.rows)
        logits, *present = self._session.onnx.run(outputs, {**self._session.taken(given), **batch.past, **adapters})
        return logits, dict(zip(batch.past, present, strict=True))

    def _together(self, rows: list[int]) -> _Batch:
        """The batch of exactly these rows."""
        for batch in self._batches:
            if sorted(batch.rows) == rows:
                return batch
        longest = max(self.lengths[row] for row in rows)
        past = {}
        for cache in self._session.caches:
            joined = np.zeros((len(rows), cache.shape[1], longest, cache.shape[3]), NUMPY[cache.type])
            for into, row in zip(joined, rows, strict=True):
                into[:, longest - self.lengths[row] :] = self._past_of(row, cache.name)
            past[cache.name] = joined
        self._leave(rows)
        self._batches.append(_Batch(rows, past))
        return self._batches[-1]

    def _past_of(self, row: int, name: str) -> np.ndarray | float:
        """[heads, tokens, size]; nothing is there yet of a text that begins."""
        found = next((batch for batch in self._batches if row in batch.rows), None)
        if found is None:
            return 0.0
        past = found.past[name][found.rows.index(row)]
        return past[:, past.shape[1] - self.lengths[row] :]

    def _leave(self, rows: Sequence[int]) -> None:
        for batch in self._batches:
            batch.rows = [_GONE if row in rows else row for row in batch.rows]
        self._batches = [batch for batch in self._batches if any(row != _GONE for row in batch.rows)]
