"""Runs the cases from end to end and judges the outputs.

The reference is the adapted PyTorch model in float64. PyTorch itself, run in the candidate's dtype, shows how much
error that dtype costs. An output passes when it errs at most `MULTIPLE` times as much (root mean square over real
tokens) as PyTorch's does, in that step or over all of them (`MULTIPLE_OF_CODES` where weights are codes); with a floor
of `FLOOR` units of roundoff, should PyTorch err less. Errors of a whole model hide what is wrong in one module:
`local.py` judges those.

Where scores are nearly equal, a router in a low dtype may choose other experts than in float64, and all that follows
differs. So both PyTorch models take the experts that the candidate took, and its choices are judged by what they lose:
the best scores in float64, against those of the experts that it took.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from teamlora_export.dtypes import DTYPES
from teamlora_export.graph.choices import chosen_scores, is_choice
from teamlora_export.ports import Port
from teamlora_export.validate.cases import Case, Feeds, Step, first_step, next_step
from teamlora_export.validate.metrics import ErrorStats, kl_divergence, measure, top5_overlap
from teamlora_export.validate.verdict import CaseResult, Judgement

# Another order of additions moves an error by a factor of about two, and one step's error is one draw: the worst of all
# steps was up to 3.5 times PyTorch's in healthy models. Real faults move an error by a hundred and more.
MULTIPLE = 10.0
# Kernels of products with codes add up block by block and take the offsets of codes out of whole sums: where a healthy
# model's worst step is 3.5 times PyTorch's elsewhere, it was 8.3 there.
MULTIPLE_OF_CODES = 30.0
FLOOR = 4.0
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


@dataclass(frozen=True)
class _Measured:
    """One output in one step of one case, before it is judged."""

    case: Case
    step: Step
    name: str
    ours: ErrorStats
    pytorch: ErrorStats


_TokenRow = tuple[np.ndarray, np.ndarray]


class Judge:
    """Compares `candidate` with `reference` (float64) and `pytorch` (the candidate's dtype) over cases.

    `inputs` are the candidate's, with the sizes of its cache. Run all cases with `add_case`, then ask for `results`.

    Args:
        multiple: of PyTorch's error, that is allowed.
    """

    def __init__(
        self,
        dtype: str,
        reference: Follower,
        pytorch: Follower,
        candidate: Runner,
        inputs: Sequence[Port],
        multiple: float = MULTIPLE,
    ) -> None:
        self._multiple = multiple
        self._dtype = dtype
        self._followers, self._candidate = (reference, pytorch), candidate
        self._inputs = inputs
        self._measured: list[_Measured] = []
        self._tokens: dict[str, list[_TokenRow]] = {}
        self._pytorch_squares: dict[str, list[float]] = defaultdict(list)

    def add_case(self, case: Case) -> None:
        """Run a case through prefill and, where it has steps, token-by-token decoding along the reference's greedy
        path."""
        self._tokens[case.name] = rows = []
        for step, (reference, pytorch, candidate) in self._steps(case):
            candidate = chosen_scores(candidate, reference)
            for name in (name for name in reference if name in candidate):
                arrays = [step.attended(name, outputs[name]) for outputs in (reference, pytorch, candidate)]
                stats = measure(arrays[2], arrays[0]), measure(arrays[1], arrays[0])
                self._measured.append(_Measured(case, step, name, *stats))
                if math.isfinite(stats[1].rms):
                    self._pytorch_squares[name].append(stats[1].rms ** 2)
            if case.steps:
                rows.append((candidate["logits"][:, -1], reference["logits"][:, -1]))

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

    def _judge_measured(self, measured: _Measured) -> Judgement:
        pytorch = measured.pytorch
        floor = FLOOR * DTYPES[self._dtype].roundoff * pytorch.scale
        # Where PyTorch itself overflows in this dtype, the dtype is at fault, and nothing beyond the floor is allowed.
        theirs = pytorch.rms if math.isfinite(pytorch.rms) else 0.0
        theirs = max(theirs, self._pooled(measured.name))
        return Judgement(
            measured.name, measured.ours, replace(pytorch, rms=theirs), max(self._multiple * theirs, floor)
        )

    def _pooled(self, name: str) -> float:
        """PyTorch's error of an output, root mean square over all steps of all cases.

        One step's error is one draw: deep models turn the same rounding into ten times the error for another token.
        """
        squares = self._pytorch_squares.get(name)
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0

    def _steps(self, case: Case) -> Iterator[tuple[Step, tuple[Feeds, Feeds, Feeds]]]:
        """Each runner decodes from its own cache; the tokens are the reference's."""
        steps = [first_step(self._inputs, case)] * 3
        for remaining in reversed(range(case.calls)):
            candidate = self._candidate.run(steps[2].feeds)
            choices = {name: taken for name, taken in candidate.items() if is_choice(name)}
            reference, pytorch = (
                runner.run(step.feeds, choices) for runner, step in zip(self._followers, steps, strict=False)
            )
            outputs = reference, pytorch, candidate
            yield steps[0], outputs
            if remaining:
                logits = reference["logits"]
                steps = [next_step(self._inputs, s, o, logits) for s, o in zip(steps, outputs, strict=True)]


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
