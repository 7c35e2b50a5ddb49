"""Shows a benchmark: as tables on the console, as JSON, as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from teamlora_export.bench.measure import FEWEST_TURNS, Benchmark
from teamlora_export.bench.turns import DECODE, PREFILL, Figure, Ratio, Workload
from teamlora_export.page import render_page, write_report

_QUANTITIES = (DECODE, PREFILL)


def print_benchmark(benchmark: Benchmark, name: str, console: Console) -> None:
    """A table of speeds for each workload, one of load time and memory, and what can be told from them."""
    console.print(f"{name}: time over {benchmark.baseline!r} with its quartiles, beside its floor", markup=False)
    if benchmark.adapters:
        console.print(f"Adapters: {', '.join(benchmark.adapters)}; one for all rows is the first", markup=False)
    for table in tables(benchmark):
        console.print(_drawn(table))
    console.print(conclusion(benchmark), markup=False)


def benchmark_fields(benchmark: Benchmark, name: str) -> dict[str, Any]:
    """Every figure of the benchmark, with the seconds of every turn."""
    return {
        "name": name,
        "baseline": benchmark.baseline,
        "adapters": benchmark.adapters,
        "turns": benchmark.turns,
        "threads": benchmark.threads,
        "quiet": benchmark.quiet,
        "conclusion": conclusion(benchmark),
        "machine": dataclasses.asdict(benchmark.machine),
        "figures": [_figure_fields(figure, benchmark) for figure in benchmark.figures],
        "alone": [dataclasses.asdict(alone) for alone in benchmark.alone],
    }


def write_html(benchmark: Benchmark, name: str, path: Path) -> None:
    """A page with the tables and a plot of the ratios; no script, no network."""
    page = render_page(
        "bench/report.html.j2",
        name=name,
        benchmark=benchmark,
        conclusion=conclusion(benchmark),
        tables=tables(benchmark),
        panels=panels(benchmark),
    )
    write_report(path, page)


def conclusion(benchmark: Benchmark) -> str:
    """Whether the figures tell anything, in a sentence."""
    if benchmark.turns < FEWEST_TURNS:
        return f"Too few turns to tell: take {FEWEST_TURNS} or more."
    worst = benchmark.noisiest
    said = (
        f"in half of the turns the baseline differed from itself by up to {worst.noise:.1%} "
        f"({worst.quantity}, batch {worst.workload.batch}, {worst.workload.length} tokens)"
    )
    if benchmark.quiet:
        return f"Quiet enough to tell: {said}. Ratios marked ~ are no farther from 1 than the baseline's own."
    return f"Too noisy to tell: {said}. Measure on a quiet machine, or with more turns."


@dataclass(frozen=True)
class Mark:
    """A row's ratio in a panel, with its floor where that is known."""

    row: str
    ratio: Ratio
    floor: float | None


