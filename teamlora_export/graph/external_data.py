"""Writes the weights of a model beside it, hashed on the way, one tensor in memory at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.graph.cooked import Cook
from teamlora_export.graph.weights import BaseWeights, WeightTensor, Zeros

# Large tensors start at multiples of the largest page size in use, so that every runtime can map them; small ones at
# multiples of a cache line. Constants that the code computed stay inside the model while they are small.
_PAGE, _LINE = 65536, 64
_LARGE, _SMALL = 1 << 20, 1024
_BLOCK = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


def write_external_data(
    values: Iterable[ir.Value],
    base: BaseWeights,
    adapter: AdapterSpec,
    path: Path,
    progress: Callable[[int], None],
) -> str:
    """Write the weights of `values`, initializers of a model, to `path` and point them there. Those that share bytes in
    the file that they are in share them here.

    Args:
        progress: called with the number of bytes after each tensor.

    Returns:
        The SHA-256 of the file.

    Raises:
        ExportError: a weight is missing, has another shape than the graph, or does not fit the graph's dtype.
    """
    cook, zeros = Cook(base, adapter), []
    with _HashingWriter(path) as writer, ThreadPoolExecutor(1) as pool:
        pending: Future[int] | None = None
        written: dict[tuple[object, ...], int] = {}
        for value in values:
            tensor = value.const_value
            if isinstance(tensor, Zeros):
                zeros.append((value, tensor))
                continue
            kept_inside = not isinstance(tensor, (WeightTensor, ir.ExternalTensor))
            if tensor is None or (kept_inside and tensor.nbytes < _SMALL):
                continue
            key = (tensor.path, tensor.offset, tensor.nbytes) if isinstance(tensor, ir.ExternalTensor) else None
            if key in written:
                progress(tensor.nbytes)
                value.const_value = _placed(tensor, path, written[key], tensor.nbytes)
                continue
            # Numbers of fewer than 8 bits stay packed.
            array = cook.cook(tensor) if isinstance(tensor, WeightTensor) else np.frombuffer(tensor.tobytes(), np.uint8)
            # The next tensor is made while this one is written: two in memory, both cores at work.
            if pending is not None:
                progress(pending.result())
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            offset = writer.place(data.nbytes)
            pending = pool.submit(writer.write, offset, data)
            if key is not None:
                written[key] = offset
            value.const_value = _placed(tensor, path, offset, data.nbytes)
        if pending is not None:
            progress(pending.result())
        if zeros:
            size = max(tensor.nbytes for _, tensor in zeros)
            offset = writer.place(size)
            progress(writer.write(offset, np.zeros(size, np.uint8)))
            for value, tensor in zeros:
                value.const_value = _placed(tensor, path, offset, tensor.nbytes)
        return writer.finish()


def _placed(tensor: ir.TensorProtocol, path: Path, offset: int, size: int) -> ir.ExternalTensor:
    """What a tensor is in the file `path`."""
    shape, name = ir.Shape(tensor.shape.numpy()), tensor.name or ""
    return ir.ExternalTensor(path.name, offset, size, tensor.dtype, shape=shape, name=name, base_dir=path.parent)


def copy_hashed(source: BinaryIO, path: Path, progress: Callable[[int], None]) -> str:
    """Copy a file to the new file `path`, a block in memory at a time; its SHA-256."""
    with _HashingWriter(path) as writer:
        block = np.empty(_BLOCK, np.uint8)
        offset = 0
        while count := source.readinto(block.data):  # type: ignore[attr-defined]
            progress(writer.write(offset, block[:count]))
            offset += count
        return writer.finish()


class _HashingWriter:
    """Appends to a new file at aligned offsets, and hashes all of it on the way.

    Bytes go through one block that is hashed while it is written, past the page cache where the file system allows it:
    a cache would cost more than everything else here, and push the checkpoint out that is being read.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open_direct(path)
        self._digest = hashlib.sha256()
        self._end = 0
        self._flushed = 0
        self._block = mmap.mmap(-1, _BLOCK)
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> _HashingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        os.close(self._file)

    def place(self, size: int) -> int:
        """The offset for the next `size` bytes."""
        alignment = _PAGE if size >= _LARGE else _LINE
        offset = self._end + -self._end % alignment
        self._end = offset + size
        return offset

    def write(self, offset: int, data: np.ndarray) -> int:
        """Write bytes at `offset`, which `place` gave last; return their number."""
        for chunk in (memoryview(bytes(offset - self._written())), data.data):
            start = 0
            while start < len(chunk):
                at = self._block.tell()
                count = min(_BLOCK - at, len(chunk) - start)
                self._block[at : at + count] = chunk[start : start + count]
                self._block.seek(at + count)
                start += count
                if at + count == _BLOCK:
                    self._flush()
        return data.nbytes

    def finish(self) -> str:
        """Write what is left; the SHA-256 of the file."""
        size = self._written()
        self._flush()
        os.ftruncate(self._file, size)
        return self._digest.hexdigest()

    def _written(self) -> int:
        return self._flushed + self._block.tell()

    def _flush(self) -> None:
        """Write the block. A last one that is not full is written with what lies behind it; the file is cut later."""
        filled = self._block.tell()
        with memoryview(self._block) as block:
            written = self._pool.submit(_write_all, self._file, block[: filled + -filled % _PAGE])
            self._digest.update(block[:filled])
            written.result()
        self._flushed += filled
        self._block.seek(0)


def _open_direct(path: Path) -> int:
    """A new file to write past the page cache, or through it where the file system offers nothing else."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_all(file: int, data: memoryview) -> None:
    with data:
        done = 0
        while done < len(data):
            try:
                done += os.write(file, data[done:])
            except OSError as error:
                flags = fcntl.fcntl(file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                # The file system promised more than it does, or it is so full that only part of a page fits.
                fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
