"""Linux systems that limit a process's processor time, by the files that tell it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
