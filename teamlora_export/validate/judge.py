"""Runs the cases, decides, and finds the first module that departs.

The reference is the adapted PyTorch model in float64. PyTorch itself, run in the candidate's dtype, shows how much
error that
dtype costs. A candidate passes when each of its outputs errs at most `MULTIPLE` times as much (root mean square
over real
tokens) as PyTorch does, in that step or over all of them; with a floor of `FLOOR` units of roundoff, should PyTorch
err less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from teamlora_export.bundle import Port
from teamlora_export.validate.cases import Case, Feeds, position_ids
from teamlora_export.validate.metrics import ErrorStats, attended, kl_divergence, measure, top5_overlap
from teamlora_export.validate.runners import Runner

# Another order of additions moves an error by a factor of about two. ONNX Runtime's float32 Sigmoid adds to that: it is
# off by up to 1e-7, which is 1.7 % of its value at -12, and gated MLPs multiply it into activations of hundreds
# (SmolLM2-135M: 7 times PyTorch's error). Real faults move an error by a hundred and more.
MULTIPLE = 10.0
FLOOR = 4.0
# Module values are judged one by one, over few numbers, so by a wider margin.
MODULE_MULTIPLE = 16.0
# Largest error of a few against the root mean square of all.
_PEAK = 3.0
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class Judgement:
    """An error, what was allowed, and what PyTorch's own was."""

    name: str
    error: ErrorStats
    pytorch: ErrorStats
    allowed: float

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.error.rms <= self.allowed

    @property
    def times_pytorch(self) -> float:
        return self.error.rms / self.pytorch.rms if self.pytorch.rms > 0 else math.inf if self.error.rms > 0 else 0.0


@dataclass(frozen=True)
class CaseResult:
    """One case. `judgements` has the worst step of each output; token figures are for text generation only."""

    name: str
    judgements: tuple[Judgement, ...]
    greedy_tokens: int = 0
    greedy_equal: int = 0
    greedy_excused: int = 0
    top5: float | None = None
    kl: float | None = None

    @property
    def passed(self) -> bool:
        return all(j.passed for j in self.judgements) and self.greedy_equal + self.greedy_excused == self.greedy_tokens


@dataclass(frozen=True)
class Departure:
    """The first module whose output is wrong, and the node that makes it."""

    module: str
    node: str
    judgement: Judgement
    case: str


@dataclass(frozen=True)
class Verdict:
    dtype: str
    cases: tuple[CaseResult, ...]
    modules: tuple[Judgement, ...] = ()
    departure: Departure | None = None
    expert_use: dict[str, list[float]] = field(default_factory=dict)
    candidate: str = "ONNX Runtime"

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)

    @property
    def worst(self) -> Judgement:
        """The judgement that came closest to failing, or failed by most."""
        return max((j for case in self.cases for j in case.judgements), key=_severity)


@dataclass(frozen=True)
class _Step:
    """One call of the model: what all runners were fed (with the reference's cache), and the mask over all tokens
    so far."""

    feeds: Feeds
    mask: np.ndarray


@dataclass(frozen=True)
class _Measured:
    """One output in one step of one case, before it is judged."""

    case: Case
    step: _Step
    name: str
    ours: ErrorStats
    pytorch: ErrorStats


_TokenRow = tuple[np.ndarray, np.ndarray]


