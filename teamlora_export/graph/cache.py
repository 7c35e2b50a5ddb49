"""The KV cache in place: one buffer for each layer, into which a call writes the rows of its own tokens.

As traced otherwise, a cache grows: every call gives back the past and what is new, copied into one. Here
`past_key_values.N.*` and `present.N.*` have one shape, [batch, kv heads, capacity, size], and may be one buffer, since
the one thing that is done to it is `TensorScatter` (opset 24), which writes in place where both ends are bound to it.

Where a row of the batch writes, and what it sees, follow from `attention_mask` [batch, total], total <= capacity:

    end     of a row     one past the last place that its mask names
    place   of a token   the call's tokens stand in the places before the end: end - sequence and on
    seen    by a token   the places up to its own that the mask names

So the call of a growing cache means the same here (past + sequence columns; padding on the left, or on the right where
the cache is empty), and rows of one batch may stand at different places as well: their masks end with zeros.
What a buffer holds in places that the mask does not name is never seen, but it must be finite.

A layer with a sliding window needs no more than that: its buffers are rings of R rows, [batch, kv heads, R, size], and
the token at place p stands in row p mod R. R is the caller's, `min(total, window - 1 + sequence)` at least in every
call; what is longer than the text never wraps, so that a ring is then a buffer like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from teamlora_export.graph import op
from teamlora_export.graph.record import keys_and_values


@dataclass(frozen=True)
class Ring:
    """Whose tokens the rows of a layer's buffers hold at the end of a call.

    Attributes:
        places: int64 [batch, rows], below zero where nothing was written yet.
        window: how many tokens a token sees at most, itself among them.
    """

    places: Tensor
    window: int


class InPlaceLayer(CacheLayerMixin):
    """The buffers of one layer, [batch, kv heads, capacity, size], during a call that writes rows from `places` on
    (int64 [batch]); rings where there is a `window`."""

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor, length: int, window: int | None = None) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._places, self._length, self._window = places, length, window
        # By this models find the layers of which a mask asks for the sizes.
        self.is_sliding = window is not None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = _scatter(self.keys, key_states, self._places, self.is_sliding)
        self.values = _scatter(self.values, value_states, self._places, self.is_sliding)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """How many rows there are, and the place of the first, or what each holds (`attention.py`)."""
        assert self.keys is not None
        rows = self.keys.shape[2]
        if self._window is None:
            return rows, 0
        return rows, Ring(places_in_ring(self._places + query_length - 1, rows), self._window)

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the buffers are inputs")


class InPlaceCache(Cache):
    """The buffers of all layers, and the place of the first token of each row.

    Args:
        windows: of each layer: how many tokens a token sees at most; None: all.
    """

    def __init__(
        self, buffers: DynamicCache, windows: Sequence[int | None], attention_mask: Tensor, sequence: int
    ) -> None:
        self.places = first_places(attention_mask, sequence)
        length = attention_mask.shape[1] - sequence
        layers = zip(keys_and_values(buffers), windows, strict=True)
        super().__init__([InPlaceLayer(*ends, self.places, length, window) for ends, window in layers])

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Broadcast against positions [batch, 1, sequence, 1] of queries (`attention.py`)."""
        return self.places.view(-1, 1, 1, 1)

    def buffers(self) -> DynamicCache:
        """What the call made of the buffers."""
        cache = DynamicCache()
        for keys, values in keys_and_values(self):
            written = DynamicLayer()
            written.keys, written.values, written.is_initialized = keys, values, True
            cache.layers.append(written)
        return cache


def first_places(attention_mask: Tensor, sequence: int) -> Tensor:
    """Where each row of a call of `sequence` tokens writes: int64 [batch]. `attention_mask` is int64 [batch, total]."""
    ends = (attention_mask * torch.arange(1, attention_mask.shape[1] + 1)).amax(1)
    return (ends - sequence).clamp(min=0)


def places_in_ring(last: Tensor, rows: int) -> Tensor:
    """What rings of so many `rows` hold after a call whose last tokens stand in the places `last`, int64 [batch]: the
    latest place up to that one whose token stands in each row, int64 [batch, rows]."""
    last = last[:, None]
    # As a tensor: the exporter knows no remainder by a size.
    return last - torch.remainder(last + rows - torch.arange(rows), torch.full((), rows))


def widened(attention_mask: Tensor, capacity: int) -> Tensor:
    """[batch, total] -> [batch, capacity]; what is beyond is not seen."""
    return torch.nn.functional.pad(attention_mask, (0, capacity - attention_mask.shape[1]))


def _scatter(buffer: Tensor | None, rows: Tensor, places: Tensor, ring: bool) -> Tensor:
    assert buffer is not None
    attributes: dict[str, Any] = {"axis": 2, "mode": "circular" if ring else "linear"}
    return torch.onnx.ops.symbolic(
        "TensorScatter", (buffer, rows, places), attributes, dtype=buffer.dtype, shape=buffer.shape, version=op.OPSET
    )
