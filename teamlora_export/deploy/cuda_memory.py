"""A GPU's memory, as far as an engine of TensorRT needs it: by the package cuda-bindings (13.5 tried, for its
signatures), without PyTorch. It has not yet run on a GPU.

What is written to a tensor is there when the call is over, for all that come after it.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.failure import ModelError
else:
    # Deployed: the files lie beside one another.
    from failure import ModelError


class Cuda:
    """The GPU of a number; any thread may use it.

    Raises:
        ModelError: cuda-bindings is missing, or there is no such GPU.
    """

    def __init__(self, number: int) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise ModelError(f"cuda-bindings cannot be imported ({error}): pip install cuda-bindings") from None
        self.number, self._runtime = number, runtime
        try:
            self.call("cudaFree", 0)
        except CudaError as error:
            raise ModelError(f"GPU {number} cannot be used ({error}).") from None

    def call(self, name: str, *given: Any) -> Any:
        """What one of the runtime's functions gives, on this GPU.

        Raises:
            CudaError: it fails.
        """
        # Of each thread, a device of its own.
        self._check("cudaSetDevice", self._runtime.cudaSetDevice(self.number))
        return self._check(name, getattr(self._runtime, name)(*given))

    def tensor(self, shape: tuple[int, ...], kind: type) -> CudaTensor:
        """One of zeros.

        Raises:
            CudaError: there is not so much memory.
        """
        return CudaTensor(self, shape, np.dtype(kind))

    def up(self, address: int, array: np.ndarray, stream: Stream) -> None:
        """Begin to copy a contiguous array, which must outlive the copy, to an address."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream.handle)

    def down(self, array: np.ndarray, address: int, stream: Stream) -> None:
        """Begin to copy to a contiguous array, which must outlive the copy, from an address."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream.handle)

    def open_stream(self) -> Any:
        """One that waits for no other."""
        return self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def _check(self, name: str, given: Any) -> Any:
        error, *found = given
        if int(error) != 0:
            _, words = self._runtime.cudaGetErrorString(error)
            raise CudaError(f"{name}: {words.decode(errors='replace')}")
        return found[0] if found else None


class CudaError(Exception):
    """CUDA refuses something, or has failed before; the message has its words."""


class Stream:
    """What is begun in it happens one after another."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.handle = cuda.open_stream()
        _end_with(self, cuda, "cudaStreamDestroy", self.handle)

    def wait(self) -> None:
        """Until all that was begun is over."""
        self._cuda.call("cudaStreamSynchronize", self.handle)


class CudaTensor:
    """A tensor at one address for as long as it is there; an entry of its first axis is written to at a time, by any
    thread."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self._cuda, self._size = cuda, math.prod(shape) * dtype.itemsize
        self.address: int = cuda.call("cudaMalloc", max(self._size, 1))
        _end_with(self, cuda, "cudaFree", self.address)
        self._fill(self.address, self._size)

    def numpy(self) -> np.ndarray:
        """A copy."""
        found, stream = np.empty(self.shape, self.dtype), Stream(self._cuda)
        self._cuda.down(found, self.address, stream)
        stream.wait()
        return found

    def clear(self, entry: int) -> None:
        """Zeros in its place."""
        size = self._entry_size()
        self._fill(self.address + entry * size, size)

    def __setitem__(self, entry: int, numbers: np.ndarray) -> None:
        if not 0 <= entry < self.shape[0] or numbers.shape != self.shape[1:] or numbers.dtype != self.dtype:
            raise ValueError(f"{numbers.dtype} {list(numbers.shape)} is no entry {entry} of {list(self.shape)}")
        # Several threads may write at a time, each to an entry of its own.
        source, stream = np.ascontiguousarray(numbers), Stream(self._cuda)
        self._cuda.up(self.address + entry * self._entry_size(), source, stream)
        stream.wait()

    def _entry_size(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _fill(self, address: int, size: int) -> None:
        stream = Stream(self._cuda)
        self._cuda.call("cudaMemsetAsync", address, 0, size, stream.handle)
        stream.wait()


def _end_with(holder: object, cuda: Cuda, name: str, given: Any) -> None:
    # Not at the end of the process, which takes all of it back: threads may be at work with it until then.
    weakref.finalize(holder, _quietly, cuda, name, given).atexit = False


def _quietly(cuda: Cuda, name: str, given: Any) -> None:
    """At the end of a process CUDA may have gone before."""
    try:
        cuda.call(name, given)
    except Exception:
        return
