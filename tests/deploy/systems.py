"""Linux systems by their files: what limits a process's processor time, and which memory it uses."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_GROUPS, _OWN = "sys/fs/cgroup", "proc/self/cgroup"
_FIRST = "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/docker/a\n"

# What -> the files, and the cores that the time fills; None: there is no limit.
SYSTEMS: Mapping[str, tuple[Mapping[str, str], int | None]] = {
    "no cgroups": ({}, None),
    "version 2, a container's own group": ({_OWN: "0::/\n", f"{_GROUPS}/cpu.max": "100000 100000\n"}, 1),
    "version 2, rounded up": ({_OWN: "0::/\n", f"{_GROUPS}/cpu.max": "250000 100000\n"}, 3),
    "version 2, less than one": ({_OWN: "0::/\n", f"{_GROUPS}/cpu.max": "1000 50000\n"}, 1),
    "version 2, no limit": ({_OWN: "0::/a\n", f"{_GROUPS}/a/cpu.max": "max 100000\n"}, None),
    "version 2, no period": ({_OWN: "0::/\n", f"{_GROUPS}/cpu.max": "200000\n"}, 2),
    "version 2, a limit of a group around it": (
        {
            _OWN: "0::/pod/container/worker\n",
            f"{_GROUPS}/pod/cpu.max": "150000 50000\n",
            f"{_GROUPS}/pod/container/cpu.max": "400000 100000\n",
            f"{_GROUPS}/pod/container/worker/cpu.max": "max 100000\n",
            f"{_GROUPS}/pod/other/cpu.max": "100000 100000\n",
        },
        3,
    ),
    "version 2, a group outside of the container": (
        {_OWN: "0::/../other\n", f"{_GROUPS}/cpu.max": "200000 100000\n", "sys/fs/other/cpu.max": "100000 100000\n"},
        2,
    ),
    "version 1": (
        {
            _OWN: _FIRST,
            f"{_GROUPS}/cpu,cpuacct/docker/a/cpu.cfs_quota_us": "200000\n",
            f"{_GROUPS}/cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1, a container that sees its own group alone": (
        {_OWN: _FIRST, f"{_GROUPS}/cpu/cpu.cfs_quota_us": "50000\n", f"{_GROUPS}/cpu/cpu.cfs_period_us": "20000\n"},
        3,
    ),
    "version 1, no limit": (
        {_OWN: _FIRST, f"{_GROUPS}/cpu/cpu.cfs_quota_us": "-1\n", f"{_GROUPS}/cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "another controller's group": ({_OWN: "2:cpuset:/\n", f"{_GROUPS}/cpu/cpu.cfs_quota_us": "100000\n"}, None),
    "what is no number": ({_OWN: "hm\n0::/\n", f"{_GROUPS}/cpu.max": "much 0\n"}, None),
    "a period of nothing": ({_OWN: "0::/\n", f"{_GROUPS}/cpu.max": "300000 0\n"}, 3),
}


def write_system(name: str, root: Path) -> int | None:
    """The files of a system below `root`; returns the cores that its limit fills."""
    files, cores = SYSTEMS[name]
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return cores


def write_areas(root: Path, setting: str = "always [madvise] never\n") -> list[tuple[int, int]]:
    """A process's memory below `root`; returns what can be laid in large pages of 2 MB."""
    large = 2 << 20
    of_large = large // mmap.PAGESIZE
    lines, pages = [], np.zeros(420 * of_large, "<u8")
    present, own, dirty = 1 << 63, 1 << 56, 1 << 55

    def add(start: float, end: float, rest: str, filled: float = 1.0, marks: int = present | own) -> None:
        """From one large page to another; the first of the pages of each are in memory."""
        lines.append(f"{int(start * large):x}-{int(end * large):08x} ".encode() + rest.encode("latin-1") + b"\n")
        for page in range(int(start * of_large), int(end * of_large)):
            pages[page] = marks | dirty | page if page % of_large < filled * of_large else dirty

    add(1.0, 2.0, "r-xp 00001000 fe:00 4711                       /usr/bin/python3.11")
    add(2.5, 6.25, "rw-p 00000000 00:00 0                          [heap]")
    add(8.0, 9.0, "rw-p 00000000 fe:00 4712                       /usr/lib/one of w\xf6rds\x85 rw-p 0 0 0: (deleted)")
    add(10.0, 12.0, "---p 00000000 00:00 0 ")
    add(12.0, 14.0, "rw-p 00000000 00:00 0 ", filled=0.7)
    add(14.0, 16.0, "rw-p 00000000 00:00 0 ", filled=0.95)
    add(16.0, 18.0, "rw-p 00000000 00:00 0 ", filled=0.0)
    # A model's weights beside what is kept for later.
    add(20.0, 30.0, "rw-p 00000000 00:00 0 ")
    pages[23 * of_large : 25 * of_large] = 0
    # Nothing but zeros that were never written, and what a process before a fork wrote.
    add(32.0, 34.0, "rw-p 00000000 00:00 0 ", marks=present)
    add(40.0, 40.5, "rw-p 00000000 00:00 0 ")
    add(41.0, 43.0, "rw-s 00000000 00:01 2049                       /dev/zero (deleted)")
    add(44.0, 45.0, "r--p 00000000 00:00 0                          [vvar]")
    add(50.5, 84.0, "rw-p 00000000 00:00 0 ")
    # More than four times what is said to be in memory.
    add(100.0, 100.0 + 4 * 79 + 1, "rw-p 00000000 00:00 0 ")

    files = {
        "proc/self/maps": b"".join(lines),
        "proc/self/pagemap": pages.tobytes(),
        "proc/self/statm": f"{1000 * of_large} {79 * of_large} 9 9 0 9 0\n".encode(),
        "sys/kernel/mm/transparent_hugepage/enabled": setting.encode(),
        "sys/kernel/mm/transparent_hugepage/hpage_pmd_size": f"{large}\n".encode(),
    }
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    areas = ((3, 6), (14, 16), (20, 23), (25, 30), (51, 83), (83, 84))
    return [(start * large, end * large) for start, end in areas]
