"""How sure a difference is: of scores, over questions and trainings; of times, over turns.

Nothing here knows the paper. What may be said of a difference is in `paper.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from method.groups import Rows


@dataclass(frozen=True)
class Interval:
    """A median, and where that of all such turns lies at 95 %; None of too few turns to say."""

    median: float
    bounds: tuple[float, float] | None

    def __str__(self) -> str:
        if self.bounds is None:
            return f"{self.median:.2f} (of too few turns or openings for an interval)"
        return f"{self.median:.2f} (95 %: {self.bounds[0]:.2f} - {self.bounds[1]:.2f})"


def interval(ratios: Sequence[float]) -> Interval:
    """By order statistics: of n turns, the k-th least and the k-th greatest hold the median unless fewer than k of n
    fair coins agree. Six turns are the fewest."""
    ordered, n = sorted(ratios), len(ratios)
    outside, k = 0.0, 0
    while (outside := outside + 2 * math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    return Interval(statistics.median(ordered), (ordered[k - 1], ordered[n - k]) if k else None)


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
        luck: of all groups with the same targets; None: of these two.
    """
    luck = luck or luck_of([ours, theirs])
    ours, theirs = of_common_seeds(ours, theirs)
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


def of_common_seeds(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
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
