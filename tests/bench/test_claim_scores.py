"""Scores and times of the measure of the method: right answers are counted, exports answer the same, and what is timed
computes what is trained."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from method import inference
from method.cells import asked_examples, data_folder
from method.exports import score_exports
from method.plan import BASE, Cell, count_parameters, options_of, quick_grid
from method.score import runner_generate, score, tokenizer_of, torch_generate
from method.steps import time_steps
from tasks import GUESSED, TASKS, make_examples
from tiny_cells import TEAM, TINY

from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.bench.turns import AGAIN, Figure, Workload, judge
from teamlora_export.model.base import open_base
from teamlora_export.model.inject import inject
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.progress import Reporter
from teamlora_export.train.model import start_adapter

pytest_plugins = ["claim_fixtures"]


def test_guessing_is_as_good_as_the_answers_of_a_task_are_few():
    for task in ("sentiment", "topic", "inference", "paraphrase"):
        answers = {example.answer for example in make_examples(task, "test", 40)}
        assert GUESSED[task] == 1 / len(answers), task
    assert set(GUESSED) <= set(TASKS)


def test_only_answers_that_are_right_to_the_letter_count(place):
    examples = asked_examples(TINY)
    tokenizer = tokenizer_of(place.base)
    answers = {tuple(tokenizer.encode(e.prompt).ids): e for e in examples}
    batches: list[tuple[int, int]] = []

    def generate(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Right but for ordering, where something follows, code, of which letters are missing, and topic, where a
        special token is before it."""
        batches.append((len(prompts), count))
        said = []
        for prompt in prompts:
            example = answers[tuple(prompt)]
            wrong = {
                "ordering": example.answer + ", x",
                "code": example.answer[:-1],
                "topic": "<s>" + example.answer,
            }
            text = wrong.get(example.task, example.answer)
            said.append(tokenizer.encode(text + " ", add_special_tokens=False).ids[:count])
        return said

    found = score(generate, tokenizer, examples, batch=5)
    assert found.by_task == {task: 0.0 if task in ("ordering", "code", "topic") else 100.0 for task in TASKS}
    assert found.mean == pytest.approx(100 * (len(TASKS) - 3) / len(TASKS))
    assert [size for size, _ in batches] == [5, 5, 5, 5, 2]
    assert [count for _, count in batches] == sorted(count for _, count in batches)
    assert found.answers["ordering"][0].endswith(", x") and found.answers["topic"][0].startswith("<s> ")


def test_answers_are_greedy_whatever_the_base_asks_for(make_base):
    """A penalty of words that the prompt has falls on every copied word, and the deployed programs know none."""
    base = make_base("llama")
    model = base.load(torch.float32)
    prompts = [[1, 5, 6, 7, 5, 6, 7], [1, 9, 8]]
    expected = torch_generate(model, base.folder)(prompts, 8)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=3)
    assert torch_generate(model, base.folder)(prompts, 8) == expected


def test_pytorch_and_the_deployed_program_make_the_same_tokens(make_bundle, make_base, make_adapter):
    """Prompts of unlike lengths in one batch, padded in PyTorch; and each alone, where nothing is padded."""
    bundle, base = make_bundle("llama"), make_base("llama")
    model = base.load(torch.float32)
    inject(model, align_with_base(read_adapter(make_adapter("llama")), base.signature))
    in_torch = torch_generate(model, base.folder)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 384, length).tolist() for length in (3, 11, 6)]
    made = in_torch(prompts, 9)
    assert made == runner_generate(bundle.folder, threads=1)(prompts, 9)
    assert made == [in_torch([prompt], 9)[0] for prompt in prompts]


def test_exports_have_scores_beside_pytorchs(team, place, monkeypatch):
    quiet = Reporter(quiet=True)
    in_torch, exported = score_exports(TEAM, place, ["fp32"], 1, quiet)
    assert (in_torch["form"], exported["form"], in_torch["same"], exported["same"]) == ("PyTorch", "fp32", 100, 100)
    assert exported["by_task"] == in_torch["by_task"] == team["by_task"] and exported["bytes"] > 10_000
    assert any(answer for answers in exported["answers"].values() for answer in answers)
    assert exported["right"] == team["right"] and set("".join(exported["right"].values())) <= {"0", "1"}
    monkeypatch.setattr("method.exports.export_onnx", lambda *_, **__: pytest.fail("exported again"))
    assert score_exports(TEAM, place, ["fp32"], 1, quiet) == [in_torch, exported]
    assert score_exports(dataclasses.replace(TEAM, seed=7), place, ["fp32"], 1, quiet) == []
    monkeypatch.setattr("method.exports.whole_version", lambda: "otherone")
    of_any = dataclasses.replace(place, any_version=True)
    assert score_exports(TEAM, of_any, ["fp32"], 1, quiet) == [in_torch, exported]
    assert in_torch["code"] != "otherone"
    monkeypatch.setattr("method.exports._score", lambda *_: {**in_torch, "mean": -1.0})
    assert [row["code"] for row in score_exports(TEAM, place, ["fp32"], 1, quiet)] == ["otherone"] * 2
    assert [row["mean"] for row in score_exports(TEAM, place, ["fp32"], 1, quiet)] == [-1.0, -1.0]


