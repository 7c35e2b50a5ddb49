"""Tensors in the memory of a device, each at one address for as long as it is there.

ONNX Runtime's Python writes whole tensors. A part of one is written by a model of one Identity, whose output is bound
to the part's address: on a GPU, a copy from the host. It has not yet run on one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# What the format of ONNX calls them; uint16 holds bfloat16 by its bits.
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 10, np.dtype(np.uint16): 4}
_IR_VERSION, _OPSET = 8, 17


class DeviceTensors:
    """Makes tensors on a device, its kind and its number; `providers` are ONNX Runtime's for it."""

    def __init__(self, device: tuple[str, int], providers: list[Any]) -> None:
        self._device, self._providers = device, providers
        self._copiers: dict[np.dtype[Any], Any] = {}

    def __call__(self, shape: tuple[int, ...], kind: type) -> DeviceTensor:
        """One of zeros.

        Raises:
            Exception: ONNX Runtime's own, where there is not so much memory.
        """
        import onnxruntime as ort

        dtype = np.dtype(kind)
        if dtype not in self._copiers:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = 1
            self._copiers[dtype] = ort.InferenceSession(_identity(_TYPES[dtype]), options, self._providers)
        value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), *self._device)
        return DeviceTensor(value, shape, dtype, self._device, self._copiers[dtype])


class DeviceTensor:
    """A tensor whose first axis is written to, an entry at a time, by any thread."""

    def __init__(
        self, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[str, int], copier: Any
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._value, self._copier = value, copier

    @property
    def address(self) -> int:
        found: int = self._value.data_ptr()
        return found

    def numpy(self) -> np.ndarray:
        """On a device that is the host, the tensor itself; else a copy."""
        found: np.ndarray = self._value.numpy()
        return found

    def clear(self, entry: int) -> None:
        """Zeros in its place."""
        self[entry] = np.zeros(self.shape[1:], self.dtype)

    def __setitem__(self, entry: int, numbers: np.ndarray) -> None:
        if not 0 <= entry < self.shape[0] or numbers.shape != self.shape[1:] or numbers.dtype != self.dtype:
            raise ValueError(f"{numbers.dtype} {list(numbers.shape)} is no entry {entry} of {list(self.shape)}")
        count = math.prod(self.shape[1:])
        binding = self._copier.io_binding()
        binding.bind_cpu_input("x", np.ascontiguousarray(numbers).reshape(count))
        place = self.address + entry * count * self.dtype.itemsize
        binding.bind_output("y", *self.device, self.dtype.type, (count,), place)
        self._copier.run_with_iobinding(binding)
        binding.synchronize_outputs()


def _identity(kind: int) -> bytes:
    """A model that copies a vector, written by hand: the package onnx is not deployed. The fields' numbers are those of
    onnx.proto."""
    shape = _field(1, _field(2, "n"))
    vector = _field(2, _field(1, _field(1, kind) + _field(2, shape)))
    node = _field(1, "x") + _field(2, "y") + _field(4, "Identity")
    ends = _field(11, _field(1, "x") + vector) + _field(12, _field(1, "y") + vector)
    graph = _field(1, node) + _field(2, "copy") + ends
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, _field(2, _OPSET))


def _field(number: int, content: int | str | bytes) -> bytes:
    """One of a message of protobuf."""
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    data = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
