"""Rows of a text generator with a shelf, where the adapters are on the host or in a device's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from teamlora_export.deploy.session import Session
from teamlora_export.deploy.slots import DeviceSlots, Slots, open_slots

WHERE = ("host", "device")


def open_rows(folder: Path, rows: int, where: str = "host") -> Slots:
    """`rows` texts at a time; what runs on a GPU does so on the one device that ONNX Runtime has here."""
    session = Session(folder)
    if where == "host":
        return open_slots(session, rows)
    session.adapters = session._open_adapters(True, on_device=True)
    return DeviceSlots(session, rows, 256, None)


def on_host(memory: Any) -> np.ndarray:
    """The slots of an input as they are now."""
    return memory.copy() if isinstance(memory, np.ndarray) else memory.numpy().copy()