def test_steps_are_timed_in_turns_and_change_only_what_is_trained(place):
    now = iter(range(10_000))
    rows = time_steps(place, [2, 4], "ffn", 2, torch.get_num_threads(), clock=lambda: float(next(now)))
    assert [row["row"] for row in rows if row["family"] == "teamlora"] == [
        f"teamlora k={k}, {how}" for k in (2, 4) for how in ("published", "packed")
    ]
    assert len(rows) == 13 and all(row["seconds"] == [1.0, 1.0] for row in rows)
    assert all(row["over_lora"] == {"median": 1.0, "low": 1.0, "high": 1.0} for row in rows)
    # The same function in both implementations; something, and not everything.
    moved = {(row["family"], row["experts"], row["implementation"]): row["moved"] for row in rows}
    for (family, k, _), by in moved.items():
        assert 1e-4 < by < 0.5 and by == pytest.approx(moved.get((family, k, "published"), by), rel=0.01)
    trained = {row["family"]: row["parameters"] for row in rows if row["experts"] in (1, 4)}
    for family, parameters in trained.items():
        options = options_of(Cell(family, 4, "ffn", 1.0, 0), TINY, place.base, data_folder(place), Path("out"))
        assert parameters == count_parameters(options)


@pytest.mark.parametrize("cell", [cell for cell in quick_grid([0]) if cell.family != BASE and cell.share == 1.0])
def test_layers_that_are_traced_compute_what_is_trained(cell, place):
    """The published layers, written once more for tracing, against the reference layer, in float64."""
    options = options_of(cell, TINY, place.base, Path("data"), Path("out"))
    adapter = inference.with_random_ups(start_adapter(open_base(str(place.base)).signature, options))
    projection = adapter.projections["model.layers.1.mlp.down_proj"]
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(48, 32, bias=False), torch.randn(5, 3, 48, dtype=torch.float64)
    reference = ExpertLinear(linear.double(), projection)(x)
    layer = inference.LAYERS[cell.family](linear, projection).double()
    torch.testing.assert_close(layer(x), reference, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(reference, linear(x), atol=0.01)


def test_inference_is_timed_beside_a_base_of_each_kind(place):
    asked = inference.Asked(length=6, count=2, openings=1, turns=2)
    rows = inference.time_inference(place, TEAM, asked, torch.get_num_threads(), Reporter(quiet=True))
    assert {inference.TORCH, inference.BODY} <= {row["row"] for row in rows}
    assert inference.TRACED not in {row["row"] for row in rows}, "nothing was traced before, and nothing shall be"
    for row in rows:
        assert row["quantity"] in ("prefill", "decode") and row["openings"] == 1
        assert len(row["seconds"]) == len(row["ratios"]) == 2 and min(row["seconds"]) > 0
        assert row["over_base"]["low"] <= row["over_base"]["median"] <= row["over_base"]["high"]
        assert row["workload"] == {"batch": 1, "length": 6, "count": 2}
    assert not list(place.folder.glob("*inference*")), "nothing is left of what was written for it"


def test_an_opening_of_the_models_counts_once(place, monkeypatch):
    """Three turns of each opening; the adapted model takes 1.5 times as long, and in the second opening twice."""
    opened: list[tuple[int, int]] = []

    def fake(_run: object, ways: Sequence[Any], workload: Workload, _: object, turns: int, seed: int) -> list[Figure]:
        opened.append((turns, seed))
        slowness = {way.name: (2.0 if seed == 1 else 1.5) if way.name == inference.BODY else 1.0 for way in ways}
        times = {name: [by, by, 100.0] for name, by in {**slowness, AGAIN: 1.0}.items()}
        return [f for quantity in ("prefill", "decode") for f in judge(times, "base, exported", quantity, workload)]

    monkeypatch.setattr(inference, "run_apart", fake)
    monkeypatch.setattr(inference, "export_onnx", lambda *_, **__: None)
    monkeypatch.setattr(
        inference, "written_graphs", lambda _: nullcontext(SimpleNamespace(**dict.fromkeys(_GRAPHS, Path())))
    )
    asked = inference.Asked(length=6, count=2, openings=3, turns=3)
    rows = inference.time_inference(place, TEAM, asked, 1, Reporter(quiet=True))
    assert opened == [(3, 0), (3, 1), (3, 2)]
    (decode,) = (row for row in rows if (row["row"], row["quantity"]) == (inference.BODY, "decode"))
    assert decode["ratios"] == [1.5, 2.0, 1.5] and decode["openings"] == 3


_GRAPHS = ("adapted", "bypassed")


def test_models_are_opened_in_an_order_and_its_reverse(monkeypatch):
    opened: list[str] = []
    ways = [SimpleNamespace(name=name, open=lambda name=name: opened.append(name)) for name in "abcdefg"]
    monkeypatch.setattr(inference, "take_turns", lambda readers, *_, **__: list(readers))
    orders = [inference._take_turns(ways, Workload(1, 6, 2), [[1]], 1, seed) for seed in range(4)]
    assert orders[1] == orders[0][::-1] and orders[3] == orders[2][::-1] and orders[0] != orders[2]
    assert opened == [name for order in orders for name in order] and sorted(orders[0]) == list("abcdefg")
