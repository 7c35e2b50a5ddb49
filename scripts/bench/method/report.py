"""What was found, beside the paper's figures: tables in Markdown, a plot, and plain words where both compare."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tasks import GUESSED

from method.plan import BASE, EXPERTS

# TeamLoRA, arXiv 2408.09856: averages over CME, and time of a training and of an answer (40 % faster) over MoELoRA's.
PAPER_SCORES = {"teamlora": 60.29, "moelora": 59.69, "hydralora": 59.06, "lora": 58.81}
PAPER_TIMES = {2: 0.87, 4: 0.70, 8: 0.63}
PAPER_INFERENCE = 1 / 1.4
_READING = " where 40 % faster is 1/1.4, and 0.60 where it is 40 % less time"
NAMES = {"teamlora": "TeamLoRA", "moelora": "MoELoRA", "hydralora": "HydraLoRA", "lora": "LoRA", BASE: "the base"}
# What `inference.py` calls the authors' layers.
PUBLISHED = "published, PyTorch"
# The published code has a packed form of teamlora beside its loop (`fast_forward`, lora.py at 8d8c102).
_LAYERS = {"published": "one by one", "packed": "packed"}
_TIMED = ("A training step", "Inference")
_TARGETS = {"ffn": "gate, up, down", "all": "all projections"}

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
            text += ["", f"## {title}", "", *lines, *_timed_on(rows if title in _TIMED else ())]
    return "\n".join(text) + "\n"


def _timed_on(rows: Rows) -> list[str]:
    """On which machine timings were taken, which need not be that of the scores."""
    machines = [json.dumps(row["machine"], sort_keys=True) for row in rows if "machine" in row]
    told = []
    for machine in map(json.loads, dict.fromkeys(machines)):
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        told.append(f"Timed on {machine['processor']}, {machine['cores']} cores, with {versions}.")
    return ["", *told] if told else []


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
    guessed = [f"{100 * GUESSED.get(task, 0):.0f}" for task in tasks]
    lines.append(f"| guessing | - | {' | '.join(guessed)} |")
    lines += ["", f"Guessing among the answers that a task has gives {guessing(tasks):.1f} on average."]
    if any(result["family"] == BASE for result in scores):
        lines[-1] += (
            " The base was taught neither the answers' form nor to end where they end, and an answer that goes on is "
            "wrong: what an adapter gains over it is of both, and no measure of what it learned of a task."
        )
    return lines


def guessing(tasks: Sequence[str]) -> float:
    """The average score of someone who knows the answers of each task and draws one, percent."""
    return 100 * statistics.mean(GUESSED.get(task, 0.0) for task in tasks)


def verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each claim of the paper that was looked at."""
    by_group, gaps = groups(found["scores"]), list[Gap]()
    luck = luck_of(by_group.values())
    for targets in _TARGETS:
        ours = by_group.get(f"teamlora-k4-{targets}")
        for family in ("moelora", "hydralora", "lora"):
            theirs = by_group.get(f"{family}-{targets}" if family == "lora" else f"{family}-k4-{targets}")
            if ours and theirs:
                gaps.append(difference(ours, theirs, luck))
                paper = PAPER_SCORES["teamlora"] - PAPER_SCORES[family]
                where = f"{NAMES[family]} of equal size on {_TARGETS[targets]}"
                codes = _unlike_codes(*_of_common_seeds(ours, theirs))
                yield f"- TeamLoRA, k=4, over {where}: {_told(gaps[-1], paper)}{codes}"
        half = by_group.get(f"teamlora-k4-{targets}-half")
        moe = by_group.get(f"moelora-k4-{targets}")
        if half and moe:
            gaps.append(gap := difference(half, moe, luck))
            where = f"a MoELoRA on {_TARGETS[targets]}"
            codes = _unlike_codes(*_of_common_seeds(half, moe))
            yield f"- TeamLoRA, k=4, with half the parameters over {where}: {gap}. {_tells(gap)}{codes}"
        scores = {k: by_group.get(f"teamlora-k{k}-{targets}", []) for k in EXPERTS}
        if all(scores.values()):
            codes = _unlike_codes(*scores.values())
            yield f"- TeamLoRA by number of experts on {_TARGETS[targets]}: {_told_of_experts(scores, luck)}{codes}"
    if margins := [gap.margin for gap in gaps if gap.margin is not None]:
        yield _least_told(margins)
    yield from _step_verdicts(found["steps"])
    yield from _inference_verdicts(found["inference"])


