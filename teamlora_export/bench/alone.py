"""How long a row takes to open, and how much memory it needs, each time in a process of its own."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teamlora_export.bench.rows import Row
from teamlora_export.errors import ExportError, printable

_STATUS = Path("/proc/self/status")
_STEPS = 8
# The path comes first: nothing is imported from the folder that the command runs in, which may be a bundle's.
_PROGRAM = """
import pickle, sys
sys.path[:], given = pickle.load(sys.stdin.buffer)
from teamlora_export.bench import alone
alone.answer(given)
"""


@dataclass(frozen=True)
class Alone:
    """One row in a process that runs nothing else.

    Attributes:
        load_seconds: medians over the processes: of opening the model, with its libraries imported and its files in
            memory.
        bytes: the most memory, over what the process had before it imported anything for the row, libraries included;
            None where the system does not tell.
    """

    row: str
    load_seconds: float
    bytes: int | None


def measure_alone(rows: Sequence[Row], prompts: Sequence[Sequence[int]], count: int, repeats: int) -> list[Alone]:
    """Open each of `rows`, read `prompts`, and make some of `count` tokens, in `repeats` processes in turns.

    Raises:
        ExportError: a row cannot be opened or run.
    """
    taken: dict[str, list[tuple[float, int | None]]] = {row.name: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            taken[row.name].append(_run_apart(row, prompts, min(count, _STEPS)))
    return [
        Alone(name, float(np.median([seconds for seconds, _ in found])), _median([size for _, size in found]))
        for name, found in taken.items()
    ]


def _median(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return int(np.median(known)) if known else None


def _run_apart(row: Row, prompts: Sequence[Sequence[int]], count: int) -> tuple[float, int | None]:
    given = pickle.dumps((sys.path, pickle.dumps((row, prompts, count))))
    done = subprocess.run([sys.executable, "-P", "-c", _PROGRAM], input=given, capture_output=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ExportError(f"{row.name}: its process ended with code {done.returncode} ({said[-1]:.300}).") from None
    if "error" in found:
        raise ExportError(found["error"])
    return found["seconds"], found["bytes"]


def answer(given: bytes) -> None:
    """What the process of its own does with a row that was pickled for it: prints one line of JSON."""
    before = _most_memory()
    row, prompts, count = pickle.loads(given)
    for library in row.libraries:
        importlib.import_module(library)
    try:
        begin = time.perf_counter()
        read = row.open()
        seconds = time.perf_counter() - begin
        step = read(prompts, count)
        for _ in range(count):
            step()
    except ExportError as error:
        print("\n" + json.dumps({"error": printable(str(error))}))
        return
    after = _most_memory()
    size = after - before if after is not None and before is not None else None
    print("\n" + json.dumps({"seconds": seconds, "bytes": size}))


def _most_memory() -> int | None:
    """The most resident memory of this process, in bytes. (`getrusage` counts what the parent had before, too.)"""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
