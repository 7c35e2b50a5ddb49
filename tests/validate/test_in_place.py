"""Calls of a growing cache, given to buffers of one size and back."""

from __future__ import annotations

import numpy as np
import pytest

from teamlora_export.validate.in_place import in_place_call


@pytest.mark.parametrize("sequence", [1, 3])
@pytest.mark.parametrize("capacity", [None, 7, 12])
def test_a_call_of_any_capacity_gives_back_the_cache_that_would_have_grown(sequence, capacity, rng):
    total = 7
    mask = np.ones((2, total), np.int64)
    mask[0, :2] = 0
    past, rows = (rng.standard_normal((2, 3, length, 4)) for length in (total - sequence, sequence))
    given = {
        "input_ids": np.zeros((2, sequence), np.int64),
        "attention_mask": mask,
        "past_key_values.0.key": past,
    }
    call = in_place_call(given, capacity)
    buffer = call.feeds["past_key_values.0.key"].copy()
    assert buffer.shape == (2, 3, capacity or total, 4)
    assert call.feeds["attention_mask"].sum() == mask.sum()
    for row, names in enumerate(call.feeds["attention_mask"]):
        end = int(names.nonzero()[0].max()) + 1
        buffer[row, :, end - sequence : end] = rows[row]
    grown = call.present({"present.0.key": buffer})["present.0.key"]
    seen = mask[:, None, :, None] > 0
    assert np.array_equal(grown * seen, np.concatenate([past, rows], axis=2) * seen)
