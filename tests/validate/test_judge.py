"""Whether an output departs from end to end, where PyTorch's own error may be small by luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from conftest import random_adapter

from teamlora_export.bundle import read_bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.ports import Port
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Case, Feeds, make_cases
from teamlora_export.validate.judge import DRAWS, Judge
from teamlora_export.validate.metrics import attended
from teamlora_export.validate.shelf import judge_mixed, open_shelf_sources
from teamlora_export.validate.stored import as_held
from teamlora_export.validate.torch_runner import Redrawn, TorchRunner

INPUTS = [Port("input_ids", "INT64", ("batch", "sequence")), Port("attention_mask", "INT64", ("batch", "sequence"))]
ROUNDOFF = DTYPES["fp32"].roundoff
SQUARE = Case("one", np.ones((1, 3), np.int64), np.ones((1, 3), np.int64))


class Erring:
    """A model whose outputs are ones, and err by so many units of roundoff; and by others with other roundings."""

    def __init__(self, drawn: Sequence[float] = (), **errors: float) -> None:
        self.errors, self.drawn = errors, drawn
        self.asked = 0

    def run(self, feeds: Feeds, _choices: Mapping[str, np.ndarray] | None = None) -> Feeds:
        ones = np.ones((*feeds["input_ids"].shape, 8))
        return {name: ones + error * ROUNDOFF for name, error in self.errors.items()}

    def again(self, draw: int) -> Erring:
        self.asked += 1
        return Erring(**dict.fromkeys(self.errors, self.drawn[draw]))


def judged(candidate: Mapping[str, float], pytorch: Erring) -> Judge:
    judge = Judge("fp32", Erring(**dict.fromkeys(candidate, 0.0)), pytorch, Erring(**candidate), INPUTS)
    judge.add_case(SQUARE)
    return judge


@pytest.mark.parametrize(
    ("error", "drawn", "passes", "asked"),
    [
        # PyTorch errs by 10 units: 100 are allowed.
        (90, [], True, 0),
        (300, [40], True, 1),
        (300, [10, np.inf, 20, 31], True, 4),
        (300, [10, 29, 20, np.nan], False, 4),
        (1100, [], False, 0),
        (np.nan, [], False, 0),
    ],
)
def test_before_an_output_departs_pytorch_rounds_otherwise(error, drawn, passes, asked):
    pytorch = Erring(drawn, logits=10)
    judge = judged({"logits": error}, pytorch)
    [result] = judge.results()
    assert (result.passed, judge.first_failure() is None, pytorch.asked) == (passes, passes, asked)
    if asked and passes:
        assert result.judgements[0].pytorch.rms == pytest.approx(drawn[-1] * ROUNDOFF)


def test_what_is_beyond_luck_is_not_excused_by_what_another_output_asked():
    judge = judged({"key": 300, "value": 1100}, Erring([400], key=10, value=10))
    assert {j.name: j.passed for j in judge.results()[0].judgements} == {"key": True, "value": False}


def test_where_pytorch_itself_overflows_no_other_roundings_are_asked_for():
    pytorch = Erring([40], logits=np.inf)
    assert not judged({"logits": 300}, pytorch).results()[0].passed and not pytorch.asked


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", "float32"), ("llama", "float16"), ("llama", "bfloat16"), ("gemma3", "float32"), ("bert", "float32")],
)
def test_other_roundings_are_as_large_as_a_models_own(name, dtype, make_base):
    """Each draw is another, and the model stays what it is."""
    base = make_base(name)
    adapter = random_adapter(base, ("q_proj", "down_proj", "query"))
    exact, runner = (TorchRunner(base, adapter, getattr(torch, kind)) for kind in ("float64", dtype))
    ratios = []
    for case in make_cases(base.config, base.task)[:3]:
        feeds = {"input_ids": case.ids, "attention_mask": case.mask}

        def run(of: TorchRunner | Redrawn, feeds: Feeds = feeds, mask: np.ndarray = case.mask) -> np.ndarray:
            output = next(iter(of.run(feeds).items()))
            return attended(*output, mask, mask.shape[1])

        reference, before = run(exact), run(runner)
        drawn = [run(runner.again(draw)) for draw in range(DRAWS)]
        assert len({array.tobytes() for array in (before, *drawn)}) == 1 + DRAWS
        own, *others = (float(np.sqrt(np.mean((array - reference) ** 2))) for array in (before, *drawn))
        ratios += [other / own for other in others]
        np.testing.assert_array_equal(run(runner), before)
        np.testing.assert_array_equal(run(runner.again(0)), drawn[0])
    assert 0.7 < np.median(ratios) < 3, ratios


def test_a_norms_scale_falls_otherwise(make_base):
    """Of 32 numbers that are rounded each by itself, the length would be alike in all draws."""
    base = make_base("llama")
    runner = TorchRunner(base, random_adapter(base, ("q_proj",)), torch.float32)
    feeds = {"input_ids": np.arange(3, 4)[None], "attention_mask": np.ones((1, 1), np.int64)}
    scales = []
    for draw in range(8):
        found = {}
        norm = runner._model.model.layers[0].input_layernorm
        handle = norm.register_forward_hook(lambda _module, args, output, found=found: found.update(x=args[0]))
        runner.again(draw).run(feeds)
        handle.remove()
        scales.append(float(torch.linalg.norm(found["x"].double())))
    units = (np.array(scales) / np.mean(scales) - 1) / ROUNDOFF
    assert np.std(units) > 0.25, units


def test_a_mixture_that_does_not_show_its_choices_is_not_drawn_again(make_base):
    """Its experts would be others."""
    base = make_base("olmoe")
    runner = TorchRunner(base, random_adapter(base, ("q_proj",)), torch.float16)
    feeds = {"input_ids": np.arange(3, 15)[None], "attention_mask": np.ones((1, 12), np.int64)}
    before = runner.run(feeds)
    np.testing.assert_array_equal(runner.again(0).run(feeds)["logits"], before["logits"])


def test_rows_of_a_batch_are_drawn_again(make_shelf, monkeypatch):
    """Each with its own adapter, and as the base alone."""
    asked = []
    run = Redrawn.run
    monkeypatch.setattr(Redrawn, "run", lambda self, *given: (asked.append(self), run(self, *given))[1])
    # Of two equal models, one errs by more.
    monkeypatch.setattr("teamlora_export.validate.shelf.MULTIPLE", 0.5)
    bundle = read_bundle(make_shelf().folder)
    base, shelved = open_shelf_sources(bundle, None, {}, ["team"])
    held = {name: as_held(adapter, bundle.manifest) for name, adapter in shelved.items()}
    judge_mixed(bundle, base, held, None, Reporter())
    # Of the batch of both kinds of rows; where adapters are left out, all err by less than the floor.
    assert len({id(redrawn) for redrawn in asked}) == 2 * DRAWS