def _least_told(margins: Sequence[float]) -> str:
    """How small a difference has no verdict, whatever is true."""
    of = [PAPER_SCORES["teamlora"] - score for family, score in PAPER_SCORES.items() if family != "teamlora"]
    least, most = f"{min(margins):.1f}", f"{max(margins):.1f}"
    return (
        f"- Differences of less than {least if least == most else f'{least} to {most}'} points cannot be told here; "
        f"the paper's are {min(of):.1f} to {max(of):.1f}. An error half as large takes four times the questions and "
        "the seeds."
    )


def _unlike_codes(*sides: Rows) -> str:
    """Of which code each side of a comparison is, where that is not one and the same."""
    codes = [list(dict.fromkeys(result["code"] for result in results)) for results in sides]
    if len({code for of_side in codes for code in of_side}) == 1:
        return ""
    told = (f"{_title(results[0])}: {', '.join(of_side)}" for results, of_side in zip(sides, codes, strict=True))
    return f" Of unlike code: {'; '.join(told)}."


def _told_of_experts(scores: Mapping[int, Rows], luck: Luck) -> str:
    means = {k: statistics.mean(result["mean"] for result in results) for k, results in scores.items()}
    gaps = [difference(scores[4], results, luck) for k, results in scores.items() if k != 4]
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
            f"{_told_of_time(found, claimed, _READING)}"
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


def _told_of_time(found: Interval, paper: float | None, reading: str = "") -> str:
    """Of a time over MoELoRA's, and whether the paper's says the same.

    Args:
        reading: of the paper's words, where they are no figure.
    """
    if paper is None:
        return f"{found}."
    told = f"{found}; the paper {paper:.2f}{reading}."
    if found.bounds is None or found.bounds[0] <= 1 <= found.bounds[1]:
        return f"{told} Cannot tell which takes less."
    if found.bounds[0] > 1:
        return f"{told} Does not agree: it takes more."
    if found.bounds[0] <= paper <= found.bounds[1]:
        return f"{told} Agrees."
    return f"{told} Agrees that it takes less, but saves {'less' if found.median > paper else 'more'} of it."


@dataclass(frozen=True)
class Luck:
    """Of a training: the variance of its average score over seeds, and the degrees of freedom that tell it."""

    variance: float
    freedom: int


def luck_of(sides: Iterable[Rows]) -> Luck:
    """Pooled over all groups of a run: each alone has two or three trainings, which agree by luck too often, and would
    be sure of it."""
    means = [
        [float(np.mean([_right([result], task).mean() for task in result["right"]])) for result in results]
        for results in sides
    ]
    freedom = sum(len(group) - 1 for group in means)
    squares = sum(len(group) * statistics.pvariance(group) for group in means)
    return Luck(100.0**2 * squares / freedom if freedom else 0.0, freedom)


