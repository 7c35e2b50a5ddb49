"""What PyTorch computes of the rows of a batch, each alone with its own adapter; and where one that departs does so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from teamlora_export.adapter import AdapterSpec
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import SafetensorsWeights
from teamlora_export.ports import Port
from teamlora_export.validate.cases import Case, Feeds, Step, follow_case
from teamlora_export.validate.judge import Follower
from teamlora_export.validate.local import local_judge
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.sources import torch_dtype
from teamlora_export.validate.taps import EXPERTS, module_of
from teamlora_export.validate.torch_runner import HeldWeights, TorchRunner
from teamlora_export.validate.verdict import Departure


class RowsApart:
    """What PyTorch computes of each row of one case alone, with the row's own adapter.

    Args:
        adapters: those that rows have, as the base names their modules.
        held, weights: see `TorchRunner`.
    """

    def __init__(
        self,
        base: BaseModel,
        adapters: Mapping[str, AdapterSpec],
        rows: Sequence[str | None],
        case: Case,
        inputs: Sequence[Port],
        held: HeldWeights | None = None,
        weights: SafetensorsWeights | None = None,
    ) -> None:
        self._base, self._adapters, self._rows, self._held, self._weights = base, adapters, rows, held, weights
        self._case, self._inputs = case, inputs

    def follow(self, dtype: torch.dtype) -> tuple[Recorded, Redrawable]:
        """The steps of the case in float64 and in `dtype`, along the likeliest tokens of float64."""
        names = list(dict.fromkeys(self._rows))
        reference, pytorch = self._run(lambda name: [self._follower(name, kind) for kind in (torch.float64, dtype)])

        def again(draw: int) -> Recorded:
            def drawn(name: str | None) -> list[Follower]:
                return [self._follower(name, dtype).again(len(names) * draw + names.index(name))]

            return Recorded(self._run(drawn, reference)[1])

        return Recorded(reference), Redrawable(pytorch, again)

    def _run(
        self, followers: Callable[[str | None], Sequence[Follower]], leading: Sequence[Feeds] = ()
    ) -> list[list[Feeds]]:
        """All rows as one batch, by follower and step, along the likeliest tokens of the first.

        Args:
            followers: of a row's adapter, as many for each. leading: the steps of one that goes before them.
        """
        found: dict[int, list[list[Feeds]]] = {}
        for name in dict.fromkeys(self._rows):
            runners = followers(name)
            for row in [row for row, own in enumerate(self._rows) if own == name]:
                known = [Recorded([_sliced(step, row) for step in leading])] if leading else []
                found[row] = self._steps(row, [*known, *runners])
        by_follower = zip(*(found[row] for row in range(len(self._rows))), strict=True)
        return [_joined(rows) for rows in by_follower]

    def locate(self, graph: OnnxRunner, step: Step) -> Iterator[Departure]:
        """Of each row that departs in a step of the whole batch: the first module that does, each judged on what
        `graph` had before it."""
        manifest = graph.bundle.manifest
        found, dtypes = graph.run_with_taps(step.feeds), (torch.float64, torch_dtype(manifest.dtype))
        for name in dict.fromkeys(self._rows):
            reference = self._runner(name, dtypes[0])
            ours, theirs = _plain(name, reference), self._follower(name, dtypes[1])
            for row in [row for row, own in enumerate(self._rows) if own == name]:
                of_row = _row_of(found, row, step)
                judge = local_judge(graph, reference, ours, theirs, of_row)
                for check in judge.check_step(_row_of_step(step, row), self._case.name):
                    for judgement in [judgement for judgement in check.judgements if not judgement.passed][:1]:
                        reason = (
                            f"{judgement.name} errs by {judgement.error.rms:.2e} in one column, allowed is "
                            f"{judgement.allowed:.2e}, in row {row + 1} with {name or 'the base alone'} ({check.case})"
                        )
                        node = graph.producer_of(judgement.name)
                        yield Departure("rows", module_of(judgement.name), node, reason)

    def _runner(self, name: str | None, dtype: torch.dtype) -> TorchRunner:
        adapter = self._adapters[name] if name is not None else next(iter(self._adapters.values()))
        return TorchRunner(self._base, adapter, dtype, self._weights, self._held)

    def _follower(self, name: str | None, dtype: torch.dtype) -> TorchRunner | _Plain:
        return _plain(name, self._runner(name, dtype))

    def _steps(self, row: int, runners: Sequence[Follower]) -> list[list[Feeds]]:
        """A row's outputs, by runner and step."""
        case = replace(self._case, ids=self._case.ids[row : row + 1], mask=self._case.mask[row : row + 1])

        def run(_call: int, steps: Sequence[Step]) -> Sequence[Feeds]:
            return [runner.run(step.feeds, {}) for runner, step in zip(runners, steps, strict=True)]

        calls = [outputs for _, _, outputs in follow_case(self._inputs, case, run, len(runners))]
        return [list(of_runner) for of_runner in zip(*calls, strict=True)]


