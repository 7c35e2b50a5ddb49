"""Shows a verdict: as a table on the console, as JSON, as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from teamlora_export.bundle import Bundle
from teamlora_export.page import render_page, write_report
from teamlora_export.validate import local
from teamlora_export.validate.judge import DRAWS, FLOOR
from teamlora_export.validate.verdict import Judgement, Quality, Verdict

_MOST_DEPARTURES = 10
_LAYER = re.compile(r"^(.*?\.\d+)\.(.+)$")


def print_verdict(verdict: Verdict, console: Console) -> None:
    """One row a case, and where it went wrong if it did."""
    table = Table(title=f"{verdict.candidate} against PyTorch (float64), {verdict.dtype}", title_justify="left")
    for column in ("case", "output", "error", "PyTorch's own", "allowed", "greedy", "top-5", "KL", ""):
        table.add_column(column, justify="left" if column in ("case", "output", "") else "right")
    for case in verdict.cases:
        worst = max(case.judgements, key=lambda j: _share(j))
        greedy = f"{case.greedy_equal}/{case.greedy_tokens}" if case.greedy_tokens else "-"
        table.add_row(
            case.name,
            worst.name,
            f"{worst.error.rms:.2e}",
            f"{worst.pytorch.rms:.2e}",
            f"{worst.allowed:.2e}",
            greedy,
            "-" if case.top5 is None else f"{case.top5:.3f}",
            "-" if case.kl is None else f"{case.kl:.1e}",
            "[green]passed[/]" if case.passed else "[red]FAILED[/]",
        )
    console.print(table)
    console.print(_conclusion(verdict), markup=False)
    console.print(_inside(verdict), markup=False)
    for name, quality in verdict.measured.items():
        console.print(_quality_table(quality, name))
        for line in _score_lines(quality):
            console.print(line, markup=False)
        console.print(_cost(quality), markup=False)
    for departure in verdict.departures[1:_MOST_DEPARTURES]:
        console.print(f"  also {departure.module} (node {departure.node}): {departure.reason}", markup=False)
    if len(verdict.departures) > _MOST_DEPARTURES:
        console.print(f"  and {len(verdict.departures) - _MOST_DEPARTURES} more: see --json", markup=False)


def verdict_fields(verdict: Verdict, bundle: Bundle) -> dict[str, Any]:
    """Every figure of the verdict."""
    return {
        "bundle": bundle.folder.resolve().name,
        "passed": verdict.passed,
        "rule": {"multiple": verdict.multiple, "floor_in_roundoff": FLOOR, "more_draws_at_most": DRAWS},
        "rule_for_modules": {
            "multiple": local.MULTIPLE,
            "floor_in_roundoff": local.FLOOR,
            "floor_of_sum": local.FLOOR_OF_SUM,
        },
        **dataclasses.asdict(verdict),
    }


def write_html(verdict: Verdict, bundle: Bundle, path: Path) -> None:
    """A page with the table, the error of every module in order, and the use of every expert; no script, no network."""
    page = render_page(
        "validate/report.html.j2",
        verdict=verdict,
        manifest=bundle.manifest,
        name=bundle.folder.resolve().name,
        conclusion=_conclusion(verdict),
        quality_columns=_QUALITY_COLUMNS,
        qualities=[
            (_quality_title(name), quality.passed, _cost(quality), _quality_rows(quality), _score_lines(quality))
            for name, quality in verdict.measured.items()
        ],
        inside=_inside(verdict),
        multiple=verdict.multiple,
        chart=_module_chart(verdict.modules),
        experts=_expert_rows(verdict.expert_use),
    )
    write_report(path, page)


def _conclusion(verdict: Verdict) -> str:
    worst = verdict.worst
    if verdict.exact:
        count = "1 case" if len(verdict.cases) == 1 else f"{len(verdict.cases)} cases"
        return (
            f"Passed: {count}. The worst output, {worst.name}, errs "
            f"{worst.times_pytorch:.2g} times as much as PyTorch does in {verdict.dtype} "
            f"(relative error {worst.error.relative:.1e})."
        )
    if verdict.departure is None:
        failed = [case.name for case in verdict.cases if not case.passed]
        return f"FAILED: greedy tokens differ in {', '.join(failed)}, though every output is within its tolerance."
    departure = verdict.departure
    return f"FAILED. First to depart: {departure.module} (node {departure.node}): {departure.reason}."


def _inside(verdict: Verdict) -> str:
    """What was compared beside the outputs."""
    if not verdict.local:
        return "Of the inside nothing was compared: an engine with another adapter than its bundle shows outputs alone."
    worst = max((check.worst for check in verdict.local if check.worst), key=lambda j: j.severity)
    values = sum(len(check.judgements) for check in verdict.local)
    return (
        f"Compared as well: {verdict.weights} weights with their sources; {values} values of modules, each on what was "
        f"computed before it (the worst, {worst.name}, errs by {worst.severity:.2g} of what is allowed)."
    )


def _quality_rows(quality: Quality) -> list[tuple[str, list[str]]]:
    """A row a model: perplexity, KL, agreement, similarity, tasks solved."""
    models = {
        "adapted, not quantised": quality.adapted,
        "quantised": quality.quantised,
        "without experts": quality.base,
    }
    forms = ("{:.2f}", "{:.2g}", "{:.1%}", "{:.4f}", "{:.1%}")
    return [
        (
            name,
            ["-" if v is None else form.format(v) for form, v in zip(forms, dataclasses.astuple(figures), strict=True)],
        )
        for name, figures in models.items()
    ]


_QUALITY_COLUMNS = ("perplexity", "KL", "same likeliest", "cosine", "tasks solved")


def _quality_title(name: str) -> str:
    return f"What quantisation cost{f' the adapter {name}' if name else ''}"


def _quality_table(quality: Quality, name: str) -> Table:
    table = Table(title=f"{_quality_title(name)}, on held-out text", title_justify="left")
    table.add_column("model")
    for column in _QUALITY_COLUMNS:
        table.add_column(column, justify="right")
    for name, cells in _quality_rows(quality):
        table.add_row(name, *cells)
    return table


def _score_lines(quality: Quality) -> list[str]:
    return [
        f"lm-eval, {each.task}: {each.metric} {each.quantised:.4g}, adapted and not quantised {each.adapted:.4g}, "
        f"without experts {each.base:.4g}"
        for each in quality.scores
    ]


def _cost(quality: Quality) -> str:
    read = f"{quality.places:,} places of the text" + (f", {quality.tasks} tasks" if quality.tasks else "")
    if quality.passed:
        return f"Within its thresholds: {read}."
    return f"FAILED by its thresholds ({read}): {'; '.join(quality.findings)}."


def _share(judgement: Judgement) -> float:
    ratio = judgement.error.rms / judgement.allowed if judgement.allowed > 0 else math.inf
    return math.inf if math.isnan(ratio) else ratio


@dataclasses.dataclass(frozen=True)
class Chart:
    """Points of a log-scale plot, in the units of its SVG view box (900 x 260)."""

    candidate: str
    pytorch: str
    ticks: list[tuple[float, str]]
    labels: list[tuple[float, str]]


def _module_chart(modules: tuple[Judgement, ...]) -> Chart:
    """Relative error over modules in the order in which they finish; PyTorch's own beside it."""
    finite = [m for m in modules if math.isfinite(m.error.rms) and m.error.scale > 0]
    shown = [m for m in finite if not m.name.startswith("present.") and "/" not in m.name]
    values = [
        v for m in shown for v in (m.error.rms / m.error.scale, m.pytorch.rms / m.error.scale) if 0 < v < math.inf
    ]
    low = math.floor(math.log10(min(values, default=1e-8)))
    high = max(math.ceil(math.log10(max(values, default=1.0))), low + 1)

    def x(index: int) -> float:
        return 60 + 830 * index / max(len(shown) - 1, 1)

    def y(value: float) -> float:
        clipped = min(max(math.log10(value), low), high) if 0 < value < math.inf else low
        return 230 - 215 * (clipped - low) / (high - low)

    def line(pick: Any) -> str:
        return " ".join(f"{x(i):.1f},{y(pick(m) / m.error.scale):.1f}" for i, m in enumerate(shown))

    layers: dict[str, float] = {}
    for index, module in enumerate(shown):
        match = re.search(r"\.(\d+)(?:\.|$)", module.name)
        if match:
            layers.setdefault(match[1], x(index))
    every = max(1, len(layers) // 10)
    labels = [(place, f"layer {name}") for i, (name, place) in enumerate(layers.items()) if i % every == 0]
    ticks = [(y(10.0**power), f"1e{power}") for power in range(low, high + 1)]
    return Chart(line(lambda m: m.error.rms), line(lambda m: m.pytorch.rms), ticks, labels)


def _expert_rows(expert_use: dict[str, list[float]]) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """Expert shares grouped by layer: [(layer, [(module, shares)])]."""
    rows: dict[str, list[tuple[str, list[float]]]] = defaultdict(list)
    for path, shares in expert_use.items():
        match = _LAYER.match(path)
        rows[match[1] if match else ""].append((match[2] if match else path, shares))
    return list(rows.items())
