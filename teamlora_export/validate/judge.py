"""Runs the cases from end to end and judges the outputs.

The reference is the adapted PyTorch model in float64. PyTorch itself, run in the candidate's dtype, shows how much
error that dtype costs. An output passes when it errs at most `MULTIPLE` times as much (root mean square over real
tokens) as PyTorch's does, in that step or over all of them (`MULTIPLE_OF_CODES` where weights are codes); with a floor
of `FLOOR` units of roundoff, should PyTorch err less. Errors of a whole model hide what is wrong in one module:
`local.py` judges those.

One step's error is one draw, and where a model makes much of a rounding it may be by luck that PyTorch's is small. So
before an output is said to depart where nothing else is wrong, PyTorch runs the case up to `DRAWS` times more, each
time with other roundings (of a mixture, where the candidate shows what it chose), and the worst of its errors counts.

Where scores are nearly equal, a router in a low dtype may choose other experts than in float64, and all that follows
differs. So both PyTorch models take the experts that the candidate took, and its choices are judged by what they lose:
the best scores in float64, against those of the experts that it took.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from teamlora_export.dtypes import DTYPES
from teamlora_export.graph.choices import chosen_scores, is_choice
from teamlora_export.ports import Port
from teamlora_export.validate.cases import Case, Feeds, Step, follow_case
from teamlora_export.validate.metrics import ErrorStats, kl_divergence, measure, top5_overlap
from teamlora_export.validate.verdict import CaseResult, Judgement

# Another order of additions moves an error by a factor of about two, and one step's error is one draw: the worst of all
# steps was up to 3.5 times PyTorch's in healthy models. Real faults move an error by a hundred and more.
MULTIPLE = 10.0
# Kernels of products with codes add up block by block and take the offsets of codes out of whole sums: where a healthy
# model's worst step is 3.5 times PyTorch's elsewhere, it was 8.3 there.
MULTIPLE_OF_CODES = 30.0
FLOOR = 4.0
# Where all of an error comes through one number (a norm's scale, an expert's share), one draw in 16 is more than ten
# times another. Of independent ones, one in 50,000 is so many times the largest of five.
DRAWS = 4
# Times what is allowed: what errs by more with the second draw, too (one in 16,000), is asked about no more.
_LUCK = 10.0
# Largest error of a few against the root mean square of all.
_PEAK = 3.0


class Runner(Protocol):
    """Anything that can run a model; arrays go in and come out by the graph's own names."""

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name, and choices (indices) by tap where it can show them."""
        ...


class Follower(Protocol):
    """A runner that can take another's choices."""

    def run(self, feeds: Feeds, choices: Feeds) -> Feeds:
        """Outputs by name, and by tap what the choices were made by, and the best scores."""
        ...


class Drawable(Follower, Protocol):
    """A follower whose roundings can fall otherwise."""

    def again(self, draw: int) -> Follower:
        """The same model with other roundings, which are others for another `draw`."""
        ...


@dataclass(frozen=True)
class _Measured:
    """One output in one step of one case, before it is judged; `call` counts the steps of a case."""

    case: Case
    call: int
    step: Step
    name: str
    ours: ErrorStats
    pytorch: ErrorStats


_TokenRow = tuple[np.ndarray, np.ndarray]
# Of a call: what the reference gave, and what the candidate chose.
_Known = tuple[Feeds, Feeds]


