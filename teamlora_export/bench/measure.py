"""The whole measurement, for any rows: workload by workload in strict turns, and each row in a process of its own."""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teamlora_export.bench.alone import Alone, measure_alone
from teamlora_export.bench.floor import Floor, Work, floor
from teamlora_export.bench.rows import Row
from teamlora_export.bench.turns import DECODE, Figure, Reader, Workload, take_turns
from teamlora_export.deploy.cores import usable_cores
from teamlora_export.deploy.pages import finish_large_pages
from teamlora_export.progress import Reporter

# Quartiles of fewer say nothing, and where the baseline's ratio to itself is farther from 1, the machine is too noisy.
FEWEST_TURNS, TOLERATED = 5, 0.05
_LOADS = 3
_FIRST_ID, _LEAST_VOCABULARY = 3, 50
_PACKAGES = ("onnxruntime", "onnxruntime-genai", "torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """What the figures are from.

    Attributes:
        cores: that this process may use.
        load: how many processes wanted to run in the last minute, before the first turn; None where that is not known.
        versions: of the packages that are installed.
    """

    processor: str
    cores: int
    load: float | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """All that was measured.

    Attributes:
        baseline: the row that ratios are over.
        threads: of each row.
        floors: of rows whose work is known, over the baseline's: by row, quantity and workload.
        alone: empty where it was not asked for.
        adapters: of a shelf, those that its rows have, by name.
    """

    baseline: str
    turns: int
    threads: int
    machine: Machine
    figures: tuple[Figure, ...]
    floors: Mapping[tuple[str, str, Workload], Floor]
    alone: tuple[Alone, ...]
    adapters: tuple[str, ...] = ()

    @property
    def noisiest(self) -> Figure:
        return max(self.figures, key=lambda figure: figure.noise)

    @property
    def quiet(self) -> bool:
        """Whether the machine was quiet enough, and looked at for long enough, to tell rows apart."""
        return self.turns >= FEWEST_TURNS and self.noisiest.noise <= TOLERATED


def measure(
    rows: Sequence[Row],
    baseline: str,
    workloads: Sequence[Workload],
    turns: int,
    *,
    vocabulary: int | None,
    threads: int,
    works: Mapping[str, Work],
    memory: bool,
    reporter: Reporter,
) -> Benchmark:
    """Measure `rows`, of which `baseline` is one.

    Args:
        vocabulary: prompts are random ids below it.
        threads: that the rows were asked for, 0 for one on each core.
        works: by row, where they are known.
        memory: measure load time and memory as well, with the longest prompts of the smallest batch.

    Raises:
        ExportError: a row cannot be opened or run.
    """
    machine = this_machine()
    alone: Sequence[Alone] = ()
    if memory:
        # First: the models that this process opens would take memory from them.
        smallest = min(workloads, key=lambda workload: (workload.batch, -workload.length))
        with reporter.step(f"Load time and memory, {len(rows)} rows, {_LOADS} processes each"):
            alone = measure_alone(rows, make_prompts(smallest, vocabulary), smallest.count, _LOADS)
    with reporter.step(f"Opening {len(rows)} rows"):
        readers = open_all(rows)
    figures: list[Figure] = []
    for workload in workloads:
        with reporter.step(f"Batch {workload.batch}, {workload.length} tokens, turns of all rows"):
            figures += take_turns(readers, baseline, workload, make_prompts(workload, vocabulary), turns)
    floors = _floors(figures, works, baseline)
    return Benchmark(baseline, turns, threads or machine.cores, machine, tuple(figures), floors, tuple(alone))


def open_all(rows: Sequence[Row]) -> dict[str, Reader]:
    """Open `rows` in their order, for turns in which all have their weights in pages alike.

    Raises:
        ExportError: a row cannot be opened.
    """
    readers = {row.name: row.open() for row in rows}
    finish_large_pages()
    return readers


def make_prompts(workload: Workload, vocabulary: int | None) -> list[list[int]]:
    """Random ids, the same each time; special tokens are mostly the first."""
    beyond = min(max(vocabulary or _LEAST_VOCABULARY, 1), 1 << 31)
    shape = (workload.batch, workload.length)
    return np.random.default_rng(0).integers(min(_FIRST_ID, beyond - 1), beyond, shape).tolist()


def _floors(
    figures: Collection[Figure], works: Mapping[str, Work], baseline: str
) -> dict[tuple[str, str, Workload], Floor]:
    if baseline not in works:
        return {}
    return {
        (figure.row, figure.quantity, figure.workload): floor(
            works[figure.row],
            works[baseline],
            1 if figure.quantity == DECODE else figure.workload.length,
            figure.workload.batch,
        )
        for figure in figures
        if figure.row in works
    }


def this_machine() -> Machine:
    """As it is now."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Machine(processor(), usable_cores(), load, versions)


def processor() -> str:
    """Its name, as Linux gives it, or "unknown"."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "unknown"
