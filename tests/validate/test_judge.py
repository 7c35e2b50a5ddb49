"""Whether an output departs from end to end, where PyTorch's own error may be small by luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_adapter
from faults import Fault, ignore_the_mask, plant
from faults import judged as judge_bundle

from teamlora_export.bundle import read_bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.graph.choices import SeesChoices
from teamlora_export.ports import Port
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Case, Feeds, make_cases
from teamlora_export.validate.judge import DRAWS, Judge
from teamlora_export.validate.metrics import attended
from teamlora_export.validate.rows import RowsApart
from teamlora_export.validate.shelf import judge_mixed, mixed_case, open_shelf_sources
from teamlora_export.validate.stored import as_held
from teamlora_export.validate.torch_runner import Redrawn, TorchRunner, _shifted

INPUTS = [Port("input_ids", "INT64", ("batch", "sequence")), Port("attention_mask", "INT64", ("batch", "sequence"))]
ROUNDOFF = DTYPES["fp32"].roundoff
SQUARE = Case("one", np.ones((1, 3), np.int64), np.ones((1, 3), np.int64))


class Erring:
    """A model whose outputs are ones, and err by so many units of roundoff in each call; and by others with other
    roundings. Any that follows another keeps what it was told to choose."""

    def __init__(self, drawn: Sequence[float] = (), choice: str = "", **errors: float | Sequence[float]) -> None:
        self.drawn, self.choice, self.errors = drawn, choice, errors
        self.calls, self.asked = 0, []
        self.told: list[list[int]] = []

    def run(self, feeds: Feeds, choices: Mapping[str, np.ndarray] | None = None) -> Feeds:
        ones, call = np.ones((*feeds["input_ids"].shape, 8)), self.calls
        self.calls += 1
        self.told.append([int(taken[0]) for taken in (choices or {}).values()])
        errors = {name: error[call] if isinstance(error, list) else error for name, error in self.errors.items()}
        chosen = {self.choice: np.array([call])} if self.choice else {}
        return {name: ones + error * ROUNDOFF for name, error in errors.items()} | chosen

    def again(self, draw: int) -> Erring:
        self.asked.append(Erring(**dict.fromkeys(self.errors, self.drawn[draw])))
        return self.asked[-1]


def judged(candidate: Erring, pytorch: Erring, case: Case = SQUARE) -> Judge:
    judge = Judge("fp32", Erring(**dict.fromkeys(candidate.errors, 0.0)), pytorch, candidate, INPUTS)
    judge.add_case(case)
    judge.draw_again()
    return judge


@pytest.mark.parametrize(
    ("error", "drawn", "passes", "asked"),
    [
        # PyTorch errs by 10 units: 100 are allowed.
        (90, [], True, 0),
        (300, [40], True, 1),
        (300, [10, np.inf, 20, 31], True, 4),
        (300, [10, 29, 20, np.nan], False, 4),
        # By more than any luck, unless the second draw says otherwise.
        (1100, [10], False, 1),
        (1100, [20, 10, 111], True, 3),
        (np.nan, [], False, 0),
    ],
)
def test_before_an_output_departs_pytorch_rounds_otherwise(error, drawn, passes, asked):
    pytorch = Erring(drawn, logits=10)
    judge = judged(Erring(logits=error), pytorch)
    [result] = judge.results()
    assert (result.passed, judge.first_failure() is None, len(pytorch.asked)) == (passes, passes, asked)
    if asked and passes:
        assert result.judgements[0].pytorch.rms == pytest.approx(drawn[-1] * ROUNDOFF)


def test_an_output_that_passes_is_not_asked_about_with_another():
    judge = judged(Erring(key=300, value=90), Erring([40], key=10, value=10))
    found = {judgement.name: judgement.pytorch.rms for judgement in judge.results()[0].judgements}
    assert found == pytest.approx({"key": 40 * ROUNDOFF, "value": 10 * ROUNDOFF})


def test_where_pytorch_itself_overflows_no_other_roundings_are_asked_for():
    pytorch = Erring([40], logits=np.inf)
    assert not judged(Erring(logits=300), pytorch).results()[0].passed and not pytorch.asked


@pytest.mark.parametrize("case", [replace(SQUARE, steps=2), replace(SQUARE, part=1)], ids=["tokens", "parts"])
def test_in_each_call_a_draw_takes_the_candidates_choices_and_is_measured_by_itself(case):
    pytorch = Erring([40], logits=10)
    judge = judged(Erring(logits=[90, 300, 90], choice="router/choice"), pytorch, case)
    assert judge.results()[0].passed
    [drawn] = pytorch.asked
    assert drawn.told == pytorch.told == [[0], [1], [2]]
    assert [m.pytorch.rms for m in judge._measured] == pytest.approx([10 * ROUNDOFF, 40 * ROUNDOFF, 10 * ROUNDOFF])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "float32"), ("llama", "float16"), ("llama", "bfloat16"), ("gemma3", "float32"), ("bert", "float32")],
)
def test_other_roundings_are_as_large_as_a_models_own(name, dtype, make_base):
    """Each draw is another, and the model stays what it is."""
    base = make_base(name)
    adapter = random_adapter(base, ("q_proj", "down_proj", "query"))
    exact, runner = (TorchRunner(base, adapter, getattr(torch, kind)) for kind in ("float64", dtype))
    own, moved = [], []
    for case in make_cases(base.config, base.task)[:3]:
        feeds = {"input_ids": case.ids, "attention_mask": case.mask}

        def run(of: TorchRunner | Redrawn, feeds: Feeds = feeds, mask: np.ndarray = case.mask) -> np.ndarray:
            output = next(iter(of.run(feeds).items()))
            return attended(*output, mask, mask.shape[1]).astype(np.float64)

        reference, before = run(exact), run(runner)
        drawn = [run(runner.again(draw)) for draw in range(DRAWS)]
        assert len({array.tobytes() for array in (before, *drawn)}) == 1 + DRAWS
        own.append(np.mean((before - reference) ** 2))
        moved += [np.mean((array - before) ** 2) for array in drawn]
        np.testing.assert_array_equal(run(runner), before)
        np.testing.assert_array_equal(run(runner.again(0)), drawn[0])
    assert 0.3 < np.sqrt(np.mean(moved) / np.mean(own)) < 4


def test_a_rows_length_falls_otherwise():
    """Of 256 numbers each rounded by itself, all lengths would be alike, as a norm's scale would be in all draws."""
    generator, row = torch.Generator().manual_seed(0), torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    moved = torch.cat([_shifted(row, generator) for _ in range(200)])
    units = (torch.linalg.norm(moved.double(), dim=1) / torch.linalg.norm(row.double()) - 1) / ROUNDOFF
    assert 0.2 < float(units.std()) < 1 and abs(float(units.mean())) < 0.2
    whole = torch.tensor([0.0, torch.inf, torch.nan, torch.finfo(torch.float32).max])
    for _ in range(20):
        torch.testing.assert_close(_shifted(whole, generator)[:3], whole[:3], equal_nan=True)
        assert torch.isfinite(_shifted(whole, generator)[3])