@dataclass(frozen=True)
class Panel:
    """The ratios of one quantity of one workload.

    Attributes:
        noise: how far from 1 a ratio says nothing.
        low, high: the ends of the axis.
    """

    title: str
    noise: float
    marks: tuple[Mark, ...]
    low: float
    high: float

    def place(self, ratio: float) -> float:
        """Where on the axis, from 0 to 1."""
        return (ratio - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        step = next(s for s in (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 1e3) if (self.high - self.low) / s <= 8)
        first, last = int(self.low / step) + 1, int(self.high / step)
        return [round(index * step, 2) for index in range(first, last + 1)]


def panels(benchmark: Benchmark) -> list[Panel]:
    """One for each quantity of each workload, without the baseline, which is 1."""
    found = []
    for workload in _workloads(benchmark):
        for quantity in _QUANTITIES:
            figures = [f for f in benchmark.figures if (f.workload, f.quantity) == (workload, quantity)]
            shown = [figure for figure in figures if figure.row != benchmark.baseline]
            if shown:
                title = f"{quantity}, batch {workload.batch}, {workload.length} tokens"
                found.append(_panel(title, [Mark(f.row, f.ratio, _floor(f, benchmark)) for f in shown], shown[0].noise))
    return found


def _panel(title: str, marks: Sequence[Mark], noise: float) -> Panel:
    values = [1.0 - noise, 1.0 + noise]
    for mark in marks:
        values += [mark.ratio.low, mark.ratio.high, *([mark.floor] if mark.floor is not None else [])]
    margin = max(0.05 * (max(values) - min(values)), 0.01)
    return Panel(title, noise, tuple(marks), min(values) - margin, max(values) + margin)


def _floor(figure: Figure, benchmark: Benchmark) -> float | None:
    """In bytes for a step of decoding, in operations for a prefill: what either is bound by."""
    floor = benchmark.floors.get((figure.row, figure.quantity, figure.workload))
    if floor is None:
        return None
    return floor.bytes if figure.quantity == DECODE else floor.operations


def _figure_fields(figure: Figure, benchmark: Benchmark) -> dict[str, Any]:
    floor = benchmark.floors.get((figure.row, figure.quantity, figure.workload))
    return {
        "row": figure.row,
        "quantity": figure.quantity,
        **dataclasses.asdict(figure.workload),
        "median_seconds": figure.median,
        "tokens_a_second": figure.tokens_a_second,
        "ratio": dataclasses.asdict(figure.ratio),
        "noise": figure.noise,
        "tells": figure.tells,
        "floor": None if floor is None else dataclasses.asdict(floor),
        "seconds": figure.seconds,
    }


@dataclass(frozen=True)
class Grid:
    """A table, before it is drawn."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_COLUMNS = {DECODE: ("tokens/s", "ratio", "floor"), PREFILL: ("prefill, ms", "ratio", "floor")}


def tables(benchmark: Benchmark) -> list[Grid]:
    """A table for each workload, and one of load time and memory where they were measured."""
    found = [_speeds(workload, benchmark) for workload in _workloads(benchmark)]
    if benchmark.alone:
        rows = tuple(
            (alone.row, f"{alone.load_seconds:.2f}", "-" if alone.bytes is None else f"{alone.bytes / 1e6:,.0f}")
            for alone in benchmark.alone
        )
        found.append(Grid("in a process of its own", ("row", "load, s", "most memory, MB"), rows))
    return found


def _speeds(workload: Workload, benchmark: Benchmark) -> Grid:
    figures = {(f.row, f.quantity): f for f in benchmark.figures if f.workload == workload}
    quantities = [quantity for quantity in _QUANTITIES if any(found == quantity for _, found in figures)]
    rows = tuple(
        (name, *(cell for quantity in quantities for cell in _cells(figures[name, quantity], benchmark)))
        for name in dict.fromkeys(name for name, _ in figures)
    )
    columns = ("row", *(column for quantity in quantities for column in _COLUMNS[quantity]))
    return Grid(f"batch {workload.batch}, {workload.length} tokens", columns, rows)


def _cells(figure: Figure, benchmark: Benchmark) -> tuple[str, str, str]:
    value = f"{figure.tokens_a_second:.1f}" if figure.quantity == DECODE else f"{figure.median * 1e3:.1f}"
    if figure.row == benchmark.baseline:
        return value, "1", ""
    floor, ratio = _floor(figure, benchmark), figure.ratio
    mark = "" if figure.tells else "~"
    spread = f"{mark}{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})"
    return value, spread, "" if floor is None else f"{floor:.3f}"


def _workloads(benchmark: Benchmark) -> list[Workload]:
    return list(dict.fromkeys(figure.workload for figure in benchmark.figures))


def _drawn(grid: Grid) -> Table:
    table = Table(title=grid.title, title_justify="left")
    for column in grid.columns:
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
    for cells in grid.rows:
        table.add_row(*map(Text, cells))
    return table
