"""What was found, as it is shown: tables in Markdown with the verdicts of `paper.py` among them, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import GUESSED

from method.groups import NAMES, TARGET_NAMES, TORCH, Rows, groups, name_of
from method.paper import verdicts
from method.plan import BASE
from method.significance import difference, student

_TIMED = ("A training step", "Inference")
# What counts as nothing in a task whose answers cannot be guessed.
_NOTHING = 0.05
# Answers that change, of which an interval by their variance is too short.
_FEW = 10


def tables(found: Mapping[str, Any]) -> str:
    """All parts that there are, as Markdown. `found` is what `claims.py` writes as JSON."""
    parts = [
        (found["scores"], "Scores", [*_score_table(found["scores"]), "", *_task_table(found["scores"])]),
        (found["scores"] or found["steps"] or found["inference"], "Beside the paper", list(verdicts(found))),
        (found["steps"], "A training step", _step_table(found["steps"])),
        (found["inference"], "Inference", _inference_table(found["inference"])),
        (found["exports"], "Does the export keep the score?", _export_table(found["exports"])),
    ]
    text = [f"# {found['title']}", "", "\n\n".join(found["notes"])]
    for rows, title, lines in parts:
        if rows and lines:
            text += ["", f"## {title}", "", *lines, *_timed_on(rows if title in _TIMED else ())]
    return "\n".join(text) + "\n"


def _timed_on(rows: Rows) -> list[str]:
    """On which machine and of which code timings were taken, which need not be those of the scores."""
    loads: dict[str, list[float]] = {}
    for row in rows:
        if "machine" in row:
            machine = row["machine"]
            versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            of = f", code {row['code']}" if "code" in row else ""
            told = f"Timed on {machine['processor']}, {machine['cores']} cores, with {versions}{of}"
            loads.setdefault(told, []).extend([machine["load"]] if machine["load"] is not None else [])
    lines = [f"{told}{f'; load before each: {_range(of)}' if of else ''}." for told, of in loads.items()]
    return ["", *lines] if lines else []


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _score_table(scores: Rows) -> list[str]:
    lines = [
        "| | targets | rank | trained parameters | seeds | adapter of step | average score | spread over seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for results in groups(scores).values():
        first, means = results[0], [result["mean"] for result in results]
        spread = f"{statistics.stdev(means):.1f}" if len(means) > 1 else "-"
        trained = ("-", "-", "0")
        if first["family"] != BASE:
            trained = (TARGET_NAMES[first["targets"]], str(first["rank"]), f"{first['parameters']:,}")
        # That of the lowest held-out loss.
        steps = ", ".join(str(step) for step in sorted({result.get("best_step") or "-" for result in results}, key=str))
        cells = [name_of(first), *trained, str(len(results)), steps, f"{statistics.mean(means):.1f}", spread]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _task_table(scores: Rows) -> list[str]:
    """Means over seeds, a column for each task."""
    if not scores:
        return []
    tasks = list(scores[0]["by_task"])
    lines = [f"| | targets | {' | '.join(tasks)} |", "|---" * (len(tasks) + 2) + "|"]
    for results in groups(scores).values():
        shares = [f"{statistics.mean(result['by_task'][task] for result in results):.0f}" for task in tasks]
        targets = "-" if results[0]["family"] == BASE else TARGET_NAMES[results[0]["targets"]]
        lines.append(f"| {name_of(results[0])} | {targets} | {' | '.join(shares)} |")
    guessed = [f"{100 * GUESSED.get(task, 0):.0f}" for task in tasks]
    lines.append(f"| guessing | - | {' | '.join(guessed)} |")
    lines += ["", f"Guessing among the answers that a task has gives {guessing(tasks):.1f} on average."]
    if guessed_by_all := [task for task in tasks if _is_guessed(scores, task)]:
        lines[-1] += (
            f" In {', '.join(guessed_by_all)} no family is above guessing (where that gives nothing: above "
            f"{100 * _NOTHING:.0f}) by more than the luck of questions: these tell nothing of which is better."
        )
    if any(result["family"] == BASE for result in scores):
        lines[-1] += (
            " The base was taught neither the answers' form nor to end where they end, and an answer that goes on is "
            "wrong: what an adapter gains over it is of both, and no measure of what it learned of a task."
        )
    return lines


def _is_guessed(scores: Rows, task: str) -> bool:
    """Whether no group, over all its seeds, is above guessing by more than its questions' error explains: were all of
    them guessing, one would be in 5 % of all cases."""
    chance = max(GUESSED.get(task, 0.0), _NOTHING)
    taught = [results for results in groups(scores).values() if results[0]["family"] != BASE]
    for results in taught:
        mean, questions = statistics.mean(r["by_task"][task] for r in results) / 100, len(results[0]["right"][task])
        errors = statistics.NormalDist().inv_cdf(1 - 0.05 / len(taught))
        if mean > chance + errors * math.sqrt(chance * (1 - chance) / questions):
            return False
    return bool(taught)


def guessing(tasks: Sequence[str]) -> float:
    """The average score of someone who knows the answers of each task and draws one, percent."""
    return 100 * statistics.mean(GUESSED.get(task, 0.0) for task in tasks)


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} - {ratio['high']:.2f})"


def _step_table(steps: Rows) -> list[str]:
    if not steps:
        return []
    lines = [
        "Median over the turns, with its quartiles, of the time over LoRA's in the same turn. The first step moves "
        "what a layer gives by so many percent: alpha is there to make that alike.",
        "",
        "| | layers | targets | trained parameters | seconds a step | over LoRA's | moved by the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in steps:
        name, layers = _step_name(row)
        taken = f"{statistics.median(row['seconds']):.2f}"
        timed = (taken, _ratio(row["over_lora"]), f"{100 * row['moved']:.2f} %")
        cells = [name, layers, TARGET_NAMES[row["targets"]], f"{row['parameters']:,}", *timed]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _step_name(row: Mapping[str, Any]) -> tuple[str, str]:
    """The family with its number of experts, and in which form its layers compute."""
    if row["family"] == "lora":
        return NAMES["lora"], "-"
    return f"{NAMES[row['family']]}, k={row['experts']}", row["implementation"]


def _inference_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    ways = list(dict.fromkeys(row["row"] for row in rows))
    workloads = [row["workload"] for row in rows]
    asked = " or ".join(dict.fromkeys(f"{w['batch']} x {w['length']} tokens, {w['count']} more" for w in workloads))
    lines = [
        f"Time over that of the same base without experts, in the same turns ({asked}): median and quartiles. "
        f"Each family was timed with its bases in turns of its own, {_openings(rows)}.",
        "",
        f"| | targets | | {' | '.join(ways)} |",
        "|---" * (len(ways) + 3) + "|",
    ]
    keys = dict.fromkeys((row["family"], row["experts"], row["targets"], row["quantity"]) for row in rows)
    for family, experts, targets, quantity in keys:
        of = {
            r["row"]: r
            for r in rows
            if (r["family"], r["experts"], r["targets"], r["quantity"]) == (family, experts, targets, quantity)
        }
        name = NAMES[family] + ("" if family == "lora" else f", k={experts}")
        cells = [_ratio(of[way]["over_base"]) if way in of else "-" for way in ways]
        lines.append(f"| {name} | {TARGET_NAMES[targets]} | {quantity} | {' | '.join(cells)} |")
    return lines


def _over_pytorch(row: Mapping[str, Any], exports: Rows) -> str:
    """Points that a bundle has over the same adapter in PyTorch; where few answers make them, how many do."""
    (reference,) = (other for other in exports if (other["cell"], other["form"]) == (row["cell"], TORCH))
    marks = [pair for task, ours in row["right"].items() for pair in zip(ours, reference["right"][task], strict=True)]
    won, lost = marks.count(("1", "0")), marks.count(("0", "1"))
    # One training in two forms: which of the seeds it is makes no difference.
    gap = difference([{**row, "seed": 0}], [{**reference, "seed": 0}])
    if won + lost < _FEW or not gap.questions_freedom:
        return f"{gap.points:+.1f} ({won} won, {lost} lost)" if won + lost else "0 (the same)"
    return f"{gap.points:+.1f} ± {student(gap.questions_freedom) * gap.error:.1f} ({won} won, {lost} lost)"


def _openings(rows: Rows) -> str:
    """Of how many openings of the models; figures of one differ from another's by more than its quartiles say."""
    counts = sorted({row.get("openings", 1) for row in rows})
    told = " or ".join("one opening" if count == 1 else f"{count} openings" for count in counts)
    return f"of {told} of all models"


