"""What was found, beside the paper's figures: tables in Markdown, a plot, and plain words where both compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from method.plan import BASE, EXPERTS

# TeamLoRA, arXiv 2408.09856: averages over CME, and time of a training and of an answer (40 % faster) over MoELoRA's.
PAPER_SCORES = {"teamlora": 60.29, "moelora": 59.69, "hydralora": 59.06, "lora": 58.81}
PAPER_TIMES = {2: 0.87, 4: 0.70, 8: 0.63}
PAPER_INFERENCE = 1 / 1.4
NAMES = {"teamlora": "TeamLoRA", "moelora": "MoELoRA", "hydralora": "HydraLoRA", "lora": "LoRA", BASE: "the base"}
# What `inference.py` calls the authors' layers.
PUBLISHED = "published, PyTorch"
# The published code has a packed form of teamlora beside its loop (`fast_forward`, lora.py at 8d8c102).
_LAYERS = {"published": "one by one", "packed": "packed"}
_TARGETS = {"ffn": "gate, up, down", "all": "all projections"}
# Student's t at 97.5 %, by degrees of freedom; more than these are taken for as many as the last.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}

Result = Mapping[str, Any]
Rows = Sequence[Result]


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
            text += ["", f"## {title}", "", *lines]
    return "\n".join(text) + "\n"


def groups(scores: Rows) -> dict[str, list[Result]]:
    """Results of the same cell but for the seed, by what `Cell.group` calls them."""
    found: dict[str, list[Result]] = {}
    for result in scores:
        found.setdefault(_group(result), []).append(result)
    return found


def _group(result: Result) -> str:
    name = str(result["cell"])
    return name if result["family"] == BASE else name.rpartition("-s")[0]


def _title(result: Result) -> str:
    name = NAMES[result["family"]]
    if result["family"] in (BASE, "lora"):
        return name
    return f"{name}, k={result['experts']}" + (", half the parameters" if result["share"] != 1 else "")


def _score_table(scores: Rows) -> list[str]:
    lines = [
        "| | targets | rank | trained parameters | seeds | average score | spread over seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for results in groups(scores).values():
        first, means = results[0], [result["mean"] for result in results]
        spread = f"{statistics.stdev(means):.1f}" if len(means) > 1 else "-"
        trained = ("-", "-", "0")
        if first["family"] != BASE:
            trained = (_TARGETS[first["targets"]], str(first["rank"]), f"{first['parameters']:,}")
        cells = [_title(first), *trained, str(len(results)), f"{statistics.mean(means):.1f}", spread]
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
        targets = "-" if results[0]["family"] == BASE else _TARGETS[results[0]["targets"]]
        lines.append(f"| {_title(results[0])} | {targets} | {' | '.join(shares)} |")
    return lines


def verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each claim of the paper that was looked at."""
    by_group = groups(found["scores"])
    for targets in _TARGETS:
        ours = by_group.get(f"teamlora-k4-{targets}")
        for family in ("moelora", "hydralora", "lora"):
            theirs = by_group.get(f"{family}-{targets}" if family == "lora" else f"{family}-k4-{targets}")
            if ours and theirs:
                paper = PAPER_SCORES["teamlora"] - PAPER_SCORES[family]
                where = f"{NAMES[family]} of equal size on {_TARGETS[targets]}"
                yield f"- TeamLoRA, k=4, over {where}: {_told(difference(ours, theirs), paper)}"
        half = by_group.get(f"teamlora-k4-{targets}-half")
        moe = by_group.get(f"moelora-k4-{targets}")
        if half and moe:
            gap = difference(half, moe)
            where = f"a MoELoRA on {_TARGETS[targets]}"
            yield f"- TeamLoRA, k=4, with half the parameters over {where}: {gap}. {_tells(gap)}"
        scores = {k: by_group.get(f"teamlora-k{k}-{targets}", []) for k in EXPERTS}
        if all(scores.values()):
            yield f"- TeamLoRA by number of experts on {_TARGETS[targets]}: {_told_of_experts(scores)}"
    yield from _step_verdicts(found["steps"])
    yield from _inference_verdicts(found["inference"])


def _told_of_experts(scores: Mapping[int, Rows]) -> str:
    means = {k: statistics.mean(result["mean"] for result in results) for k, results in scores.items()}
    gaps = [difference(scores[4], results) for k, results in scores.items() if k != 4]
    if all(gap.tells and gap.points > 0 for gap in gaps):
        verdict = "Agrees."
    elif any(gap.tells and gap.points < 0 for gap in gaps):
        verdict = "Does not agree."
    else:
        verdict = "Cannot tell."
    return f"{', '.join(f'k={k}: {mean:.1f}' for k, mean in means.items())}. The paper has k=4 best. {verdict}"


