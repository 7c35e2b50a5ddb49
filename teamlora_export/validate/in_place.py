"""Gives the calls of a growing cache to a graph that keeps its cache in place, so that both are judged by one set of
cases.

The buffers are longer than what they hold, or just long enough, and hold numbers of no meaning where nothing was
written. In every other call of one token the rows of the batch stand at places of their own: each without the padding
ahead of it. Rings are mostly as short as they may be, and where a window is wider than the text, some prompts begin far
enough from place zero that it goes around the end of the ring all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from teamlora_export.validate.cases import Feeds

# What an unused place holds: finite, since even what is not seen is multiplied by zero, and far from any key.
_LEFT_OVER = 1000.0
_SPARE = 5


@dataclass(frozen=True)
class InPlaceCall:
    """One call, as the graph takes it.

    Attributes:
        feeds: what the graph is fed with; the cache is [batch, kv heads, rows, size].
        given: what the caller gave; the cache is [batch, kv heads, past, size].
        starts: the place of the caller's first column in each row, int64 [batch]; columns of places below zero are left
            out.
    """

    feeds: Feeds
    given: Feeds
    starts: np.ndarray

    def present(self, outputs: Feeds) -> Feeds:
        """`outputs` as the caller wants them: `present.*` [batch, kv heads, past + sequence, size]."""
        return {name: self._grown(name, v) if name.startswith("present.") else v for name, v in outputs.items()}

    def _grown(self, name: str, buffer: np.ndarray) -> np.ndarray:
        total = self.given["attention_mask"].shape[1]
        past = self.given[name.replace("present", "past_key_values", 1)]
        grown = np.empty((*past.shape[:2], total, past.shape[3]), buffer.dtype)
        for row, start in enumerate(self.starts.tolist()):
            columns, rows = _held(start, total, buffer.shape[2])
            grown[row][:, columns] = buffer[row][:, rows]
            grown[row][:, : columns[0]] = past[row][:, : columns[0]]
        return grown


def in_place_call(given: Feeds, windows: Mapping[str, int] | None = None, capacity: int | None = None) -> InPlaceCall:
    """The call that means the same as that of a growing cache with `given`.

    Args:
        windows: of the caches whose buffers may be rings, how many tokens a token sees.
        capacity: of the buffers, where it is fixed.
    """
    mask = given["attention_mask"]
    total, sequence = mask.shape[1], given["input_ids"].shape[1]
    odd = total % 2 == 1
    rings = {name: window - 1 + sequence for name, window in (windows or {}).items()}
    starts = np.zeros(len(mask), np.int64)
    if odd and sequence == 1:
        starts -= mask.argmax(axis=1)
    elif odd and rings and mask[:, -1].all():
        starts += max(0, max(rings.values()) - total // 2)
    moved = np.zeros((len(mask), total + max(0, *starts)), np.int64)
    for row, start in enumerate(starts.tolist()):
        moved[row, max(0, start) : total + start] = mask[row, max(0, -start) :]
    feeds = {**given, "attention_mask": moved}
    capacity = capacity or moved.shape[1] + (0 if odd else _SPARE)
    for name, past in given.items():
        if name.startswith("past_key_values."):
            length = capacity if total % 3 == 0 else min(capacity, rings.get(name, capacity))
            feeds[name] = buffer = np.full((*past.shape[:2], length, past.shape[3]), _LEFT_OVER, past.dtype)
            for row, start in enumerate(starts.tolist()):
                columns, rows = _held(start, past.shape[2], length)
                buffer[row][:, rows] = past[row][:, columns]
    return InPlaceCall(feeds, given, starts)


def _held(start: int, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the first `columns` a buffer of so many rows holds, and in which of these, where the first column stands
    in the place `start`."""
    held = np.arange(max(0, -start, columns - rows), columns)
    return held, (held + start) % rows
