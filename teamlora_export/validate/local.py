"""Judges every module by itself, fed with what the candidate computed before it.

Noise that earlier modules made is part of what is compared, on both sides, so that one operation's rounding is all that
may differ, however much a deep model amplifies it. Each column of each value is judged: a fault in one of hundreds of
columns hardly moves the error of all.

A graph in 16 bits is judged twice: as it runs, and in float32 arithmetic with the weights that are in the file. Without
the format's noise, a wrong structure shows as clearly as it does in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np

from teamlora_export.bundle import Port
from teamlora_export.validate.cases import Case, Feeds, Step, first_step, next_step
from teamlora_export.validate.metrics import ErrorStats, attended
from teamlora_export.validate.torch_runner import TorchRunner
from teamlora_export.validate.verdict import UNIT_ROUNDOFF, Judgement, LocalCheck

MULTIPLE = 8.0
# In units of roundoff of a column's own size, or of the median column's where that is larger.
FLOOR = {"fp32": 512.0, "fp16": 8.0, "bf16": 8.0}


class Tappable(Protocol):
    def run_with_taps(self, feeds: Feeds, wide: bool = False) -> Feeds:
        """Values by tap, then outputs by name; `wide`: in float32 arithmetic."""
        ...


class LocalJudge:
    """Judges `candidate` by `reference` (float64, weights rounded as the file's) and `pytorch` (its own dtype).

    Args:
        pytorch: None judges in float32 arithmetic alone.
        inexact: taps that are computed with constants that the graph's own type may have rounded.
    """

    def __init__(
        self,
        dtype: str,
        reference: TorchRunner,
        pytorch: TorchRunner | None,
        candidate: Tappable,
        inputs: Sequence[Port],
        inexact: Collection[str],
    ) -> None:
        self._dtype = dtype
        self._reference, self._pytorch, self._candidate = reference, pytorch, candidate
        self._inputs = inputs
        self._inexact = inexact

    def check(self, case: Case) -> Iterator[LocalCheck]:
        """The prompt of a case and, where the task generates, one token after it."""
        own = [False] if self._pytorch is not None else []
        for wide in own if self._dtype == "fp32" and own else [True, *own]:
            arithmetic = ", in float32 arithmetic" if wide else ""
            step = first_step(self._inputs, case)
            found = self._candidate.run_with_taps(step.feeds, wide)
            yield LocalCheck(f"{case.name}{arithmetic}", wide, tuple(self._judge(step, found, wide)))
            if case.steps:
                step = next_step(self._inputs, step, _finite(found), found["logits"])
                found = self._candidate.run_with_taps(step.feeds, wide)
                name = f"{case.name}, next token{arithmetic}"
                yield LocalCheck(name, wide, tuple(self._judge(step, found, wide)))

    def check_step(self, step: Step, name: str) -> Iterator[LocalCheck]:
        """One step as it is."""
        found = self._candidate.run_with_taps(step.feeds)
        yield LocalCheck(name, False, tuple(self._judge(step, found, False)))

    def _judge(self, step: Step, found: Feeds, wide: bool) -> Iterator[Judgement]:
        """Every value that the candidate shows, in the order in which PyTorch computes them."""
        reference = self._reference.run_forced(step.feeds, found)
        pytorch = self._pytorch.run_forced(step.feeds, found) if self._pytorch is not None and not wide else {}
        for name, exact in reference.items():
            if name not in found:
                continue
            theirs = attended(name, pytorch[name], step.mask) if name in pytorch else None
            kind = self._dtype if not wide or name in self._inexact else "fp32"
            floor = FLOOR[kind] * UNIT_ROUNDOFF[kind]
            yield judge_columns(
                name, attended(name, found[name], step.mask), attended(name, exact, step.mask), theirs, floor
            )


def judge_columns(
    name: str, candidate: np.ndarray, reference: np.ndarray, pytorch: np.ndarray | None, floor: float
) -> Judgement:
    """The worst column of arrays [tokens, ..]; its error is a root mean square over tokens.

    Allowed is `MULTIPLE` times PyTorch's error there, or `floor` times the column's size where that is more. A column
    that happens to be small, or to have been rounded well, is allowed what the median column is.
    """
    if candidate.shape != reference.shape:
        return Judgement(name, ErrorStats(np.inf, np.inf, 0.0), ErrorStats(0.0, 0.0, 0.0), 0.0)
    exact = _columns(reference)
    error = _rms(_columns(candidate) - exact)
    error[~np.isfinite(error)] = np.inf
    scale = _at_least_median(_rms(exact))
    theirs = _rms(_columns(pytorch) - exact) if pytorch is not None else np.zeros_like(scale)
    # Where PyTorch itself overflows in this dtype, the dtype is at fault, and nothing beyond the floor is allowed.
    theirs[~np.isfinite(theirs)] = 0.0
    theirs = _at_least_median(theirs)
    allowed = np.maximum(MULTIPLE * theirs, floor * scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(error > 0, error / allowed, 0.0)
    worst = int(share.argmax()) if share.size else None
    if worst is None:
        return Judgement(name, ErrorStats(0.0, 0.0, 0.0), ErrorStats(0.0, 0.0, 0.0), 0.0)
    size = float(scale[worst])
    return Judgement(
        name,
        ErrorStats(float(error[worst]), float(error.max()), size),
        ErrorStats(float(theirs[worst]), float(theirs.max()), size),
        float(allowed[worst]),
    )


def _columns(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1).astype(np.float64) if array.ndim else array.reshape(1, 1).astype(np.float64)


def _rms(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.mean(np.square(array), axis=0)) if len(array) else np.zeros(array.shape[1])


def _at_least_median(array: np.ndarray) -> np.ndarray:
    return np.maximum(array, np.median(array)) if array.size else array


def _finite(values: Feeds) -> Feeds:
    """Caches without NaN and infinity: at padding they are of no consequence, but when they are multiplied by zero."""
    return {
        name: np.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
        for name, value in values.items()
        if name.startswith("present.")
    }
