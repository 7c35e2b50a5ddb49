"""Gives the calls of a growing cache to a graph that keeps its cache in place, so that both are judged by one set of
cases.

The buffers are longer than what they hold, or just long enough, and hold numbers of no meaning where nothing was
written. In every other call of one token the rows of the batch stand at places of their own: each without the padding
ahead of it. Rings are as short as they may be, but in every third call.
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
        skipped: how many of the caller's columns each row leaves out, int64 [batch].
    """

    feeds: Feeds
    given: Feeds
    skipped: np.ndarray

    def present(self, outputs: Feeds) -> Feeds:
        """`outputs` as the caller wants them: `present.*` [batch, kv heads, past + sequence, size]."""
        return {name: self._grown(name, v) if name.startswith("present.") else v for name, v in outputs.items()}

    def _grown(self, name: str, buffer: np.ndarray) -> np.ndarray:
        total = self.given["attention_mask"].shape[1]
        past = self.given[name.replace("present", "past_key_values", 1)]
        grown = np.empty((*past.shape[:2], total, past.shape[3]), buffer.dtype)
        for row, left_out in enumerate(self.skipped.tolist()):
            columns, rows = _held(left_out, total, buffer.shape[2])
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
    skipped = mask.argmax(axis=1) if odd and sequence == 1 else np.zeros(len(mask), np.int64)
    moved = np.zeros_like(mask)
    for row, left_out in enumerate(skipped):
        moved[row, : total - left_out] = mask[row, left_out:]
    feeds = {**given, "attention_mask": moved}
    capacity = capacity or total + (0 if odd else _SPARE)
    rings = {} if total % 3 == 0 else {name: window - 1 + sequence for name, window in (windows or {}).items()}
    for name, past in given.items():
        if name.startswith("past_key_values."):
            length = min(capacity, rings.get(name, capacity))
            feeds[name] = buffer = np.full((*past.shape[:2], length, past.shape[3]), _LEFT_OVER, past.dtype)
            for row, left_out in enumerate(skipped.tolist()):
                columns, rows = _held(left_out, past.shape[2], length)
                buffer[row][:, rows] = past[row][:, columns]
    return InPlaceCall(feeds, given, skipped)


def _held(left_out: int, columns: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the first `columns`, without those `left_out` ahead, a buffer of so many rows holds, and in which."""
    held = np.arange(max(left_out, columns - rows), columns)
    return held, (held - left_out) % rows
