"""Calls of a growing cache, given to buffers of one size and back."""

from __future__ import annotations

import numpy as np
import pytest

from teamlora_export.validate.in_place import in_place_call


@pytest.mark.parametrize("sequence", [1, 3])
@pytest.mark.parametrize(
    ("capacity", "window", "rows"),
    [
        pytest.param(None, None, (7, 7), id="as long as the text"),
        pytest.param(7, None, (7, 7), id="of seven tokens"),
        pytest.param(12, None, (12, 12), id="of twelve tokens"),
        pytest.param(None, 2, (2, 4), id="a ring that is shorter than the text"),
        pytest.param(None, 4, (4, 6), id="a ring of about its length"),
        pytest.param(None, 40, (7, 7), id="a ring that need not be longer"),
    ],
)
def test_a_call_of_any_capacity_gives_back_the_cache_that_would_have_grown(sequence, capacity, window, rows, rng):
    """What a call of one token, and of three, is given; padding ahead of one row, which the first leaves out."""
    total = 7
    mask = np.ones((2, total), np.int64)
    mask[0, :2] = 0
    past, new = (rng.standard_normal((2, 3, length, 4)) for length in (total - sequence, sequence))
    given = {
        "input_ids": np.zeros((2, sequence), np.int64),
        "attention_mask": mask,
        "past_key_values.0.key": past,
    }
    call = in_place_call(given, {"past_key_values.0.key": window} if window else None, capacity)
    buffer = call.feeds["past_key_values.0.key"].copy()
    assert buffer.shape == (2, 3, rows[sequence > 1], 4)
    assert call.feeds["attention_mask"].sum() == mask.sum()
    for row, names in enumerate(call.feeds["attention_mask"]):
        end = int(names.nonzero()[0].max()) + 1
        places = np.arange(end - sequence, end) % buffer.shape[2]
        buffer[row][:, places] = new[row]
    grown = call.present({"present.0.key": buffer})["present.0.key"]
    seen = mask[:, None, :, None] > 0
    assert np.array_equal(grown * seen, np.concatenate([past, new], axis=2) * seen)
