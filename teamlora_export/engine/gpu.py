"""The GPU, asked through the driver itself: no CUDA package is needed, and a machine without one is no error."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU. `capability` is its compute capability, major and minor."""

    name: str
    capability: tuple[int, int]


def find_gpu() -> Gpu | None:
    """The first GPU, or None where there is no driver or no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        capability.append(value.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]))
