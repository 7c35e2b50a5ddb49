"""Rows of texts in a GPU's memory. They have not yet run on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.model_session import SLOT_TYPES, CachePort, Call, ModelSession
    from teamlora_export.deploy.slots_base import SPARE_PLACES, Slots
    from teamlora_export.deploy.slots_in_place import InPlaceSlots
else:
    # Deployed: the files lie beside one another.
    from failure import ModelError, brief
    from model_session import SLOT_TYPES, CachePort, Call, ModelSession
    from slots_base import SPARE_PLACES, Slots
    from slots_in_place import InPlaceSlots

# A GPU's fast kernels want rows of keys in such numbers.
_ALIGNED = 16


class DeviceSlots(InPlaceSlots):
    """The same in a GPU's memory. The buffers have room for the longest text from the start, and nothing in them is
    moved: rows exchange their numbers. A step goes over the rows between those that it is for, too, whose next place it
    fills with what is never read. What may be no number is wiped when the next text begins in its place.
    """

    def __init__(self, session: ModelSession, slots: int, part: int, most: int | None) -> None:
        super().__init__(session, slots, part, most)
        if session.rows is not None and slots > session.rows:
            raise ModelError(f"{session.folder}: takes {session.rows} texts at a time, not {slots}.")
        if session.capacity is not None:
            room = session.capacity - SPARE_PLACES
            if room < 1:
                raise ModelError(f"{session.folder}: its cache has {session.capacity} places, which is too few.")
            self.settings = replace(self.settings, most=min(self.settings.most or room, room))
        if self.settings.most is None:
            raise ModelError(f"{session.folder}: takes texts of any length. Say how long they are at most (capacity).")
        self.capacity = session.capacity or _aligned(self.settings.most + SPARE_PLACES)
        kinds = {cache.name: SLOT_TYPES[cache.type] for cache in session.caches}
        shapes = {cache.name: self._shape(cache, self.capacity) for cache in session.caches}
        try:
            self._values = {name: session.cache_memory(shapes[name], kind) for name, kind in kinds.items()}
        except ModelError:
            raise
        except Exception as error:
            needed = sum(int(np.prod(shapes[name])) * np.dtype(kind).itemsize for name, kind in kinds.items())
            raise ModelError(
                f"{session.folder}: no {needed >> 20} MiB of {session.device[0]} memory for {slots} texts of "
                f"{self.settings.most} tokens ({brief(error)}). Take fewer slots or a smaller capacity."
            ) from None
        # Where the text of each row lies.
        self._places = list(range(slots))
        # Rows of the buffers that may hold what is no number.
        self._spoilt: set[int] = set()
        # Of the adapters' slots, when the bindings were made.
        self._filled = 0

    def swap(self, one: int, other: int) -> None:
        for held in (self._places, self._begins):
            held[one], held[other] = held[other], held[one]
        Slots.swap(self, one, other)

    def clear(self, row: int) -> None:
        self._begins[row] = 0
        Slots.clear(self, row)

    def _run(self, rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        longest = ids.shape[1]
        begins, lengths = self._with(rows, longest, counts)
        places = [self._places[row] for row in rows]
        self._wipe([place for row, place in zip(rows, places, strict=True) if self.lengths[row] == 0])
        # As the buffers' rows lie; those that this is not for get another token, in the place of their next.
        all_ids = np.full((self.slots, longest), ids[0, -1], np.int64)
        all_begins, all_lengths = np.zeros(self.slots, np.int64), np.zeros(self.slots, np.int64)
        all_begins[self._places], all_lengths[self._places] = self._begins, np.array(self.lengths) + longest
        all_ids[places], all_begins[places], all_lengths[places] = ids, begins, lengths
        found: dict[int, np.ndarray] = {}
        for some in [range(min(places), max(places) + 1)] if longest == 1 else _neighbours(places):
            part, before = slice(some.start, some.stop), set(self._spoilt)
            self._spoilt.update(some)
            logits = self._call(some, all_ids[part], all_begins[part], all_lengths[part])
            whole = {place for place, row in zip(some, logits, strict=True) if np.isfinite(row[-1].max())}
            self._spoilt -= whole - before
            found.update(zip(some, logits, strict=True))
        self._begins[rows.start : rows.stop] = begins.tolist()
        return np.stack([found[place] for place in places])

    def _wipe(self, places: Sequence[int]) -> None:
        """A number in them that is none would reach the next text, even masked out."""
        for place in self._spoilt.intersection(places):
            for value in self._values.values():
                value.clear(place)
            self._spoilt.remove(place)

    def _shape(self, cache: CachePort, capacity: int) -> tuple[int, ...]:
        slots, heads, places, size = super()._shape(cache, capacity)
        return slots, heads, places if self._session.capacity else _aligned(places), size

    def _adapters_of(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Of rows of the buffers."""
        return super()._adapters_of([self._places.index(place) for place in rows])

    def _bound(self, start: int, stop: int) -> Call:
        adapters = self._session.adapters
        if adapters is not None and adapters.filled != self._filled:
            # Of a slot that ONNX Runtime reads elsewhere than on the device, it would have an old copy.
            self._filled = adapters.filled
            self._calls.clear()
        return super()._bound(start, stop)

    def _memory(self, name: str) -> tuple[int, Sequence[int]]:
        return self._values[name].address, self._values[name].shape


def _aligned(places: int) -> int:
    return -(-places // _ALIGNED) * _ALIGNED


def _neighbours(rows: Sequence[int]) -> list[range]:
    """Rows as ranges of neighbours."""
    found: list[range] = []
    for row in sorted(rows):
        if found and found[-1].stop == row:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found