def _step_verdicts(steps: Rows) -> Iterator[str]:
    """The paper trained feed-forward layers alone. Which of its code's two ways it timed, it does not say."""
    seconds = {(row["targets"], row["experts"], row["family"], row["implementation"]): row["seconds"] for row in steps}
    for targets in _TARGETS:
        for experts, paper in PAPER_TIMES.items():
            for of_team, of_moe in (("published", "published"), ("packed", "packed"), ("packed", "published")):
                ours = seconds.get((targets, experts, "teamlora", of_team))
                theirs = seconds.get((targets, experts, "moelora", of_moe))
                if not ours or not theirs:
                    continue
                found = interval([a / b for a, b in zip(ours, theirs, strict=True)])
                claimed = paper if targets == "ffn" and of_moe == "published" else None
                where = f"k={experts} on {_TARGETS[targets]}: {_told_of_time(found, claimed)}"
                yield f"- A training step of TeamLoRA ({_LAYERS[of_team]}) over MoELoRA's ({_LAYERS[of_moe]}), {where}"


def _inference_verdicts(rows: Rows) -> Iterator[str]:
    """Both over bases of their own; the paper says neither what it timed of inference nor for how many experts."""
    ratios = {
        (row["family"], row["quantity"], row["row"]): interval(row["ratios"])
        for row in rows
        if (row["experts"], row["targets"]) == (4, "ffn")
    }
    for (family, quantity, way), ours in ratios.items():
        theirs = ratios.get(("moelora", quantity, way))
        if family != "teamlora" or theirs is None:
            continue
        # Of two intervals of their own, the widest that their ratio has.
        bounds = None if ours.bounds is None or theirs.bounds is None else (ours.bounds, theirs.bounds)
        found = Interval(
            ours.median / theirs.median, bounds and (bounds[0][0] / bounds[1][1], bounds[0][1] / bounds[1][0])
        )
        claimed = PAPER_INFERENCE if way == PUBLISHED else None
        yield (
            f"- Inference with TeamLoRA over MoELoRA's, {quantity}, {way}, k=4 on {_TARGETS['ffn']}: "
            f"{_told_of_time(found, claimed)}"
        )


@dataclass(frozen=True)
class Interval:
    """A median, and where that of all such turns lies at 95 %; None of too few turns to say."""

    median: float
    bounds: tuple[float, float] | None

    def __str__(self) -> str:
        if self.bounds is None:
            return f"{self.median:.2f} (too few turns for an interval)"
        return f"{self.median:.2f} (95 %: {self.bounds[0]:.2f} - {self.bounds[1]:.2f})"


def interval(ratios: Sequence[float]) -> Interval:
    """By order statistics: of n turns, the k-th least and the k-th greatest hold the median unless fewer than k of n
    fair coins agree. Six turns are the fewest."""
    ordered, n = sorted(ratios), len(ratios)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    return Interval(statistics.median(ordered), (ordered[k - 1], ordered[n - k]) if k else None)


def _told_of_time(found: Interval, paper: float | None) -> str:
    """Of a time over MoELoRA's, and whether the paper's says the same."""
    if paper is None:
        return f"{found}."
    told = f"{found}; the paper {paper:.2f}."
    if found.bounds is None or found.bounds[0] <= 1 <= found.bounds[1]:
        return f"{told} Cannot tell which takes less."
    if found.bounds[0] > 1:
        return f"{told} Does not agree: it takes more."
    if found.bounds[0] <= paper <= found.bounds[1]:
        return f"{told} Agrees."
    return f"{told} Agrees that it takes less, but saves {'less' if found.median > paper else 'more'} of it."


@dataclass(frozen=True)
class Gap:
    """A difference of average scores, in points.

    Attributes:
        error: standard error, of questions and of trainings. seeds: that both have.
    """

    points: float
    error: float
    seeds: int

    @property
    def margin(self) -> float | None:
        """Half the width of its interval of 95 %, by Student's t of the seeds; None of fewer than two."""
        freedom = min(self.seeds - 1, max(_STUDENT))
        return _STUDENT[freedom] * self.error if freedom >= 1 else None

    @property
    def tells(self) -> bool:
        return self.margin is not None and abs(self.points) > self.margin

    def __str__(self) -> str:
        if self.margin is None:
            return f"{self.points:+.1f} points (standard error of the questions alone {self.error:.1f})"
        return f"{self.points:+.1f} points (± {self.margin:.1f} at 95 %, {self.seeds} seeds)"