@dataclass(frozen=True)
class Gap:
    """A difference of average scores, in points.

    Attributes:
        of_questions, of_trainings: the two parts of its variance. questions_freedom, trainings_freedom: their degrees
            of freedom.
        seeds: that both have.
    """

    points: float
    of_questions: float
    questions_freedom: int
    of_trainings: float
    trainings_freedom: int
    seeds: int

    @property
    def error(self) -> float:
        """Its standard error."""
        return math.sqrt(self.of_questions + self.of_trainings)

    @property
    def margin(self) -> float | None:
        """Half the width of its interval of 95 %, by Student's t; None of fewer than two seeds, or where no task has
        two questions.

        Welch and Satterthwaite's degrees of freedom of a sum of two variances: hundreds of questions tell theirs well,
        a few trainings tell theirs badly, and what counts is which of them is the larger.
        """
        if self.seeds < 2 or not self.questions_freedom:
            return None
        parts = ((self.of_questions, self.questions_freedom), (self.of_trainings, self.trainings_freedom))
        spread = sum(variance**2 / freedom for variance, freedom in parts)
        return student(self.error**4 / spread) * self.error if spread else 0.0

    @property
    def tells(self) -> bool:
        return self.margin is not None and abs(self.points) > self.margin

    def __str__(self) -> str:
        if not self.questions_freedom:
            return f"{self.points:+.1f} points (of one question a task)"
        if self.margin is None:
            return f"{self.points:+.1f} points (standard error of the questions alone {self.error:.1f})"
        return f"{self.points:+.1f} points (± {self.margin:.1f} at 95 %, {self.seeds} seeds)"


@cache
def student(freedom: float) -> float:
    """What Student's t exceeds in either direction in 5 % of all cases; `freedom` from 1, not a whole number either."""
    # With t = sqrt(freedom) tan(angle), its density is a power of a cosine.
    norm = 2 * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def inside(bound: float) -> float:
        angles = np.linspace(0.0, math.atan(bound / math.sqrt(freedom)), 2001)
        return norm * float(np.trapezoid(np.cos(angles) ** (freedom - 1), angles))

    low, high = 0.0, 13.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def difference(ours: Rows, theirs: Rows, luck: Luck | None = None) -> Gap:
    """Of the average scores over the seeds that both have.

    Two variances are added. Of the questions: those of the same number are the same, so that differences are taken by
    question (averaged over seeds). Of the trainings: a seed's is one of many, and each side's mean is of so many of
    them; with one seed nothing is told.

    Args:
        luck: of all groups of the run; None: of these two.
    """
    luck = luck or luck_of([ours, theirs])
    ours, theirs = _of_common_seeds(ours, theirs)
    # [seeds, questions] of each task, in points.
    gaps = [100.0 * (_right(ours, task) - _right(theirs, task)) for task in ours[0]["right"]]
    by_question = [gap.mean(axis=0) for gap in gaps]
    by_seed = np.mean([gap.mean(axis=1) for gap in gaps], axis=0)
    of_questions = sum(gap.var(ddof=1) / len(gap) if len(gap) > 1 else 0.0 for gap in by_question) / len(gaps) ** 2
    return Gap(
        points=float(by_seed.mean()),
        of_questions=float(of_questions),
        questions_freedom=sum(len(gap) - 1 for gap in by_question),
        of_trainings=2 * luck.variance / len(by_seed) if len(by_seed) > 1 else 0.0,
        trainings_freedom=luck.freedom,
        seeds=len(by_seed),
    )


def _of_common_seeds(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
    """In the same order. Where none is common, the first of each: nothing can be told then."""
    of_ours, of_theirs = ({result["seed"]: result for result in results} for results in (ours, theirs))
    common = [seed for seed in of_ours if seed in of_theirs]
    if not common:
        return ours[:1], theirs[:1]
    return [of_ours[seed] for seed in common], [of_theirs[seed] for seed in common]


def _right(results: Rows, task: str) -> np.ndarray:
    """Whether each answer is right: [results, questions], float64."""
    bits = [np.frombuffer(result["right"][task].encode(), np.uint8) == ord("1") for result in results]
    return np.array(bits, np.float64)


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
    if gap.margin is not None:
        return "Cannot tell: within the error."
    return f"Cannot tell: {'one seed' if gap.seeds < 2 else 'one question a task'}."


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
            axes.errorbar(ratio["median"], f"{row['row']} ({row['targets']})", xerr=errors, fmt="o", color="#cf222e")
        axes.axvline(1, color="#57606a", linewidth=1)
        axes.set_xlabel("time of a training step over LoRA's (bars: quartiles)")
    figure.suptitle(found["title"])
    figure.savefig(path, format="png", dpi=110)
