"""Waiting for what is to happen, in place of a time in which it ought to have happened."""

from __future__ import annotations

import time
from collections.abc import Callable

# Only a hang reaches it, on however busy a machine.
SECONDS = 60.0


def wait_until(condition: Callable[[], object], told: Callable[[], object] = lambda: "") -> None:
    """Until `condition` holds, which is asked again and again.

    Args:
        told: what is said of it where it never does.

    Raises:
        AssertionError: it does not within a minute.
    """
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, told()
        time.sleep(0.005)