def _export_table(exports: Rows) -> list[str]:
    if not exports:
        return []
    lines = [
        "| | runs in | size | average score | over PyTorch's | answers as PyTorch's |",
        "|---|---|---|---|---|---|",
    ]
    for row in exports:
        size = f"{row['bytes'] / 1e6:.0f} MB" if row["bytes"] else "-"
        runs = f"{TORCH}, fp32" if row["form"] == TORCH else f"ONNX Runtime, {row['form']}"
        over = "-" if row["form"] == TORCH else _over_pytorch(row, exports)
        lines.append(f"| {row['cell']} | {runs} | {size} | {row['mean']:.1f} | {over} | {row['same']:.1f} % |")
    lines += ["", "Won and lost: answers. ±: 95 %, of the questions alone; another training may lose more or less."]
    codes = dict.fromkeys(row["code"] for row in exports if "code" in row)
    return [*lines, "", f"Of code {', '.join(codes)}."] if codes else lines


def write_plot(found: Mapping[str, Any], path: Path) -> None:
    """Average scores with their spread over seeds, and a training step's time over LoRA's."""
    # Without pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    panels = [rows for rows in (found["scores"], found["steps"]) if rows]
    figure = Figure(
        figsize=(9, 1 + 0.3 * sum(len(groups(found["scores"])) if p is found["scores"] else len(p) for p in panels)),
        layout="constrained",
    )
    places = iter(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
    if found["scores"]:
        axes = next(places)
        for results in reversed(groups(found["scores"]).values()):
            means = [result["mean"] for result in results]
            label = f"{name_of(results[0])} ({results[0]['targets']})" if results[0]["family"] != BASE else "the base"
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            axes.errorbar(statistics.mean(means), label, xerr=spread, fmt="o", color="#0969da", capsize=3)
        axes.axvline(guessing(list(found["scores"][0]["by_task"])), color="#57606a", linewidth=1, linestyle=":")
        axes.set_xlabel(
            "average score, percent; dotted: guessing"
            + (" (bars: spread over seeds)" if len(found["seeds"]) > 1 else "")
        )
    if found["steps"]:
        axes = next(places)
        for row in reversed(found["steps"]):
            ratio = row["over_lora"]
            errors = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            name, layers = _step_name(row)
            label = f"{name}{'' if layers == '-' else f', {layers}'} ({row['targets']})"
            axes.errorbar(ratio["median"], label, xerr=errors, fmt="o", color="#cf222e")
        axes.axvline(1, color="#57606a", linewidth=1)
        axes.set_xlabel("time of a training step over LoRA's (bars: quartiles)")
    figure.suptitle(found["title"])
    figure.savefig(path, format="png", dpi=110)
