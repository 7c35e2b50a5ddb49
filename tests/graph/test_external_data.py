"""The writer of external data: every byte at its place, and the hash of exactly these bytes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teamlora_export.graph import external_data
from teamlora_export.graph.external_data import _HashingWriter

# Less than a page, whole pages, several blocks.
SIZES = st.one_of(st.integers(1, 300), st.sampled_from([65536, 1 << 20]), st.integers(1, 20 << 20))


def write(path: Path, sizes: list[int], seed: int = 0) -> tuple[bytes, str]:
    """Write arrays of these sizes; what the file should hold, and the hash that the writer gives."""
    rng = np.random.default_rng(seed)
    expected = bytearray()
    with _HashingWriter(path) as writer:
        for size in sizes:
            data = rng.integers(0, 256, size, dtype=np.uint8)
            offset = writer.place(size)
            assert offset % (65536 if size >= 1 << 20 else 64) == 0
            assert writer.write(offset, data) == size
            expected += bytes(offset - len(expected)) + data.tobytes()
        return bytes(expected), writer.finish()


@example(sizes=[(8 << 20) - 1, 100], seed=0)
@example(sizes=[8 << 20, 1], seed=0)
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(SIZES, max_size=5), seed=st.integers(0, 99))
def test_arrays_lie_where_they_were_placed_and_the_hash_is_the_files(sizes, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "data"
    expected, digest = write(path, sizes, seed)
    assert path.read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_a_file_system_without_direct_writes_is_written_as_any_file(tmp_path, monkeypatch):
    opened = os.open

    def refuse_direct(path, flags, *mode):  # type: ignore[no-untyped-def]
        if flags & external_data._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_direct)
    expected, digest = write(tmp_path / "data", [100, 9 << 20, 5])
    assert (tmp_path / "data").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_one_that_refuses_them_later_only_is_too(tmp_path, monkeypatch):
    written = os.write
    taken = False

    def refuse_direct(file, data):  # type: ignore[no-untyped-def]
        nonlocal taken
        if not fcntl.fcntl(file, fcntl.F_GETFL) & external_data._DIRECT:
            return written(file, data)
        if taken:
            raise OSError(errno.EINVAL, "Invalid argument")
        # The part that there is room for.
        taken = True
        return written(file, data[:65536])

    monkeypatch.setattr(os, "write", refuse_direct)
    expected, digest = write(tmp_path / "data", [100, 9 << 20, 5])
    assert taken
    assert (tmp_path / "data").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_a_full_disk_is_an_error_and_not_a_short_file(tmp_path, monkeypatch):
    def full(_file, _data):  # type: ignore[no-untyped-def]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "data", [9 << 20])
