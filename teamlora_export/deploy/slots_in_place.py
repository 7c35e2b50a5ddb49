"""Rows of texts whose keys and values are in buffers that the model is given, and writes into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.model_session import CAPACITY, SLOT_TYPES, CachePort, Call, ModelSession
    from teamlora_export.deploy.slots_base import Slots, positions
else:
    # Deployed: the files lie beside one another.
    from model_session import CAPACITY, SLOT_TYPES, CachePort, Call, ModelSession
    from slots_base import Slots, positions

_LEAST_CAPACITY = 256
_MOST_CALLS = 64


class InPlaceSlots(Slots):
    """For each layer and kind there is one buffer [slots, heads, capacity, size], bound to both ends of the model: rows
    that are neighbours share a call. The capacity is that of the longest text; buffers are made anew when it is not
    enough, or far too much.
    """

    def __init__(self, session: ModelSession, slots: int, part: int, most: int | None) -> None:
        super().__init__(session, slots, part, most)
        # Places that were ever written for each row: by calls that failed, some more.
        self._written = [0] * slots
        # Places of padding in front of each row's text.
        self._begins = [0] * slots
        self.capacity = 0
        named = {cache.name: CAPACITY.fullmatch(str(cache.shape[2])) for cache in session.caches}
        self._windows = {name: int(found[1]) for name, found in named.items() if found and found[1]}
        self._buffers: dict[str, np.ndarray] = {
            cache.name: np.zeros(self._shape(cache, 0), SLOT_TYPES[cache.type]) for cache in session.caches
        }
        self._calls: dict[tuple[int, int], Call] = {}

    def swap(self, one: int, other: int) -> None:
        used = max(self._written[one], self._written[other])
        for buffer in self._buffers.values():
            buffer[[one, other], :, :used] = buffer[[other, one], :, :used]
        for places in (self._written, self._begins):
            places[one], places[other] = places[other], places[one]
        super().swap(one, other)

    def clear(self, row: int) -> None:
        # A number in it that is none would reach the next text, even masked out.
        for buffer in self._buffers.values():
            buffer[row, :, : self._written[row]] = 0
        self._written[row] = self._begins[row] = 0
        super().clear(row)

    def _run(self, rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        begins, lengths = self._with(rows, ids.shape[1], counts)
        ends = (begins + lengths).tolist()
        self._fit(max(*self._ends(), *ends), max(*self._begins, *begins.tolist()))
        for row, end in zip(rows, ends, strict=True):
            self._written[row] = max(self._written[row], end)
        logits = self._call(rows, ids, begins, lengths)
        self._begins[rows.start : rows.stop] = begins.tolist()
        return logits

    def _with(self, rows: range, longest: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The padding and the tokens of each text after a call of `longest` tokens, `counts` of which are its own."""
        begins = np.array([self._begins[row] for row in rows]) + longest - counts
        return begins, np.array([self.lengths[row] for row in rows]) + counts

    def _call(self, rows: range, ids: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The logits of a call for some rows of the buffers, whose padding and texts are then so long."""
        ends = begins + lengths
        places = np.arange(ends.max())
        given = {
            "input_ids": ids,
            "attention_mask": ((begins[:, None] <= places) & (places < ends[:, None])).astype(np.int64),
            "position_ids": positions(lengths, ids.shape[1]),
        }
        return self._bound(rows.start, rows.stop)(self._session.taken(given), self._adapters_of(rows))

    def _ends(self) -> list[int]:
        """One past the last place of each row's text."""
        return [begin + length for begin, length in zip(self._begins, self.lengths, strict=True)]

    def _fit(self, needed: int, padding: int) -> None:
        """Make the buffers long enough, and not much longer: a step's time grows with them.

        Args:
            padding: in front of some text, at most.
        """
        if needed > self.capacity:
            most = max(needed, (self.settings.most or needed) + padding)
            self._resize(min(max(needed, self.capacity * 5 // 4, _LEAST_CAPACITY), most))
        elif self.capacity > max(4 * needed, _LEAST_CAPACITY):
            self._resize(max(2 * needed, _LEAST_CAPACITY))

    def _resize(self, capacity: int) -> None:
        # All of them before the first takes its place: there may not be enough memory.
        self._buffers = {cache.name: self._resized(cache, capacity) for cache in self._session.caches}
        self._calls.clear()
        self.capacity, self._written = capacity, self._ends()

    def _resized(self, cache: CachePort, capacity: int) -> np.ndarray:
        old = self._buffers[cache.name]
        new = np.zeros(self._shape(cache, capacity), old.dtype)
        for row, end in enumerate(self._ends()):
            # A ring that is shorter than its window and a part has not wrapped.
            kept = min(end, new.shape[2])
            new[row, :, :kept] = old[row, :, :kept]
        return new

    def _shape(self, cache: CachePort, capacity: int) -> tuple[int, ...]:
        # In a layer that sees a window, what is longer than the window and a part is a ring: the model writes over what
        # is not seen any more.
        places = min(capacity, self._windows.get(cache.name, capacity) - 1 + self.part)
        return self.slots, cache.shape[1], places, cache.shape[3]

    def _bound(self, start: int, stop: int) -> Call:
        """The rows of each buffer at both of its ends."""
        if (start, stop) not in self._calls:
            if len(self._calls) >= _MOST_CALLS:
                self._calls.clear()
            places = {}
            for cache in self._session.caches:
                first, shape = self._memory(cache.name)
                kind = SLOT_TYPES[cache.type]
                address = first + start * int(np.prod(shape[1:])) * np.dtype(kind).itemsize
                places[cache.name] = (address, (stop - start, *shape[1:]), kind)
            self._calls[start, stop] = self._session.bound(places)
        return self._calls[start, stop]

    def _memory(self, name: str) -> tuple[int, Sequence[int]]:
        """The address and the shape of a buffer."""
        return self._buffers[name].ctypes.data, self._buffers[name].shape
