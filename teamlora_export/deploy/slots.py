"""A text generator whose cache has a row for each of several texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.runner import CAPACITY, NUMPY, Model, ModelError, present_of
else:
    # Deployed: the files lie beside one another.
    from runner import CAPACITY, NUMPY, Model, ModelError, present_of

_LEAST_CAPACITY = 256
_MOST_SLOTS = 1024


class SlotModel(Model):
    """A text generator whose cache has a row for each of several texts, which stand at places of their own.

    For each layer and kind there is one buffer [slots, heads, capacity, size], bound to both ends of the model: rows
    that are neighbours share a call. The capacity is that of the longest text; buffers are made anew when it is not
    enough, or far too much.

    Args:
        slots: texts at a time. part: tokens that a row reads in one call, at most.
        most: tokens of prompt and answer together, at most; None: what the model takes.
        folder, library, check, threads: see `Model`.
    """

    def __init__(
        self,
        folder: Path,
        library: Path | None = None,
        check: bool = True,
        threads: int = 0,
        *,
        slots: int = 8,
        part: int = 256,
        most: int | None = None,
    ) -> None:
        super().__init__(folder, library, check, threads)
        named = {cache.name: CAPACITY.fullmatch(str(cache.shape[2])) for cache in self._caches}
        if not named or not all(named.values()):
            raise ModelError(f"{self.folder}: keeps no cache in place. Export it with --cache in-place.")
        if not 1 <= slots <= _MOST_SLOTS or part < 1:
            raise ModelError(
                f"{slots} slots, parts of {part}: give 1 to {_MOST_SLOTS} slots, and parts of a token or more."
            )
        if most is not None:
            self._settings = replace(self._settings, most=min(most, self._settings.most or most))
        self.settings, self.slots, self.part = self._settings, slots, part
        # Tokens that each row holds, and places that were ever written for them: by calls that failed, some more.
        self.lengths, self._written = [0] * slots, [0] * slots
        self.capacity = 0
        self._windows = {name: int(found[1]) for name, found in named.items() if found and found[1]}
        self._buffers = {c.name: np.zeros((slots, c.shape[1], 0, c.shape[3]), NUMPY[c.type]) for c in self._caches}
        self._bindings: dict[tuple[int, int], Any] = {}

    def read(self, row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Read more tokens, [texts, tokens], into the rows from `row` on; the logits of the last, float32 [texts,
        vocabulary].

        Where it fails, the same call may be made again.
        """
        rows, count = slice(row, row + len(ids)), len(ids[0])
        ends = np.array(self.lengths[rows], np.int64) + count
        self._fit(max(*self.lengths, *ends.tolist()))
        self._written[rows] = np.maximum(self._written[rows], ends).tolist()
        given = {
            "input_ids": np.array(ids, np.int64),
            "attention_mask": (np.arange(ends.max()) < ends[:, None]).astype(np.int64),
            "position_ids": ends[:, None] + np.arange(-count, 0),
        }
        binding = self._bound(rows.start, rows.stop)
        for name, value in given.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        # Its size is the call's. It is the first of the outputs, since it was bound first.
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        self.lengths[rows] = ends.tolist()
        return binding.get_outputs()[0].numpy()[:, -1].astype(np.float32, copy=False)

    def swap(self, one: int, other: int) -> None:
        """Two texts exchange their rows."""
        used = max(self._written[one], self._written[other])
        for buffer in self._buffers.values():
            buffer[[one, other], :, :used] = buffer[[other, one], :, :used]
        for numbers in (self.lengths, self._written):
            numbers[one], numbers[other] = numbers[other], numbers[one]

    def clear(self, row: int) -> None:
        """Nothing is left of a row's text: a number in it that is none would reach the next one, even masked out."""
        for buffer in self._buffers.values():
            buffer[row, :, : self._written[row]] = 0
        self.lengths[row] = self._written[row] = 0

    def _fit(self, needed: int) -> None:
        """Make the buffers long enough, and not much longer: a step's time grows with them."""
        if needed > self.capacity:
            most = max(needed, self._settings.most or needed)
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
            binding = self._session.io_binding()
            binding.bind_output("logits")
            for name, buffer in self._buffers.items():
                rows = buffer[start:stop]
                for bind, end in ((binding.bind_input, name), (binding.bind_output, present_of(name))):
                    bind(end, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
            self._bindings[start, stop] = binding
        return self._bindings[start, stop]
