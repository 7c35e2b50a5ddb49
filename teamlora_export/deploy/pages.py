"""Larger pages of memory for a model's weights.

A step of decoding reads every weight once, and for each page of memory the processor looks up where it lies. Linux
gives out pages of 4 kB, the most scattered ones first, unless it is asked for larger ones: so the earlier a model is
opened, the slower it is. In large pages, of 2 MB, each is faster than the last of them.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.cores import system_text
else:
    # Deployed: the files lie beside one another.
    from cores import system_text

_ROOT = Path("/")
_SETTINGS = "sys/kernel/mm/transparent_hugepage"
# As much as is looked at, and moved, at once: a process that ends waits for no more.
_PIECE = 64 << 20
# Of an area that can be full, over all that the process has in memory. Some reserve a thousand times as much.
_MOST = 4
# Of a large page, in memory before it is made one.
_FULL = 0.9
# Of a page, in the process's table of them: it is in memory, and no other process shares it.
_OWN_AND_PRESENT = 1 << 63 | 1 << 56
_ENTRY = np.dtype("<u8")
# To move memory into large pages now, as Linux numbers it since 6.1.
_COLLAPSE = 25
_SWEEP = "large pages"


def has_large_pages(root: Path = _ROOT) -> bool:
    """Whether this system gives large pages to those who ask: Linux from 6.1 on, where its setting is not "never".

    Args:
        root: of the system's files.
    """
    setting = system_text(root / _SETTINGS / "enabled")
    given = "[madvise]" in setting or "[always]" in setting
    return given and mmap.PAGESIZE < _large(root) <= _PIECE and _collapse()(None, 0) == 0


def use_large_pages(root: Path = _ROOT) -> None:
    """Move this process's memory into large pages, wherever that takes hardly any more of it.

    That takes 0.2 to 3 s for 1 GB, by how scattered what is free lies. It leaves off where the system has no more to
    give: they are a matter of speed alone.

    Args:
        root: of the system's files.
    """
    if not has_large_pages(root):
        return
    collapse = _collapse()
    # Where the system does not tell, there is nothing to be done.
    with suppress(OSError):
        for start, end in full_areas(root):
            if collapse(start, end - start) in (errno.ENOMEM, errno.EBUSY):
                return


def start_large_pages() -> None:
    """The same in a thread of its own, for which nothing waits and without which nothing fails."""
    with suppress(RuntimeError):
        threading.Thread(target=use_large_pages, name=_SWEEP, daemon=True).start()


def finish_large_pages() -> None:
    """Wait until all that was started is done, and do the rest; for those who take times."""
    for thread in threading.enumerate():
        if thread.name == _SWEEP:
            thread.join()
    use_large_pages()


def full_areas(root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """Where memory lies that is no file's, this process's alone, and in use nearly everywhere; from large page to large
    page, in pieces.

    Of a thread's stack, for one, hardly anything is in use: a large page would take what it does not.

    Raises:
        OSError: the system does not tell.
    """
    large, small = _large(root), mmap.PAGESIZE
    if large == 0:
        return
    most = _MOST * small * int((root / "proc/self/statm").read_text().split()[1])
    with (root / "proc/self/pagemap").open("rb", buffering=0) as pagemap:
        # Names may be of any bytes.
        for line in (root / "proc/self/maps").read_bytes().split(b"\n")[:-1]:
            # START-END PERMISSIONS OFFSET DEVICE INODE [PATH]; an inode is a file's.
            addresses, permissions, _, _, inode = line.split()[:5]
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            if permissions != b"rw-p" or inode != b"0" or end - start > most:
                continue
            beyond = end // large * large
            for piece in range(-(-start // large) * large, beyond, _PIECE):
                pagemap.seek(piece // small * _ENTRY.itemsize)
                found = pagemap.read((min(piece + _PIECE, beyond) - piece) // small * _ENTRY.itemsize)
                for first, last in _full(np.frombuffer(found, _ENTRY), large // small):
                    yield piece + first * large, piece + last * large


def _full(pages: np.ndarray, of_large: int) -> list[tuple[int, int]]:
    """Runs of large pages, of `of_large` pages each, that are full."""
    whole = pages[: len(pages) // of_large * of_large].reshape(-1, of_large)
    full = (whole & _OWN_AND_PRESENT == _OWN_AND_PRESENT).mean(axis=1) >= _FULL
    changes: list[int] = np.flatnonzero(np.diff(full, prepend=False, append=False)).tolist()
    return list(zip(changes[::2], changes[1::2], strict=True))


def _large(root: Path) -> int:
    """Bytes of a large page; 0 where there are none."""
    return int(system_text(root / _SETTINGS / "hpage_pmd_size") or 0)


def _collapse() -> Callable[[int | None, int], int]:
    """Moves what lies from an address on, of so many bytes; returns what went wrong, or 0."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def collapse(start: int | None, size: int) -> int:
        return 0 if madvise(start, size, _COLLAPSE) == 0 else ctypes.get_errno()

    return collapse
