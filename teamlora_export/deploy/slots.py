"""A text generator's cache with a row for each of several texts, which stand at places of their own.

`open_slots` gives the one that fits the model: `InPlaceSlots` where the model writes into buffers that it is given
(`DeviceSlots` where they are a GPU's), `GrowingSlots` where it gives back the past and what is new, as one. What a row
reads is the same, whoever shares its calls, but for rounding.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, NO_ADAPTER, Shelved, rows_adapter
    from teamlora_export.deploy.session import CAPACITY, NUMPY, ModelError, Session, bind_inputs, brief, present_of
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, NO_ADAPTER, Shelved, rows_adapter
    from session import CAPACITY, NUMPY, ModelError, Session, bind_inputs, brief, present_of

_LEAST_CAPACITY = 256
MOST_SLOTS = 1024
# Tokens of padding in front of a text, at most.
MOST_PADDING = 16
_MOST_BINDINGS = 64
# A GPU's fast kernels want rows of keys in such numbers.
_ALIGNED = 16
# The mark of a row that went elsewhere.
_GONE = -1


class Slots(ABC):
    """What both kinds share.

    Args:
        slots: texts at a time. part: tokens that a row reads in one call, at most.
        most: tokens of prompt and answer together, at most; None: what the model takes.

    Attributes:
        lengths: tokens that each row holds.
        padding: tokens that may be in front of a text in a call, at most.
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
        self.padding = MOST_PADDING if self.settings.padded else 0
        self._session = session
        # Where the model has each row's adapter, and those of texts that have no row yet.
        self._adapters = [NO_ADAPTER] * slots
        self._reserved: dict[Shelved, int] = {}

    def __del__(self) -> None:
        """Who stops in the middle of a text keeps no adapter from making room."""
        for row, slot in enumerate(getattr(self, "_adapters", ())):
            if slot != NO_ADAPTER:
                self._leave_adapter(row)
        for adapter in list(getattr(self, "_reserved", ())):
            self.release(adapter)

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

    def reserve(self, adapter: Shelved | None) -> bool:
        """A text that has no row yet is to have this adapter, which is read in the background; False: there is no room
        for it yet."""
        if adapter is None or adapter in self._reserved:
            return True
        assert self._session.adapters is not None
        slot = self._session.adapters.reserve(adapter)
        if slot is not None:
            self._reserved[adapter] = slot
        return slot is not None

    def idle_seconds(self) -> float:
        """For how long no text of this model has gone on, whosever it is."""
        return 0.0 if self._session.adapters is None else time.monotonic() - self._session.adapters.used

    def is_ready(self, adapter: Shelved | None) -> bool:
        """Whether an adapter that is reserved has been read.

        Raises:
            ModelError: it cannot be read; it is reserved no more.
        """
        if adapter is None:
            return True
        assert self._session.adapters is not None
        try:
            return self._session.adapters.is_filled(self._reserved[adapter])
        except ModelError:
            del self._reserved[adapter]
            raise

    def release(self, adapter: Shelved | None) -> None:
        """There will be no text of an adapter that may be reserved."""
        if adapter in self._reserved:
            assert self._session.adapters is not None
            self._session.adapters.give(self._reserved.pop(adapter))

    def equip(self, row: int, adapter: Shelved | None) -> bool:
        """The text that begins in a row is this adapter's, until the row is cleared; waits until it is read. False:
        there is no room for it yet.

        Raises:
            ModelError: it cannot be read.
        """
        if adapter is None:
            return True
        if not self.reserve(adapter):
            return False
        assert self._session.adapters is not None
        slot = self._reserved.pop(adapter)
        self._session.adapters.wait(slot)
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
        self._session.adapters.used = time.monotonic()
        return {ADAPTER: rows_adapter([self._adapters[row] for row in rows])}

    def read(self, row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Read more tokens of each text into the rows from `row` on; the logits of the last, float32 [texts,
        vocabulary].

        Texts that begin may have fewer tokens than others, by `padding` at most. Where it fails, the same call may be
        made again.
        """
        rows, counts = range(row, row + len(ids)), [len(some) for some in ids]
        longest = max(counts)
        if longest > self.part:
            raise ModelError(f"{longest} tokens in one call: give parts of {self.part}.")
        given = np.empty((len(ids), longest), np.int64)
        for into, some, each in zip(given, ids, rows, strict=True):
            padding = longest - len(some)
            if padding and (padding > self.padding or self.lengths[each]):
                raise ModelError(
                    f"{len(some)} tokens of a text beside {longest} of another's: this one takes no padding."
                )
            # A text's own first token in front of it: another may be what makes numbers that are none.
            into[:padding], into[padding:] = some[0], some
        logits = self._run(rows, given, np.array(counts))[:, -1].astype(np.float32, copy=False)
        for index, some in enumerate(ids):
            if len(some) < longest and not np.isfinite(logits[index].max()):
                logits[index] = self._read_alone(rows[index], some)
        for each, count in zip(rows, counts, strict=True):
            self.lengths[each] += count
        return logits

    def _read_alone(self, row: int, ids: Sequence[int]) -> np.ndarray:
        """A text that began behind padding and gave no number: some models make none of a token that sees nothing."""
        adapter, self._adapters[row] = self._adapters[row], NO_ADAPTER
        self.clear(row)
        self._adapters[row] = adapter
        alone = self._run(range(row, row + 1), np.array([ids], np.int64), np.array([len(ids)]))[0, -1]
        if np.isfinite(alone.max()):
            self.padding = 0
        return alone.astype(np.float32, copy=False)

    def swap(self, one: int, other: int) -> None:
        """Two texts exchange their rows."""
        self._adapters[one], self._adapters[other] = self._adapters[other], self._adapters[one]
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def clear(self, row: int) -> None:
        """Nothing is left of a row's text."""
        self._leave_adapter(row)
        self.lengths[row] = 0

    @abstractmethod
    def _run(self, rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The logits after tokens [rows, tokens], of the last of each at least; of a row the last `counts` are its
        text's, and what is before them is padding."""


def open_slots(session: Session, slots: int = 8, part: int = 256, most: int | None = None) -> Slots:
    """See `Slots`.

    Raises:
        ModelError: the model generates no text, `slots` or `part` are none, or there is not so much memory.
    """
    if not session.caches or not CAPACITY.fullmatch(str(session.caches[0].shape[2])):
        return GrowingSlots(session, slots, part, most)
    return (InPlaceSlots if session.device[0] == "cpu" else DeviceSlots)(session, slots, part, most)


class InPlaceSlots(Slots):
    """For each layer and kind there is one buffer [slots, heads, capacity, size], bound to both ends of the model: rows
    that are neighbours share a call. The capacity is that of the longest text; buffers are made anew when it is not
    enough, or far too much.
    """

    def __init__(self, session: Session, slots: int, part: int, most: int | None) -> None:
        super().__init__(session, slots, part, most)
        # Places that were ever written for each row: by calls that failed, some more.
        self._written = [0] * slots
        # Places of padding in front of each row's text.
        self._begins = [0] * slots
        self.capacity = 0
        named = {cache.name: CAPACITY.fullmatch(str(cache.shape[2])) for cache in session.caches}
        self._windows = {name: int(found[1]) for name, found in named.items() if found and found[1]}
        self._buffers = {cache.name: np.zeros(self._shape(cache, 0), NUMPY[cache.type]) for cache in session.caches}
        self._bindings: dict[tuple[int, int], Any] = {}

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
            "position_ids": _positions(lengths, ids.shape[1]),
        }
        binding = self._bound(rows.start, rows.stop)
        for name, value in self._session.taken(given).items():
            binding.bind_cpu_input(name, value)
        adapters = self._adapters_of(rows)
        bind_inputs(binding, adapters)
        self._session.onnx.run_with_iobinding(binding)
        # The first of the outputs, since it was bound first. Bound anew, it is not kept until the next call.
        logits = binding.get_outputs()[0].numpy()
        binding.bind_output("logits")
        return logits

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
        self._bindings.clear()
        self.capacity, self._written = capacity, self._ends()

    def _resized(self, cache: Any, capacity: int) -> np.ndarray:
        old = self._buffers[cache.name]
        new = np.zeros(self._shape(cache, capacity), old.dtype)
        for row, end in enumerate(self._ends()):
            # A ring that is shorter than its window and a part has not wrapped.
            kept = min(end, new.shape[2])
            new[row, :, :kept] = old[row, :, :kept]
        return new

    def _shape(self, cache: Any, capacity: int) -> tuple[int, ...]:
        # In a layer that sees a window, what is longer than the window and a part is a ring: the model writes over what
        # is not seen any more.
        places = min(capacity, self._windows.get(cache.name, capacity) - 1 + self.part)
        return self.slots, cache.shape[1], places, cache.shape[3]

    def _bound(self, start: int, stop: int) -> Any:
        """The rows of each buffer at both of its ends."""
        if (start, stop) not in self._bindings:
            if len(self._bindings) >= _MOST_BINDINGS:
                self._bindings.clear()
            binding = self._session.onnx.io_binding()
            binding.bind_output("logits")
            for cache in self._session.caches:
                first, shape = self._memory(cache.name)
                type_, rows = NUMPY[cache.type], (stop - start, *shape[1:])
                address = first + start * int(np.prod(shape[1:])) * np.dtype(type_).itemsize
                for bind, end in ((binding.bind_input, cache.name), (binding.bind_output, present_of(cache.name))):
                    bind(end, *self._session.device, type_, rows, address)
            bind_inputs(binding, self._session.slot_memory)
            self._bindings[start, stop] = binding
        return self._bindings[start, stop]

    def _memory(self, name: str) -> tuple[int, Sequence[int]]:
        """The address and the shape of a buffer."""
        return self._buffers[name].ctypes.data, self._buffers[name].shape


class DeviceSlots(InPlaceSlots):
    """The same in a GPU's memory. The buffers have room for the longest text from the start, and nothing in them is
    moved: rows exchange their numbers. A step goes over the rows between those that it is for, too, whose next place it
    fills with what is never read.
    """

    def __init__(self, session: Session, slots: int, part: int, most: int | None) -> None:
        import onnxruntime as ort

        super().__init__(session, slots, part, most)
        if self.settings.most is None:
            raise ModelError(f"{session.folder}: takes texts of any length. Say how long they are at most (capacity).")
        _require_memory(session)
        self.capacity = _aligned(self.settings.most + MOST_PADDING + 1)
        shapes = {cache.name: self._shape(cache, self.capacity) for cache in session.caches}
        try:
            self._values = {
                cache.name: ort.OrtValue.ortvalue_from_numpy(
                    np.zeros(shapes[cache.name], NUMPY[cache.type]), *session.device
                )
                for cache in session.caches
            }
        except Exception as error:
            needed = sum(
                int(np.prod(shapes[cache.name])) * np.dtype(NUMPY[cache.type]).itemsize for cache in session.caches
            )
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
        place = self._places[row]
        if place in self._spoilt:
            for value in self._values.values():
                numbers = value.numpy().copy()
                numbers[place] = 0
                value.update_inplace(numbers)
            self._spoilt.remove(place)
        self._begins[row] = 0
        Slots.clear(self, row)

    def _run(self, rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        longest = ids.shape[1]
        begins, lengths = self._with(rows, longest, counts)
        places = [self._places[row] for row in rows]
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

    def _shape(self, cache: Any, capacity: int) -> tuple[int, ...]:
        slots, heads, places, size = super()._shape(cache, capacity)
        return slots, heads, _aligned(places), size

    def _adapters_of(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Of rows of the buffers."""
        return super()._adapters_of([self._places.index(place) for place in rows])

    def _bound(self, start: int, stop: int) -> Any:
        adapters = self._session.adapters
        if adapters is not None and adapters.filled != self._filled:
            # Of a slot that ONNX Runtime reads elsewhere than on the device, it would have an old copy.
            self._filled = adapters.filled
            self._bindings.clear()
        return super()._bound(start, stop)

    def _memory(self, name: str) -> tuple[int, Sequence[int]]:
        return self._values[name].data_ptr(), self._values[name].shape()


def _aligned(places: int) -> int:
    return -(-places // _ALIGNED) * _ALIGNED


def _require_memory(session: Session) -> None:
    """Refuse a model that ONNX Runtime reads elsewhere than on the device: what is bound once would be copied once."""
    kind, number = session.device
    named = {"cpu": "Cpu", "cuda": "Cuda"}[kind]
    places = zip(session.onnx.get_inputs(), session.onnx.get_input_memory_infos(), strict=True)
    for value, memory in places:
        if value.name.startswith("past_key_values.") and (memory.name, memory.device_id) != (named, number):
            raise ModelError(
                f"{session.folder}: ONNX Runtime's provider for {kind} leaves {value.name} to the CPU. Use a newer "
                "one, or a model with a growing cache."
            )


@dataclass
class _Batch:
    """Rows whose keys and values are one array.

    Attributes:
        rows: in the array's order; a row that went elsewhere is `_GONE`.
        past: by the cache's name, ONNX Runtime's own values [rows, heads, longest, size], where the model runs; shorter
            rows begin with zeros, which are masked out.
    """

    rows: list[int]
    past: dict[str, Any]


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

    def _run(self, rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        batches = [self._together(some) for some in self._sharing(rows)]
        theirs = [[row - rows.start for row in batch.rows] for batch in batches]
        # All of them before the first has read: the same call may be made again.
        found = [self._step(batch, ids[own], counts[own]) for batch, own in zip(batches, theirs, strict=True)]
        logits = np.empty((len(rows), *found[0][0].shape[1:]), found[0][0].dtype)
        for batch, own, (given, past) in zip(batches, theirs, found, strict=True):
            logits[own], batch.past = given, past
        return logits

    def _sharing(self, rows: range) -> list[list[int]]:
        """Which of them can be one batch."""
        if self.settings.padded:
            return [list(rows)]
        by_length: dict[int, list[int]] = {}
        for row in rows:
            by_length.setdefault(self.lengths[row], []).append(row)
        return list(by_length.values())

    def _step(self, batch: _Batch, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """The logits of more tokens, [rows, tokens, vocabulary], and the past with them."""
        lengths = np.array([self.lengths[row] for row in batch.rows]) + counts
        end = next(iter(batch.past.values())).shape()[2] + ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": (np.arange(end) >= end - lengths[:, None]).astype(np.int64),
            "position_ids": _positions(lengths, ids.shape[1]),
        }
        binding = self._session.onnx.io_binding()
        for name, value in self._session.taken(given).items():
            binding.bind_cpu_input(name, value)
        adapters = {**self._session.slot_memory, **self._adapters_of(batch.rows)}
        bind_inputs(binding, adapters)
        binding.bind_output("logits")
        for name, past in batch.past.items():
            binding.bind_ortvalue_input(name, past)
            binding.bind_output(present_of(name), *self._session.device)
        self._session.onnx.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), dict(zip(batch.past, present, strict=True))

    def _together(self, rows: list[int]) -> _Batch:
        """The batch of exactly these rows."""
        import onnxruntime as ort

        for batch in self._batches:
            if sorted(batch.rows) == rows:
                return batch
        longest = max(self.lengths[row] for row in rows)
        past = {}
        for cache in self._session.caches:
            joined = np.zeros((len(rows), cache.shape[1], longest, cache.shape[3]), NUMPY[cache.type])
            for batch in self._batches:
                self._copy(batch, cache.name, rows, joined)
            past[cache.name] = ort.OrtValue.ortvalue_from_numpy(joined, *self._session.device)
        self._leave(rows)
        self._batches.append(_Batch(rows, past))
        return self._batches[-1]

    def _copy(self, batch: _Batch, name: str, rows: list[int], into: np.ndarray) -> None:
        """Those of a batch's rows that are asked for, to the end of theirs; nothing is there of a text that begins."""
        if set(rows).isdisjoint(batch.rows):
            return
        past = batch.past[name].numpy()
        for index, row in enumerate(batch.rows):
            if row in rows and (length := self.lengths[row]):
                into[rows.index(row), :, -length:] = past[index, :, -length:]

    def _leave(self, rows: Sequence[int]) -> None:
        for batch in self._batches:
            batch.rows = [_GONE if row in rows else row for row in batch.rows]
        self._batches = [batch for batch in self._batches if any(row != _GONE for row in batch.rows)]


def _positions(lengths: np.ndarray, count: int) -> np.ndarray:
    """Of the last `count` tokens of texts of such `lengths`, int64 [rows, count]; padding has any."""
    return np.maximum(lengths[:, None] + np.arange(-count, 0), 0)


def _neighbours(rows: Sequence[int]) -> list[range]:
    """Rows as ranges of neighbours."""
    found: list[range] = []
    for row in sorted(rows):
        if found and found[-1].stop == row:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found