class Judge:
    """Compares `candidate` with `reference` (float64) and `pytorch` (the candidate's dtype) over cases.

    `inputs` are the candidate's, with the sizes of its cache. Run all cases with `add_case`, where all else is right
    `draw_again`, then ask for `results`.

    Args:
        multiple: of PyTorch's error, that is allowed.
    """

    def __init__(
        self,
        dtype: str,
        reference: Follower,
        pytorch: Drawable,
        candidate: Runner,
        inputs: Sequence[Port],
        multiple: float = MULTIPLE,
    ) -> None:
        self._multiple = multiple
        self._dtype = dtype
        self._reference, self._pytorch, self._candidate = reference, pytorch, candidate
        self._inputs = inputs
        self._measured: list[_Measured] = []
        self._tokens: dict[str, list[_TokenRow]] = {}
        self._pytorch_squares: dict[str, list[float]] = defaultdict(list)
        # By case, where an output may depart.
        self._known: dict[str, list[_Known]] = {}

    def add_case(self, case: Case) -> None:
        """Run a case through prefill and, where it has steps, token-by-token decoding along the reference's greedy
        path."""
        self._tokens[case.name] = rows = []
        measured: list[_Measured] = []
        known: list[_Known] = []

        def run(_call: int, steps: Sequence[Step]) -> Sequence[Feeds]:
            candidate = self._candidate.run(steps[2].feeds)
            followers, choices = (self._reference, self._pytorch), _choices(candidate)
            return [f.run(s.feeds, choices) for f, s in zip(followers, steps, strict=False)] + [candidate]

        for call, step, (reference, pytorch, candidate) in follow_case(self._inputs, case, run, 3):
            known.append((reference, _choices(candidate)))
            candidate = chosen_scores(candidate, reference)
            for name in (name for name in reference if name in candidate):
                arrays = [step.attended(name, outputs[name]) for outputs in (reference, pytorch, candidate)]
                stats = measure(arrays[2], arrays[0]), measure(arrays[1], arrays[0])
                measured.append(_Measured(case, call, step, name, *stats))
                if math.isfinite(stats[1].rms):
                    self._pytorch_squares[name].append(stats[1].rms ** 2)
            if case.steps:
                rows.append((candidate["logits"][:, -1], reference["logits"][:, -1]))
        if any(m.ours.rms > self._allowed(m, m.pytorch.rms) for m in measured):
            self._known[case.name] = known
        self._measured += measured

    def draw_again(self) -> None:
        """Where an output departs, have PyTorch run its case again with other roundings; from now on the worst of its
        errors counts."""
        for name, known in self._known.items():
            for draw in range(DRAWS):
                asked = [m for m in self._measured if m.case.name == name and self._may_be_luck(m, draw)]
                if not asked:
                    break
                worse = self._drawn_again(asked, known, self._pytorch.again(draw))
                self._measured = [worse.get(id(m), m) for m in self._measured]
        self._known.clear()

    def results(self) -> tuple[CaseResult, ...]:
        """The verdict on each case that was added."""
        worst: dict[str, dict[str, Judgement]] = {case: {} for case in self._tokens}
        for measured in self._measured:
            judgement = self._judge_measured(measured)
            outputs = worst[measured.case.name]
            if measured.name not in outputs or judgement.severity > outputs[measured.name].severity:
                outputs[measured.name] = judgement
        return tuple(
            CaseResult(case, tuple(worst[case].values()), **_token_figures(rows, worst[case]))  # type: ignore[arg-type]
            for case, rows in self._tokens.items()
        )

    def first_failure(self) -> tuple[str, Step, Judgement] | None:
        """Case, step (with the reference's own cache) and output of the first that failed."""
        for measured in self._measured:
            judgement = self._judge_measured(measured)
            if not judgement.passed:
                return measured.case.name, measured.step, judgement
        return None

    def _may_be_luck(self, measured: _Measured, draws: int) -> bool:
        """It departs; and by little, once there were `draws` of PyTorch's error."""
        judgement = self._judge_measured(measured)
        most = _LUCK * judgement.allowed if draws else math.inf
        is_known = math.isfinite(measured.ours.rms) and math.isfinite(measured.pytorch.rms)
        return is_known and not judgement.passed and measured.ours.rms <= most

    def _drawn_again(
        self, asked: Sequence[_Measured], known: Sequence[_Known], drawn: Follower
    ) -> dict[int, _Measured]:
        """What was measured in steps of one case, each by its identity, with the worse of PyTorch's errors.

        Args:
            known: of each call. drawn: PyTorch, with other roundings.
        """

        def run(call: int, steps: Sequence[Step]) -> Sequence[Feeds]:
            reference, choices = known[call]
            return reference, drawn.run(steps[1].feeds, choices)

        by_place, worse = {(m.call, m.name): m for m in asked}, dict[int, _Measured]()
        for call, step, outputs in follow_case(self._inputs, asked[0].case, run, 2):
            for name in (name for name in outputs[0] if (call, name) in by_place):
                reference, pytorch = (step.attended(name, of[name]) for of in outputs)
                found, before = measure(pytorch, reference), by_place[call, name]
                if before.pytorch.rms < found.rms < math.inf:
                    worse[id(before)] = replace(before, pytorch=found)
        return worse

    def _judge_measured(self, measured: _Measured) -> Judgement:
        # Where PyTorch itself overflows in this dtype, the dtype is at fault, and nothing beyond the floor is allowed.
        theirs = measured.pytorch.rms if math.isfinite(measured.pytorch.rms) else 0.0
        theirs = max(theirs, self._pooled(measured.name))
        allowed = self._allowed(measured, theirs)
        return Judgement(measured.name, measured.ours, replace(measured.pytorch, rms=theirs), allowed)

    def _allowed(self, measured: _Measured, theirs: float) -> float:
        floor = FLOOR * DTYPES[self._dtype].roundoff * measured.pytorch.scale
        return max(self._multiple * theirs, floor)

    def _pooled(self, name: str) -> float:
        """PyTorch's error of an output, root mean square over all steps of all cases.

        One step's error is one draw: deep models turn the same rounding into ten times the error for another token.
        """
        squares = self._pytorch_squares.get(name)
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _choices(outputs: Feeds) -> Feeds:
    return {name: taken for name, taken in outputs.items() if is_choice(name)}


def _token_figures(rows: list[_TokenRow], outputs: dict[str, Judgement]) -> dict[str, float | int]:
    """Greedy agreement over the decoded steps. A token may differ where the reference's own lead over it is no
    larger than
    the error that is allowed at each of the two logits."""
    if not rows:
        return {}
    allowed = _PEAK * outputs["logits"].allowed
    tokens = equal = excused = 0
    for candidate, reference in rows:
        for ours, theirs in zip(candidate, reference, strict=True):
            tokens += 1
            best, chosen = int(theirs.argmax()), int(ours.argmax())
            equal += best == chosen
            excused += best != chosen and bool(theirs[best] - theirs[chosen] <= 2 * allowed)
    candidates, references = (np.concatenate([row[i] for row in rows]) for i in (0, 1))
    return {
        "greedy_tokens": tokens,
        "greedy_equal": equal,
        "greedy_excused": excused,
        "top5": top5_overlap(candidates, references),
        "kl": kl_divergence(candidates, references),
    }
