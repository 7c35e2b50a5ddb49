"""What the kinds of rows of texts share: lengths, padding, and which adapter each row has."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, NO_ADAPTER, Shelved, rows_adapter
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.model_session import ModelSession
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, NO_ADAPTER, Shelved, rows_adapter
    from failure import ModelError
    from model_session import ModelSession

MOST_SLOTS = 1024
# Tokens of padding in front of a text, at most.
MOST_PADDING = 16
# Places of a cache of a fixed length that no text fills: padding in front of it, and the next place of a row between
# those that a step is for.
SPARE_PLACES = MOST_PADDING + 1


class Slots(ABC):
    """A text generator's cache with a row for each of several texts.

    Args:
        slots: texts at a time. part: tokens that a row reads in one call, at most.
        most: tokens of prompt and answer together, at most; None: what the model takes.

    Attributes:
        lengths: tokens that each row holds.
        padding: tokens that may be in front of a text in a call, at most.
        runtime: what runs the model, as people call it.
    """

    def __init__(self, session: ModelSession, slots: int, part: int, most: int | None) -> None:
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
        self.runtime = session.runtime
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

    def try_out(self, row: int) -> None:
        """The least that a text asks of the model, in a row that is cleared before and behind it: a prompt of two
        tokens and a step, which an engine may run in contexts of their own.

        Raises:
            Exception: whatever the model raises. Then it fails for every text, or there is no memory at the moment.
        """
        self.clear(row)
        try:
            for count in (min(2, self.part), 1):
                self._run(range(row, row + 1), np.zeros((1, count), np.int64), np.array([count]))
                self.lengths[row] += count
        finally:
            self.clear(row)

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
        """Nothing that is left of a row's text reaches the next. Asks nothing of a GPU, which may have failed."""
        self._leave_adapter(row)
        self.lengths[row] = 0

    @abstractmethod
    def _run(self, rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The logits after tokens [rows, tokens], of the last of each at least; of a row the last `counts` are its
        text's, and what is before them is padding."""


def positions(lengths: np.ndarray, count: int) -> np.ndarray:
    """Of the last `count` tokens of texts of such `lengths`, int64 [rows, count]; padding has any."""
    return np.maximum(lengths[:, None] + np.arange(-count, 0), 0)
