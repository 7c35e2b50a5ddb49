"""Larger pages of memory for a model's weights.

A step of decoding reads every weight once, and for each page of memory the processor looks up where it lies. Linux
gives out pages of 4 kB, the most scattered ones first, unless it is asked for larger ones: so the earlier a model is
opened, the slower it is. In large pages, of 2 MB, each is faster than the last of them.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
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
_LARGE_PAGES = "sys/kernel/mm/transparent_hugepage"
# Of a large page in memory, before it is made one.
_FULL = 0.9
_ENTRY = np.dtype("<u8")
_PRESENT = 63
# What Linux is advised of memory, by its numbers: to make the pages large in its own time, which is all that those
# before 6.1 know, and now.
_HUGEPAGE, _COLLAPSE = 14, 25


def use_large_pages(root: Path = _ROOT) -> None:
    """Lay the memory of this process in large pages, wherever that takes hardly any more of it.

    It takes 0.2 to 3 s for 1 GB, by how much the system has to move. Nothing is done where the system's owner has
    turned large pages off, or where there are none: they are a matter of speed alone.

    Args:
        root: of the system's files.
    """
    if not any(on in system_text(root / _LARGE_PAGES / "enabled") for on in ("[madvise]", "[always]")):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with suppress(OSError):
        for start, end in full_areas(root):
            for advice in (_HUGEPAGE, _COLLAPSE):
                madvise(start, end - start, advice)


def full_areas(root: Path = _ROOT) -> Iterator[tuple[int, int]]:
    """Where memory lies that is this process's alone and is in use nearly everywhere, from large page to large page.

    Of a thread's stack, for one, hardly anything is: a large page would take what it does not.

    Raises:
        OSError: the system does not tell.
    """
    large = int(system_text(root / _LARGE_PAGES / "hpage_pmd_size") or 0)
    small = mmap.PAGESIZE
    if large < small:
        return
    with (root / "proc/self/pagemap").open("rb") as pagemap:
        for line in system_text(root / "proc/self/maps").splitlines():
            # START-END PERMISSIONS OFFSET DEVICE INODE [PATH]; an inode is a file's.
            addresses, permissions, _, _, inode, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split("-"))
            first, last = -(-start // large), end // large
            if permissions != "rw-p" or inode != "0" or first >= last:
                continue
            pagemap.seek(first * large // small * _ENTRY.itemsize)
            entries = np.frombuffer(pagemap.read((last - first) * large // small * _ENTRY.itemsize), _ENTRY)
            full = (entries.reshape(-1, large // small) >> _PRESENT).mean(axis=1) >= _FULL
            for begin, beyond in np.flatnonzero(np.diff(full, prepend=False, append=False)).reshape(-1, 2).tolist():
                yield (first + begin) * large, (first + beyond) * large
