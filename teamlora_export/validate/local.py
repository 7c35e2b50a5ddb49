"""Judges every module by itself, fed with what the candidate computed before it.

Noise that earlier modules made is part of what is compared, on both sides, so that one operation's rounding is all that
may differ, however much a deep model amplifies it. Each column of each value is judged: a fault in one of hundreds of
columns hardly moves the error of all.

What a router of experts takes is followed too, so that what comes after it is judged on the experts that the candidate
took. The choice itself is judged by the candidate's own scores: what it takes must score as the best of them do.

A graph in 16 bits is judged twice: as it runs, and in float32 arithmetic with the weights that are in the file. Without
the format's noise, a wrong structure shows as clearly as it does in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from teamlora_export.dtypes import DTYPES
from teamlora_export.graph.choices import chosen_scores
from teamlora_export.ports import Port
from teamlora_export.validate.cases import Case, Feeds, Step, first_step, next_step
from teamlora_export.validate.metrics import ErrorStats
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.sources import torch_dtype
from teamlora_export.validate.stored import kept_in_float32, recipes_of
from teamlora_export.validate.taps import whole_of
from teamlora_export.validate.torch_runner import TorchRunner
from teamlora_export.validate.verdict import Judgement, LocalCheck

# Kernels in 16 bits round at other places than PyTorch's (attention's scores and shares, for one): good models stay
# below a third of this. In float32 they stay below a tenth, and faults of a thousandth are above it.
MULTIPLE = 16.0
# In units of roundoff of a column's own size, or of the median column's where that is larger.
FLOOR = {"fp32": 512.0, "fp16": 32.0, "bf16": 32.0}
# In units of roundoff of a sum's size, for what is known only as the sum less the rest of it: rounding the sum to
# nearest takes one at most.
FLOOR_OF_SUM = 4.0
# In units of the 16-bit type, for values in float32 arithmetic that are made with constants rounded to that type.
FLOOR_OF_ROUNDED_CONSTANTS = 16.0


class Tappable(Protocol):
    def run_with_taps(self, feeds: Feeds, wide: bool = False) -> Feeds:
        """Values by tap, then outputs by name; `wide`: in float32 arithmetic."""
        ...


class Follower(Protocol):
    """What computes a module on what a candidate had before it: a `TorchRunner`, or a part of the model."""

    def run_forced(self, feeds: Feeds, taps: Mapping[str, np.ndarray], jitter: bool = False) -> Feeds: ...


class LocalJudge:
    """Judges `candidate` by `reference` (float64, weights rounded as the file's) and `pytorch` (its own dtype).

    Args:
        pytorch: None judges in float32 arithmetic alone.
        inexact: taps that are computed with constants that the graph's own type may have rounded.
        sums: taps that are differences (what the experts of a node of the op add), with the tap of the sum that holds
            them, whose rounding is theirs.
    """

    def __init__(
        self,
        dtype: str,
        reference: Follower,
        pytorch: Follower | None,
        candidate: Tappable,
        inputs: Sequence[Port],
        inexact: Collection[str],
        sums: Mapping[str, str],
    ) -> None:
        self._dtype = dtype
        self._reference, self._pytorch, self._candidate = reference, pytorch, candidate
        self._inputs = inputs
        self._inexact, self._sums = inexact, sums

    def check(self, case: Case) -> Iterator[LocalCheck]:
        """The prompt of a case and, where the task generates, one token after it (in the sharper arithmetic)."""
        sharp = self._dtype != "fp32" or self._pytorch is None
        yield from self._follow(case, sharp, bool(case.steps))
        if sharp and self._pytorch is not None:
            yield from self._follow(case, False, False)

    def _follow(self, case: Case, wide: bool, decode: bool) -> Iterator[LocalCheck]:
        name = f"{case.name}{', in float32 arithmetic' if wide else ''}"
        step = first_step(self._inputs, case)
        found = self._candidate.run_with_taps(step.feeds, wide)
        yield LocalCheck(name, wide, tuple(self._judge(step, found, wide)))
        if decode:
            step = next_step(self._inputs, step, _finite(found), found["logits"])
            found = self._candidate.run_with_taps(step.feeds, wide)
            yield LocalCheck(f"{name}, next token", wide, tuple(self._judge(step, found, wide)))

    def check_step(self, step: Step, name: str) -> Iterator[LocalCheck]:
        """One step as it is."""
        found = self._candidate.run_with_taps(step.feeds)
        yield LocalCheck(name, False, tuple(self._judge(step, found, False)))

    def _judge(self, step: Step, found: Feeds, wide: bool) -> Iterator[Judgement]:
        """Every value that the candidate shows, in the order in which PyTorch computes them."""
        reference = self._reference.run_forced(step.feeds, found)
        pytorch: Feeds = {}
        if self._pytorch is not None and not wide:
            # A runtime may round once more between modules, or once less (ONNX Runtime drops pairs of casts).
            pytorch = self._pytorch.run_forced(step.feeds, found, jitter=True)
        shown = chosen_scores(found, found)
        for name, exact in reference.items():
            if name not in shown:
                continue
            theirs = step.attended(name, pytorch[name]) if name in pytorch else None
            ours = step.attended(name, shown[name])
            yield judge_columns(
                name,
                ours,
                step.attended(name, exact),
                theirs,
                self._floor(name, wide),
                self._rounding(name, step, found, wide),
            )

    def _floor(self, name: str, wide: bool) -> float:
        if wide and name in self._inexact:
            return FLOOR_OF_ROUNDED_CONSTANTS * DTYPES[self._dtype].roundoff
        dtype = self._arithmetic(wide)
        return FLOOR[dtype] * DTYPES[dtype].roundoff

    def _rounding(self, name: str, step: Step, found: Feeds, wide: bool) -> np.ndarray | float:
        """What a difference may be off by because its sum was rounded, [columns]; nothing where the sum is no number,
        nor for other taps."""
        if name not in self._sums:
            return 0.0
        size = _rms(_columns(step.attended(name, found[self._sums[name]])))
        return FLOOR_OF_SUM * DTYPES[self._arithmetic(wide)].roundoff * np.where(np.isfinite(size), size, 0.0)

    def _arithmetic(self, wide: bool) -> str:
        return "fp32" if wide else self._dtype


def local_judge(
    graph: OnnxRunner, rounded: TorchRunner, reference: Follower, pytorch: Follower | None, candidate: Tappable
) -> LocalJudge:
    """The judge of what `candidate` shows of the inside of a bundle's `graph`.

    Args:
        rounded: what `reference` runs; from now on with the weights that the file holds.
    """
    manifest = graph.bundle.manifest
    recipes = recipes_of(manifest)
    rounded.round_weights(torch_dtype(manifest.dtype), kept_in_float32(graph.model, recipes))
    inexact = graph.inexact(recipes)
    sums = {name: whole_of(name) for name, tap in graph.taps.items() if tap.base is not None}
    return LocalJudge(manifest.dtype, reference, pytorch, candidate, manifest.inputs, inexact, sums)


def judge_columns(
    name: str,
    candidate: np.ndarray,
    reference: np.ndarray,
    pytorch: np.ndarray | None,
    floor: float,
    rounding: np.ndarray | float = 0.0,
) -> Judgement:
    """The worst column of arrays [tokens, ..]; its error is a root mean square over tokens.

    Allowed is `MULTIPLE` times PyTorch's error there, or `floor` times the column's size where that is more. A column
    that happens to be small is allowed what the median column is; one that PyTorch happens to round well, what it errs
    by in all, for its size. `rounding` [columns] is added to the floor.
    """
    if candidate.shape != reference.shape:
        return Judgement(name, ErrorStats(np.inf, np.inf, 0.0), ErrorStats(0.0, 0.0, 0.0), 0.0)
    ours, exact = _without_equal_infinities(_columns(candidate), _columns(reference))
    error = _rms(ours - exact)
    error[~np.isfinite(error)] = np.inf
    scale = _at_least_median(_rms(exact))
    theirs = _rms(_columns(pytorch) - exact) if pytorch is not None else np.zeros_like(scale)
    # Where PyTorch itself overflows in this dtype, the dtype is at fault, and nothing beyond the floor is allowed.
    theirs[~np.isfinite(theirs)] = 0.0
    relative = np.divide(theirs, scale, out=np.zeros_like(theirs), where=scale > 0)
    theirs = np.maximum(theirs, np.sqrt(np.mean(np.square(relative))) * scale if relative.size else 0.0)
    allowed = np.maximum(MULTIPLE * theirs, floor * scale + rounding)
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


def _without_equal_infinities(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Zero in both where they agree on an infinite number: a score that is masked."""
    masked = np.isinf(right) & (left == right)
    return np.where(masked, 0.0, left), np.where(masked, 0.0, right)


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
