"""What the paper says, and whether what was found says the same: a line in plain words for each of its claims."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from method.groups import NAMES, TARGET_NAMES, Result, Rows, groups, name_of
from method.plan import EXPERTS, FAMILIES
from method.significance import Gap, Interval, Luck, difference, interval, luck_of, of_common_seeds

# TeamLoRA, arXiv 2408.09856: averages over CME (LoRA's of rank 128, which is of the others' size; of rank 32, a quarter
# of it, 57.44), and times of a training and of an answer (40 % faster) over MoELoRA's.
PAPER_SCORES = {"teamlora": 60.29, "moelora": 59.69, "hydralora": 59.06, "lora": 58.81}
PAPER_TIMES = {2: 0.87, 4: 0.70, 8: 0.63}
PAPER_INFERENCE = 1 / 1.4
_READING = " where 40 % faster is 1/1.4, and 0.60 where it is 40 % less time"
# What `inference.py` calls the authors' layers.
PUBLISHED = "published, PyTorch"
# The published code has a packed form of teamlora beside its loop (`fast_forward`, lora.py at 8d8c102).
_LAYERS = {"published": "one by one", "packed": "packed"}
# A family and its form, over MoELoRA in a form.
_STEPS = (
    ("teamlora", "published", "published"),
    ("teamlora", "packed", "packed"),
    ("teamlora", "packed", "published"),
    ("moelora", "packed", "published"),
)


def verdicts(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each claim of the paper that was looked at."""
    by_group, gaps = groups(found["scores"]), list[Gap]()
    # What is right for a few layers may be too much for all of them, and luck larger there.
    luck_on = {targets: luck_of(_with(targets, by_group)) for targets in TARGET_NAMES}
    for targets, luck in luck_on.items():
        ours = by_group.get(f"teamlora-k4-{targets}")
        for family in ("moelora", "hydralora", "lora"):
            theirs = by_group.get(f"{family}-{targets}" if family == "lora" else f"{family}-k4-{targets}")
            if ours and theirs:
                gaps.append(difference(ours, theirs, luck))
                paper = PAPER_SCORES["teamlora"] - PAPER_SCORES[family]
                where = f"{NAMES[family]} of equal size on {TARGET_NAMES[targets]}"
                codes = _unlike_codes(*of_common_seeds(ours, theirs))
                yield f"- TeamLoRA, k=4, over {where}: {_told(gaps[-1], paper)}{codes}"
        half = by_group.get(f"teamlora-k4-{targets}-half")
        for theirs, whose in ((by_group.get(f"moelora-k4-{targets}"), "a MoELoRA"), (ours, "one with all of them")):
            if half and theirs:
                gaps.append(gap := difference(half, theirs, luck))
                codes = _unlike_codes(*of_common_seeds(half, theirs))
                where = f"{whose} on {TARGET_NAMES[targets]}"
                yield f"- TeamLoRA, k=4, with half the parameters over {where}: {gap}. {_tells(gap)}{codes}"
        yield from _farthest(by_group, targets, luck)
        yield from _whatever_the_experts(by_group, targets, luck)
        scores = {k: by_group.get(f"teamlora-k{k}-{targets}", []) for k in EXPERTS}
        if all(scores.values()):
            codes = _unlike_codes(*scores.values())
            yield f"- TeamLoRA by number of experts on {TARGET_NAMES[targets]}: {_told_of_experts(scores, luck)}{codes}"
    if margins := [gap.margin for gap in gaps if gap.margin is not None]:
        yield _least_told(margins)
        told = (
            f"{math.sqrt(luck.variance):.1f} points on {TARGET_NAMES[targets]} ({luck.freedom} degrees of freedom)"
            for targets, luck in luck_on.items()
            if luck.freedom
        )
        yield (
            "- The luck of a training, a standard deviation of the average score, is pooled over all trainings of this "
            f"run on the same targets, as if it were the same for each, and verdicts depend on it: {', '.join(told)}. "
            "All were of one draw of rows, and the questions of a task have few sentence frames: what another draw or "
            "other frames would change is not counted. No verdict is corrected for the number of them."
        )
    yield from _step_verdicts(found["steps"])
    yield from _inference_verdicts(found["inference"])


