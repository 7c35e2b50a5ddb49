"""Padding is left out of what is judged, wherever a value has its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from teamlora_export.validate.metrics import attended

# Two rows: a cache of three, and two tokens now; padded on the left by four and by one.
MASK = np.array([[0, 0, 0, 0, 1], [0, 1, 1, 1, 1]])
REAL = np.array([[False, True], [True, True]])
SIZES = {"batch": 2, "heads": 3, "now": 2, "total": 5, "width": 7, "both": 4, "batch * heads": 6}


@pytest.mark.parametrize(
    ("axes", "tokens"),
    [
        (("batch", "now", "width"), 1),
        (("batch", "now", "heads", "width"), 1),
        (("batch", "heads", "now", "total"), 2),
        (("batch", "heads", "now", "width"), 2),
        (("batch * heads", "now", "total"), 1),
        (("both", "width"), None),
    ],
)
def test_tokens_are_told_by_their_number(axes, tokens):
    shape = [SIZES[axis] for axis in axes]
    real = np.repeat(REAL, shape[0] // 2, axis=0) if tokens else REAL.reshape(-1)
    array = np.zeros(shape)
    np.moveaxis(array, tokens or 0, 1 if tokens else 0)[real] = 1
    found = attended("module", array, MASK, 2)
    assert found.all()
    assert found.size == array.sum() == real.sum() * array.size / real.size


@pytest.mark.parametrize("axes", [("batch", "width"), ("batch", "width", "heads"), ("heads", "now", "width")])
def test_what_has_no_tokens_is_taken_whole(axes):
    array = np.zeros([SIZES[axis] for axis in axes])
    assert attended("module", array, MASK, 2) is array


def test_a_cache_is_taken_with_what_came_before():
    cache = np.moveaxis(np.broadcast_to(MASK[..., None, None], (2, 5, 3, 7)), 1, 2)
    found = attended("present.0.key", cache, MASK, 2)
    assert found.all()
    assert found.shape == (5, 3, 7)