class Judge:
    """Compares `candidate` with `reference` (float64) and `pytorch` (the candidate's dtype) over cases.

    `inputs` are the candidate's, with the sizes of its cache. Run all cases with `add_case`, then ask for `results`.
    """

    def __init__(
        self, dtype: str, reference: Runner, pytorch: Runner, candidate: Runner, inputs: Sequence[Port]
    ) -> None:
        self._dtype = dtype
        self._runners = (reference, pytorch, candidate)
        self._inputs = inputs
        self._measured: list[_Measured] = []
        self._tokens: dict[str, list[_TokenRow]] = {}
        self._pytorch_squares: dict[str, list[float]] = defaultdict(list)

    def add_case(self, case: Case) -> None:
        """Run a case through prefill and, where it has steps, token-by-token decoding along the reference's greedy
        path."""
        self._tokens[case.name] = rows = []
        for step, (reference, pytorch, candidate) in self._steps(case):
            for name in reference:
                arrays = [attended(name, outputs[name], step.mask) for outputs in (reference, pytorch, candidate)]
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
            if measured.name not in outputs or _severity(judgement) > _severity(outputs[measured.name]):
                outputs[measured.name] = judgement
        return tuple(
            CaseResult(case, tuple(worst[case].values()), **_token_figures(rows, worst[case]))  # type: ignore[arg-type]
            for case, rows in self._tokens.items()
        )

    def locate(self, producer_of: Callable[[str], str]) -> Departure | None:
        """The first module that departs in the first step that failed, fed with the reference's own cache."""
        failing = next((m for m in self._measured if not self._judge_measured(m).passed), None)
        if failing is None:
            return None
        for judgement in self.judge_modules(failing.step):
            if not judgement.passed:
                return Departure(judgement.name, producer_of(judgement.name), judgement, failing.case.name)
        judgement = self._judge_measured(failing)
        return Departure(judgement.name, producer_of(judgement.name), judgement, failing.case.name)

    def judge_modules(self, step: _Step | None = None) -> Iterator[Judgement]:
        """Every module's output in one step (the first by default), in the order in which modules finish.

        Outputs of the model that no module returns (the cache) come last.
        """
        step = step or self._measured[0].step
        runs = [runner.run_with_taps(step.feeds) for runner in self._runners]
        for kind, multiple in ((1, MODULE_MULTIPLE), (0, MULTIPLE)):
            found = [run[kind] for run in runs]
            for name in found[0]:
                if all(name in values for values in found):
                    reference, pytorch, candidate = (attended(name, values[name], step.mask) for values in found)
                    stats = measure(candidate, reference), measure(pytorch, reference)
                    pooled = self._pooled(name) if kind == 0 else 0.0
                    yield self._judge(name, *stats, multiple=multiple, pooled=pooled)

    def _judge_measured(self, measured: _Measured) -> Judgement:
        return self._judge(measured.name, measured.ours, measured.pytorch, MULTIPLE, self._pooled(measured.name))

    def _judge(self, name: str, ours: ErrorStats, pytorch: ErrorStats, multiple: float, pooled: float) -> Judgement:
        floor = FLOOR * UNIT_ROUNDOFF[self._dtype] * pytorch.scale
        # Where PyTorch itself overflows in this dtype, the dtype is at fault, and nothing beyond the floor is allowed.
        theirs = pytorch.rms if math.isfinite(pytorch.rms) else 0.0
        return Judgement(name, ours, pytorch, max(multiple * max(theirs, pooled), floor))

    def _pooled(self, name: str) -> float:
        """PyTorch's error of an output, root mean square over all steps of all cases.

        One step's error is one draw: deep models turn the same rounding into ten times the error for another token.
        """
        squares = self._pytorch_squares.get(name)
        return math.sqrt(sum(squares) / len(squares)) if squares else 0.0

    def _steps(self, case: Case) -> Iterator[tuple[_Step, tuple[Feeds, Feeds, Feeds]]]:
        """Each runner decodes from its own cache; the tokens are the reference's."""
        ids, mask = case.ids, case.mask
        pasts: list[Feeds] = [{}, {}, {}]
        for _ in range(case.steps + 1):
            common = self._common_feeds(ids, mask)
            outputs = tuple(
                runner.run({**common, **self._past_feeds(past, len(mask))})
                for runner, past in zip(self._runners, pasts, strict=True)
            )
            yield _Step({**common, **self._past_feeds(pasts[0], len(mask))}, mask), outputs  # type: ignore[misc]
            if "logits" not in outputs[0] or not case.steps:
                return
            pasts = [{n: v for n, v in output.items() if n.startswith("present.")} for output in outputs]
            ids = outputs[0]["logits"][:, -1].argmax(axis=-1)[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)

    def _common_feeds(self, ids: np.ndarray, mask: np.ndarray) -> Feeds:
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feeds["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
        return {port.name: feeds[port.name] for port in self._inputs if port.name in feeds}

    def _past_feeds(self, past: Feeds, batch: int) -> Feeds:
        """A step's cache as the next one's input; an empty one before the first."""
        if past:
            return {f"past_key_values.{name.removeprefix('present.')}": value for name, value in past.items()}
        caches = [port for port in self._inputs if port.name.startswith("past_key_values.")]
        return {port.name: np.zeros((batch, port.shape[1], 0, port.shape[3]), np.float32) for port in caches}  # type: ignore[arg-type]


def _severity(judgement: Judgement) -> float:
    ratio = judgement.error.rms / judgement.allowed if judgement.allowed > 0 else math.inf
    return math.inf if math.isnan(ratio) else ratio


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
