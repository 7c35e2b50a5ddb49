"""What the workers of one run of pytest share: made by the first that needs it, and the longest files come first."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Of half a minute or more for few tests: a worker that began one of them last would be alone with it at the end.
_LONG = {
    "test_real_models.py",
    "test_fuzz.py",
    "test_kernels.py",
    "test_cpp.py",
    "test_genai.py",
    "test_genai_folder.py",
    "test_mixtures.py",
}


def longest_first(items: list[pytest.Item]) -> None:
    """Order files by what they take: the long ones, then by their number of tests, as pytest-xdist does by itself."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.name not in _LONG, -tests[item.path]))


def made_once(folder: Path, name: str, make: Callable[[Path], object]) -> Path:
    """What `make` makes under a name, unless another worker has; while one does, the others wait.

    It lies in a folder of its own: a worker that was killed may have left compilers that still write into theirs.
    """
    done = folder / f"{name}.done"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_symlink():
            made = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)) / name
            make(made)
            done.symlink_to(made)
    return done.readlink()


@contextmanager
def graphs_kept_in(folder: Path) -> Iterator[None]:
    """Traced graphs are looked for and kept in `folder` inside of the block, and nowhere else."""
    before = os.environ.get("TEAMLORA_EXPORT_CACHE")
    os.environ["TEAMLORA_EXPORT_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TEAMLORA_EXPORT_CACHE"]
        else:
            os.environ["TEAMLORA_EXPORT_CACHE"] = before
