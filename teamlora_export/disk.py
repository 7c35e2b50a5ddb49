"""What a file system holds, how much of it is on the disk, and where another one begins."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """What the system refuses to the package safetensors (0.8), which names the error in words of its own, is an
    `OSError` as any other; tests/test_files.py tells when this can go.

    Raises:
        OSError: that one, of `path`.
    """
    try:
        yield
    except Exception as error:
        match = _OS_ERROR.search(str(error))
        if isinstance(error, OSError) or match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(path)) from None


def size_text(size: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:,.0f} {name}"
    return f"{size} bytes"


def is_mounted(place: Path) -> bool:
    """Whether a disk, or a folder from elsewhere on the same one, is mounted at `place`."""
    if os.path.ismount(place):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = re.sub(rb"[\\\s]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(place))
    return any(mount.split(b" ")[4] == escaped for mount in mounts)


def sync(path: Path) -> None:
    """A file, or all in a folder, is on the disk afterwards."""
    for found in (*path.rglob("*"), path):
        _sync_alone(found)


def sync_names(folder: Path) -> None:
    """The names in `folder` are on the disk afterwards; what has its place stays there where they cannot be."""
    with suppress(OSError):
        _sync_alone(folder)


def _sync_alone(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Others say that the file system cannot.
        if error.errno in (*FULL, errno.EIO):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