def _plain(name: str | None, runner: TorchRunner) -> TorchRunner | _Plain:
    return _Plain(runner, runner) if name is None else runner


def _joined(rows: Sequence[Sequence[Feeds]]) -> list[Feeds]:
    """Rows of outputs, [step], as one batch."""
    return [
        {name: np.concatenate([outputs[name] for outputs in step]) for name in step[0]}
        for step in zip(*rows, strict=True)
    ]


class Recorded:
    """Outputs that were computed before, step by step."""

    def __init__(self, steps: Sequence[Feeds]) -> None:
        self._steps = iter(steps)

    def run(self, _feeds: Feeds, _choices: Feeds) -> Feeds:
        return next(self._steps)


class Redrawable(Recorded):
    """Outputs that were computed before.

    Args:
        again: computes them with other roundings, which are others for another number.
    """

    def __init__(self, steps: Sequence[Feeds], again: Callable[[int], Recorded]) -> None:
        super().__init__(steps)
        self.again = again


@dataclass(frozen=True)
class _Plain:
    """The base alone, followed: experts add nothing.

    Args:
        follower: `runner`, or what runs it with other roundings.
    """

    runner: TorchRunner
    follower: Follower

    def run(self, feeds: Feeds, choices: Feeds) -> Feeds:
        with self.runner.without_experts():
            return self.follower.run(feeds, choices)

    def again(self, draw: int) -> _Plain:
        return _Plain(self.runner, self.runner.again(draw))

    def run_forced(self, feeds: Feeds, taps: Mapping[str, np.ndarray], jitter: bool = False) -> Feeds:
        with self.runner.without_experts():
            own = self.runner.run_forced(feeds, taps, jitter)
        return {n: np.zeros_like(value) if n.endswith(f"/{EXPERTS}") else value for n, value in own.items()}


@dataclass(frozen=True)
class _Shown:
    """What a candidate showed in a run before; for a `LocalJudge`."""

    values: Feeds

    def run_with_taps(self, _feeds: Feeds, wide: bool = False) -> Feeds:
        return self.values


def _row_of_step(step: Step, row: int) -> Step:
    case = replace(step.case, ids=step.case.ids[row : row + 1], mask=step.case.mask[row : row + 1])
    return Step(_sliced(step.feeds, row), step.mask[row : row + 1], case)


def _sliced(batch: Feeds, row: int) -> Feeds:
    return {name: array[row : row + 1] for name, array in batch.items()}


def _row_of(values: Feeds, row: int, step: Step) -> _Shown:
    """Values of a batch of several rows: those of one, also where all tokens stand in one axis; what is of no row
    stays."""
    rows, tokens = step.feeds["input_ids"].shape

    def of(array: np.ndarray) -> np.ndarray:
        each = {rows: 1, rows * tokens: tokens}.get(len(array) if array.ndim else 0)
        return array if each is None else array[row * each : (row + 1) * each]

    return _Shown({name: of(array) for name, array in values.items()})