def test_a_mixture_is_drawn_again_where_its_choices_are_known(make_base):
    """Its experts would be others."""
    base = make_base("olmoe")
    runner = TorchRunner(base, random_adapter(base, ("q_proj",)), torch.float16)
    feeds = {"input_ids": np.arange(3, 15)[None], "attention_mask": np.ones((1, 12), np.int64)}
    before = runner.run(feeds)
    np.testing.assert_array_equal(runner.again(0).run(feeds)["logits"], before["logits"])
    found = {}
    with SeesChoices(runner._model, lambda path, scores, top_k: found.setdefault(f"{path}/choice", top_k(scores))):
        runner.run(feeds)
    choices = {name: best[1].numpy() for name, best in found.items()}
    same, drawn = runner.run(feeds, choices), runner.again(0).run(feeds, choices)
    assert choices and same.keys() == drawn.keys()
    error = np.abs(drawn["logits"] - same["logits"]).max()
    assert 0 < error < 50 * DTYPES["fp16"].roundoff * np.abs(same["logits"]).max()


def test_of_what_is_located_nothing_is_drawn_again(make_bundle, tmp_path, monkeypatch):
    def run(*_: object) -> Feeds:
        raise AssertionError

    monkeypatch.setattr(Redrawn, "run", run)
    fault = {"mask ignored": Fault(ignore_the_mask, ".")}
    verdict = judge_bundle(plant(make_bundle("llama"), tmp_path / "bundle", fault))
    assert verdict.departures and not all(case.passed for case in verdict.cases)


@pytest.fixture
def of_rows(make_shelf):
    """The base and the adapters of a shelf, and its bundle."""
    bundle = read_bundle(make_shelf().folder)
    base, shelved = open_shelf_sources(bundle, None, {}, ["small", "lora"])
    return bundle, base, {name: as_held(adapter, bundle.manifest) for name, adapter in shelved.items()}


def test_rows_of_a_batch_are_drawn_again_each_with_its_own_adapter(of_rows):
    bundle, base, adapters = of_rows
    rows = ["small", None, "lora", "small"]
    case = mixed_case(rows, 384, 0, 2, 0)
    reference, pytorch = RowsApart(base, adapters, rows, case, bundle.manifest.inputs).follow(torch.float32)
    drawn = [pytorch.again(0), pytorch.again(0), pytorch.again(1)]
    for _ in range(case.calls):
        exact, first, *again = (of.run({}, {})["logits"] for of in (reference, pytorch, *drawn))
        np.testing.assert_array_equal(again[0], again[1])
        for row in range(len(rows)):
            assert len({of[row].tobytes() for of in (first, again[0], again[2])}) == 3
            real = case.mask[row, -exact.shape[1] :] > 0
            for own in (first, again[0], again[2]):
                np.testing.assert_allclose(own[row, real], exact[row, real], atol=1e-4)
        # Rows are unlike each other by far more.
        assert np.abs(exact[0, -1] - exact[3, -1]).max() > 1e-2 < np.abs(exact[0, -1] - exact[1, -1]).max()


def test_rows_that_depart_are_drawn_again(of_rows, monkeypatch):
    asked = []
    run = Redrawn.run
    monkeypatch.setattr(Redrawn, "run", lambda self, *given: (asked.append(self), run(self, *given))[1])
    monkeypatch.setattr("teamlora_export.validate.judge.FLOOR", 0.0)
    monkeypatch.setattr("teamlora_export.validate.judge._LUCK", np.inf)
    monkeypatch.setattr("teamlora_export.validate.shelf.MULTIPLE", 1e-3)
    bundle, base, adapters = of_rows
    judge_mixed(bundle, base, adapters, None, Reporter())
    # Of the base alone, where adapters are left out; of the base and both adapters.
    assert len({id(redrawn) for redrawn in asked}) == DRAWS * (1 + 3)