def _with(targets: str, by_group: Mapping[str, Rows]) -> list[Rows]:
    return [results for results in by_group.values() if results[0]["targets"] == targets]


def _farthest(by_group: Mapping[str, Rows], targets: str, luck: Luck) -> Iterator[str]:
    """How far apart any two families of equal size may be, where two seeds of at least two families tell it."""
    names = (f"{family}-{targets}" if family == "lora" else f"{family}-k4-{targets}" for family in FAMILIES)
    of_equal_size = [by_group[name] for name in names if name in by_group]
    found = [
        (abs(gap.points) + gap.margin, ours, theirs, gap)
        for ours, theirs in itertools.combinations(of_equal_size, 2)
        if (gap := difference(ours, theirs, luck)).margin is not None
    ]
    if found:
        bound, ours, theirs, gap = max(found, key=lambda pair: pair[0])
        yield (
            f"- Of {len(found)} pairs of families of equal size, k=4 on {TARGET_NAMES[targets]}, none is farther apart "
            f"than {bound:.1f} points, each by itself at 95 % ({name_of(ours[0])} over {name_of(theirs[0])}: {gap})."
        )


def _whatever_the_experts(by_group: Mapping[str, Rows], targets: str, luck: Luck) -> Iterator[str]:
    """Of the families with experts, over all numbers of them at once, where two seeds of each tell it: more trainings
    tell a smaller difference."""
    for family in ("moelora", "hydralora"):
        sides: tuple[list[Result], list[Result]] = ([], [])
        for k in EXPERTS:
            of_both = [by_group.get(f"{name}-k{k}-{targets}", []) for name in ("teamlora", family)]
            if not all(of_both) or min(map(len, pairs := of_common_seeds(*of_both))) < 2:
                break
            for side, results in zip(sides, pairs, strict=True):
                # A training is compared with that of its own number of experts.
                side += [{**result, "seed": (k, result["seed"])} for result in results]
        else:
            gap = difference(*sides, luck)
            if gap.margin is not None:
                over = f"TeamLoRA over {NAMES[family]} of equal size on {TARGET_NAMES[targets]}"
                numbers = f"{', '.join(map(str, EXPERTS[:-1]))} and {EXPERTS[-1]}"
                told = f"{gap.points:+.1f} points (± {gap.margin:.1f} at 95 %, {gap.seeds} trainings of each)"
                yield f"- {over}, k = {numbers} together: {told}. {_tells(gap)}"


def _least_told(margins: Sequence[float]) -> str:
    """How small a difference has no verdict, whatever is true."""
    of = [PAPER_SCORES["teamlora"] - score for family, score in PAPER_SCORES.items() if family != "teamlora"]
    least, most = f"{min(margins):.1f}", f"{max(margins):.1f}"
    return (
        f"- Differences of less than {least if least == most else f'{least} to {most}'} points cannot be told here; "
        f"the paper's are {min(of):.1f} to {max(of):.1f}. An error half as large takes four times the seeds, and four "
        "times the questions, of other sentences."
    )


def _unlike_codes(*sides: Rows) -> str:
    """Of which code each side of a comparison is, where that is not one and the same."""
    codes = [list(dict.fromkeys(result["code"] for result in results)) for results in sides]
    if len({code for of_side in codes for code in of_side}) == 1:
        return ""
    told = (f"{name_of(results[0])}: {', '.join(of_side)}" for results, of_side in zip(sides, codes, strict=True))
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
    for targets in TARGET_NAMES:
        for experts, paper in PAPER_TIMES.items():
            for family, how, of_moe in _STEPS:
                ours = seconds.get((targets, experts, family, how))
                theirs = seconds.get((targets, experts, "moelora", of_moe))
                if not ours or not theirs:
                    continue
                found = interval([a / b for a, b in zip(ours, theirs, strict=True)])
                claimed = paper if (family, targets, of_moe) == ("teamlora", "ffn", "published") else None
                over = f"{NAMES[family]} ({_LAYERS[how]}) over MoELoRA's ({_LAYERS[of_moe]})"
                where = f"k={experts} on {TARGET_NAMES[targets]}: {_told_of_time(found, claimed)}"
                yield f"- A training step of {over}, {where}"


