"""Rows of texts of a model that gives back the past and what is new, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.model_session import NUMPY, present_of
    from teamlora_export.deploy.session import Session, bind_inputs
    from teamlora_export.deploy.slots_base import Slots, positions
else:
    # Deployed: the files lie beside one another.
    from model_session import NUMPY, present_of
    from session import Session, bind_inputs
    from slots_base import Slots, positions

# The mark of a row that went elsewhere.
_GONE = -1


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
        self._onnx = session.onnx
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
            "position_ids": positions(lengths, ids.shape[1]),
        }
        binding = self._onnx.io_binding()
        for name, value in self._session.taken(given).items():
            binding.bind_cpu_input(name, value)
        adapters = {**self._session.slot_memory, **self._adapters_of(batch.rows)}
        bind_inputs(binding, adapters)
        binding.bind_output("logits")
        for name, past in batch.past.items():
            binding.bind_ortvalue_input(name, past)
            binding.bind_output(present_of(name), *self._session.device)
        self._onnx.run_with_iobinding(binding)
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
