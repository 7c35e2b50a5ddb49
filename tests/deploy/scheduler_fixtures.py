"""Fixtures of tests of the scheduler, for their `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from teamlora_export.deploy import slots, slots_in_place
from teamlora_export.deploy.session import Session
from teamlora_export.deploy.slots import DeviceSlots, Slots


@pytest.fixture
def open_slots(make_bundle, monkeypatch) -> Callable[..., Any]:
    """Buffers that are short at first, so that they grow again and again."""
    open = slots.open_slots
    monkeypatch.setattr(slots_in_place, "_LEAST_CAPACITY", 4)

    def make(
        name: str = "llama", cache: str = "in-place", slots: int = 8, part: int = 256, most: int | None = None
    ) -> Slots:
        if cache == "on a device":
            # What runs on a GPU, on the one device that ONNX Runtime has here.
            return DeviceSlots(Session(make_bundle(name, cache="in-place").folder, threads=1), slots, part, most)
        return open(Session(make_bundle(name, cache=cache).folder, threads=1), slots, part, most)

    return make