def _inference_verdicts(rows: Rows) -> Iterator[str]:
    """Both over bases of their own; the paper says neither what it timed of inference nor for how many experts."""
    by_model: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["family"] in ("teamlora", "moelora"):
            of_model = by_model.setdefault((row["targets"], row["experts"], row["quantity"]), {})
            of_model.setdefault(row["row"], {})[row["family"]] = row
    for (targets, experts, quantity), ways in by_model.items():
        pairs = {way: found for way, found in ways.items() if len(found) == 2}
        over = {way: _over(found["teamlora"], found["moelora"]) for way, found in pairs.items()}
        if PUBLISHED not in over:
            continue
        claimed = PAPER_INFERENCE if (targets, experts) == ("ffn", 4) else None
        told = f"{PUBLISHED} {_told_of_time(over.pop(PUBLISHED), claimed, _READING)}"
        others = "; ".join(f"{way} {found}" for way, found in over.items())
        measured = {_measured(row) for found in pairs.values() for row in found.values()}
        yield (
            f"- Inference with TeamLoRA over MoELoRA's, {quantity}, k={experts} on {TARGET_NAMES[targets]}: {told}"
            f"{f' {others[0].upper()}{others[1:]}.' if others else ''}"
            f"{' Rows are of unlike code, machines or openings.' if len(measured) > 1 else ''}"
        )


def _measured(row: Mapping[str, Any]) -> tuple[object, ...]:
    """What two rows have to have in common."""
    machine = row.get("machine", {})
    versions = tuple(sorted(machine.get("versions", {}).items()))
    of_machine = (machine.get("processor"), machine.get("cores"), versions)
    return (row.get("code"), *of_machine, row.get("threads"), row.get("openings", 1), tuple(row["workload"].values()))


def _over(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Interval:
    """The ratio of two times over bases of their own. Of two intervals, the widest that their ratio has (at least
    90 %, and of six openings 93.8); none of turns of one opening, which another one's differ from by more."""
    one, other = interval(ours["ratios"]), interval(theirs["ratios"])
    opened = min(ours.get("openings", 1), theirs.get("openings", 1)) > 1
    if not opened or one.bounds is None or other.bounds is None:
        return Interval(one.median / other.median, None)
    return Interval(one.median / other.median, (one.bounds[0] / other.bounds[1], one.bounds[1] / other.bounds[0]))


def _told_of_time(found: Interval, paper: float | None, reading: str = "") -> str:
    """Of a time over MoELoRA's, and whether the paper's says the same.

    Args:
        reading: of the paper's words, where they are no figure.
    """
    if paper is None:
        return f"{found}."
    told = f"{found}; the paper {paper:.2f}{reading}."
    if found.bounds is None or found.bounds[0] <= paper < 1 <= found.bounds[1]:
        return f"{told} Cannot tell which takes less."
    if found.bounds[0] > 1:
        return f"{told} Does not agree: it takes more."
    if found.bounds[1] >= 1:
        return f"{told} Does not agree: what it saves, if anything, is less."
    if found.bounds[0] <= paper <= found.bounds[1]:
        return f"{told} Agrees."
    return f"{told} Agrees that it takes less, but saves {'less' if found.median > paper else 'more'} of it."


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
    return f"Cannot tell: {'fewer than two common seeds' if gap.seeds < 2 else 'one question a task'}."