def difference(ours: Rows, theirs: Rows) -> Gap:
    """Of the average scores over the seeds that both have.

    Two variances are added. Of the questions: those of the same number are the same, so that differences are taken by
    question (averaged over seeds). Of the trainings: a seed's is one of many, so that differences are taken by seed;
    with one seed nothing is known of it.
    """
    ours, theirs = _of_common_seeds(ours, theirs)
    gaps, variances = [], []
    for task in ours[0]["right"]:
        pairs = zip(_means(ours, task), _means(theirs, task), strict=True)
        gap = [a - b for a, b in pairs]
        gaps.append(statistics.mean(gap))
        variances.append(statistics.variance(gap) / len(gap) if len(gap) > 1 else 0.0)
    points, variance = 100 * statistics.mean(gaps), 100**2 * sum(variances) / len(variances) ** 2
    by_seed = [_mean(our) - _mean(their) for our, their in zip(ours, theirs, strict=True)]
    if len(by_seed) > 1:
        variance += statistics.variance(by_seed) / len(by_seed)
    return Gap(points, math.sqrt(variance), len(by_seed))


def _of_common_seeds(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
    """In the same order. Where none is common, the first of each: nothing can be told then."""
    of_ours, of_theirs = ({result["seed"]: result for result in results} for results in (ours, theirs))
    common = [seed for seed in of_ours if seed in of_theirs]
    if not common:
        return ours[:1], theirs[:1]
    return [of_ours[seed] for seed in common], [of_theirs[seed] for seed in common]


def _mean(result: Result) -> float:
    """Percent, over the tasks."""
    return 100 * statistics.mean(statistics.mean(map(int, bits)) for bits in result["right"].values())


def _means(results: Rows, task: str) -> list[float]:
    return [
        statistics.mean(map(int, bits)) for bits in zip(*(result["right"][task] for result in results), strict=True)
    ]


def _tells(gap: Gap) -> str:
    if not gap.tells:
        return _cannot_tell(gap)
    return "Better." if gap.points > 0 else "Worse."


def _told(gap: Gap, paper: float) -> str:
    told = f"{gap}; the paper {paper:+.1f}."
    if not gap.tells:
        return f"{told} {_cannot_tell(gap)}"
    return f"{told} {'Agrees' if gap.points > 0 else 'Does not agree'} on which is better."


def _cannot_tell(gap: Gap) -> str:
    return "Cannot tell: one seed." if gap.margin is None else "Cannot tell: too small."


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
        name = NAMES[row["family"]] + ("" if row["family"] == "lora" else f", k={row['experts']}")
        layers = "-" if row["family"] == "lora" else row["implementation"]
        taken = f"{statistics.median(row['seconds']):.2f}"
        timed = (taken, _ratio(row["over_lora"]), f"{100 * row['moved']:.2f} %")
        cells = [name, layers, _TARGETS[row["targets"]], f"{row['parameters']:,}", *timed]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _inference_table(rows: Rows) -> list[str]:
    if not rows:
        return []
    ways = list(dict.fromkeys(row["row"] for row in rows))
    workload = rows[0]["workload"]
    asked = f"{workload['batch']} x {workload['length']} tokens, {workload['count']} more"
    lines = [
        f"Time over that of the same base without experts, in the same turns ({asked}): median and quartiles.",
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
        lines.append(f"| {name} | {_TARGETS[targets]} | {quantity} | {' | '.join(cells)} |")
    return lines


def _export_table(exports: Rows) -> list[str]:
    if not exports:
        return []
    lines = ["| | runs in | size | average score | answers as PyTorch's |", "|---|---|---|---|---|"]
    for row in exports:
        size = f"{row['bytes'] / 1e6:.0f} MB" if row["bytes"] else "-"
        runs = "PyTorch, fp32" if row["form"] == "PyTorch" else f"ONNX Runtime, {row['form']}"
        lines.append(f"| {row['cell']} | {runs} | {size} | {row['mean']:.1f} | {row['same']:.1f} % |")
    return lines


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
            label = f"{_title(results[0])} ({results[0]['targets']})" if results[0]["family"] != BASE else "the base"
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            axes.errorbar(statistics.mean(means), label, xerr=spread, fmt="o", color="#0969da", capsize=3)
        axes.set_xlabel("average score, percent" + (" (bars: spread over seeds)" if len(found["seeds"]) > 1 else ""))
    if found["steps"]:
        axes = next(places)
        for row in reversed(found["steps"]):
            ratio = row["over_lora"]
            errors = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axes.errorbar(ratio["median"], f"{row['row']} ({row['targets']})", xerr=errors, fmt="o", color="#cf222e")
        axes.axvline(1, color="#57606a", linewidth=1)
        axes.set_xlabel("time of a training step over LoRA's (bars: quartiles)")
    figure.suptitle(found["title"])
    figure.savefig(path, format="png", dpi=110)
