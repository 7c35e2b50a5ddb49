"""How alike two weights are: whether one is what rounding leaves of the other, with no factor on rows or columns.

A correlation tells every two projections of a model apart, and is blind to factors: one on all of it (attention's
scale), on each row (what AWQ and SmoothQuant put into the norm or the projection in front), on each column. Each of
them makes a projection another than the model's, which experts that were trained beside the model's do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Four bits in blocks of 32 leave 0.99 of Gaussian weights; two bits 0.9. Different projections have none in common.
LEAST_CORRELATION = 0.85
# Of SmolLM2-135M's 210 projections in four bits: 0.02 at most in rows, 0.01 in columns, 0.01 in the whole. AWQ's scales
# of a deviation of 0.1 give 0.095 at least.
_MOST_SPREAD = 0.06
_MOST_FACTOR = 0.05
# A single row: 0.23 and 7 of its own errors there.
_MOST_ALONE = 0.4
_MOST_ERRORS = 12.0
# Rows of little else than zero tell nothing of a factor. Share of the median row.
_LEAST_SIZE = 0.1


@dataclass(frozen=True)
class Likeness:
    """Of a weight [columns, in] to another of that shape.

    Attributes:
        correlation: 1 where they are equal, or proportional. problem: the factor that it has, in words.
    """

    correlation: float
    problem: str | None = None

    @property
    def is_same(self) -> bool:
        return self.correlation > LEAST_CORRELATION and self.problem is None


def likeness(ours: Sequence[np.ndarray], theirs: np.ndarray) -> Likeness:
    """Of a weight `ours`, in one way or another of laying it out, and another's: the best of them."""
    found = [_compare(each, theirs) for each in ours]
    return max(found, key=lambda each: (each.is_same, each.correlation), default=Likeness(0.0))


def _compare(left: np.ndarray, right: np.ndarray) -> Likeness:
    if left.shape != right.shape:
        return Likeness(0.0)
    a, b = left.astype(np.float64), right.astype(np.float64)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    if not size > 0:
        return Likeness(float(np.array_equal(a, b)))
    correlation = float((a * b).sum() / size)
    return Likeness(correlation, _problem(a, b) if correlation > LEAST_CORRELATION else None)


def _problem(a: np.ndarray, b: np.ndarray) -> str | None:
    """Which factor `b` has over `a`; None where it has none."""
    factor = float((a * b).sum() / np.square(a).sum())
    # Two bits leave large weights smaller, and the rows that have them: what is lost counts as well.
    rest = 1 - float(np.square((a * b).sum()) / (np.square(a).sum() * np.square(b).sum()))
    found = {"rows": _spread(a, b / factor, 0), "columns": _spread(a, b / factor, 1)}
    name, (spread, _) = max(found.items(), key=lambda each: each[1][0])
    if not spread <= _MOST_SPREAD + rest / 2:
        return f"multiplied by a factor for each of the {name}, which differ by {spread:.0%}"
    name, (_, alone) = max(found.items(), key=lambda each: each[1][1])
    if not alone <= _MOST_ALONE + rest / 2:
        return f"multiplied in one of the {name} by a factor that is {alone:.0%} off"
    return f"multiplied by {factor:.3g}" if not abs(factor - 1) <= _MOST_FACTOR + rest / 2 else None


def _spread(a: np.ndarray, b: np.ndarray, axis: int) -> tuple[float, float]:
    """The deviation of the factors of `b` over `a` that are summed along `axis`, beyond what `b`'s errors explain; and
    by how much the one is off that is furthest from 1, if its error does not explain it.

    A factor is a least-squares fit, and counts by the size of what it is of.
    """
    sizes = np.square(a).sum(axis)
    told = (sizes > _LEAST_SIZE * np.median(sizes)) & (np.square(b).sum(axis) > 0)
    if a.shape[axis] < 2 or not told.any():
        return 0.0, 0.0
    factors = np.divide((a * b).sum(axis), sizes, out=np.ones_like(sizes), where=sizes > 0)
    errors = np.square(b - np.expand_dims(factors, axis) * a).sum(axis) / (a.shape[axis] - 1)
    variances = np.divide(errors, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    excess = (sizes * (np.square(factors - 1) - variances)).sum() / sizes.sum()
    off = np.abs(factors - 1)
    is_sure = told & (off > _MOST_ERRORS * np.sqrt(variances))
    return float(np.sqrt(max(excess, 0.0))), float(off[is_sure].max(initial=0.0))
