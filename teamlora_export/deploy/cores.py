"""How many threads are worth starting: as many as there are processor cores, of those that this process may use, and
of which a container's limit leaves it the time.

A limit of time (a cgroup's quota) does not show in the processors that may be used. With the time of one processor and
a thread on each of 64, all 64 are stopped for most of every period, and all wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
# Microseconds, where a group names none.
_PERIOD = 100_000


def usable_cores(root: Path = _ROOT) -> int:
    """Processor cores that this process may use, no more than its quota of time fills; two threads of one core count
    once.

    Args:
        root: of the system's files.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len({_core_of(processor, root) for processor in os.sched_getaffinity(0)})
    else:
        cores = os.cpu_count() or 1
    quota = cores_of_quota(root)
    return cores if quota is None else min(cores, quota)


def cores_of_quota(root: Path = _ROOT) -> int | None:
    """How many cores the processor time fills that this process may take, rounded up; None where there is no limit.

    The groups around a process's own limit it too. Both versions of cgroups are read where they usually lie.
    """
    quotas = [quota for mount, path in _hierarchies(root) for group in _around(mount, path) for quota in _quotas(group)]
    return min(quotas, default=None)


def _core_of(processor: int, root: Path) -> str:
    """The processors of one core, as the system writes them; the processor alone where it does not say."""
    topology = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    return system_text(topology / "thread_siblings_list") or str(processor)


def _hierarchies(root: Path) -> Iterator[tuple[Path, str]]:
    """Where groups that may limit processor time lie, and this process's place among them."""
    mounts = root / "sys/fs/cgroup"
    for line in system_text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            yield mounts, path
        elif "cpu" in controllers.split(","):
            yield from ((mounts / name, path) for name in dict.fromkeys((controllers, "cpu")))


def _around(mount: Path, path: str) -> Iterator[Path]:
    """The group at `path` and those around it. A container may see its own group as the outermost, whatever its path
    is outside, and another's by a path that leads out of it."""
    names = [name for name in path.split("/") if name]
    for count in range(0 if ".." in names else len(names), -1, -1):
        yield mount.joinpath(*names[:count])


def _quotas(group: Path) -> Iterator[int]:
    """The limit of one group, as version 2 writes it ("max 100000") and as version 1 does (-1 where there is none)."""
    first = f"{system_text(group / 'cpu.cfs_quota_us')} {system_text(group / 'cpu.cfs_period_us')}"
    for text in (system_text(group / "cpu.max"), first):
        quota, period, *_ = (*text.split(), "", "")
        if quota.isdecimal() and int(quota) > 0:
            length = int(period) if period.isdecimal() else 0
            yield -(-int(quota) // (length or _PERIOD))


def system_text(path: Path) -> str:
    """The text of a file of the system; empty where there is none."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
