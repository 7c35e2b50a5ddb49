"""The measure of the method: equal numbers of parameters, cells that are kept and go on, scores, and what is told."""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from waiting import SECONDS

from teamlora_export.adapter import BaseSignature, LinearShape, align_with_base, read_adapter
from teamlora_export.errors import ExportError
from teamlora_export.model.base import open_base
from teamlora_export.model.inject import inject
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.progress import Reporter
from teamlora_export.train.model import TrainedLinear, start_adapter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "bench"))
sys.path.append(str(ROOT / "scripts"))
import claims as command  # noqa: E402
from get_model import get_model  # noqa: E402
from method import cells as cells_module  # noqa: E402
from method import inference  # noqa: E402
from method.cells import Place, asked_examples, data_folder, run_cell  # noqa: E402
from method.exports import score_exports  # noqa: E402
from method.figures import read_scores, require_output, write_figures  # noqa: E402
from method.paper import PUBLISHED, verdicts  # noqa: E402
from method.plan import BASE, FULL, Cell, Settings, count_parameters, full_grid, nearest_rank, options_of, quick_grid  # noqa: E402
from method.report import tables, write_plot  # noqa: E402
from method.score import runner_generate, score, tokenizer_of, torch_generate  # noqa: E402
from method.significance import Gap, difference, interval, luck_of, student  # noqa: E402
from method.steps import time_steps  # noqa: E402
from tasks import GUESSED, TASKS, make_examples  # noqa: E402

TINY = Settings(rank=8, steps=2, batch=2, train=3, validation=1, test=2, dtype="fp32")
TEAM, LORA = Cell("teamlora", 4, "ffn", 1.0, 0), Cell("lora", 1, "ffn", 1.0, 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny Llama that takes the longest prompts, cut into single letters as they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("claims") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=384, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(base, tmp_path_factory) -> Place:
    return Place(base, TINY, tmp_path_factory.mktemp("claims-cache"))


@pytest.fixture(scope="module")
def team(place) -> dict:
    return run_cell(TEAM, place)


def test_families_train_equally_many_parameters_on_the_real_base():
    """Ranks are whole numbers, and multiples of k: that is worth 6 % at the most, and 18 % of a half with k=8."""
    base = get_model("smollm2")
    budgets = {}
    for cell in full_grid([0]):
        if cell.family == BASE:
            continue
        count = count_parameters(options_of(cell, FULL, base, Path("data"), Path("out")))
        budget = budgets.setdefault(cell.targets, count)
        assert cell != TEAM or budget == count, "the first is the one that others are given the parameters of"
        off = 0.06 if cell.share == 1 else 0.18 if cell.experts == 8 else 0.08
        assert count / budget == pytest.approx(cell.share, rel=off), cell.name


def test_the_rank_is_the_nearest_and_the_scale_follows_it(place):
    budget = count_parameters(options_of(TEAM, TINY, place.base, Path("data"), Path("out")))
    for cell in full_grid([0])[1:]:
        options = options_of(cell, TINY, place.base, Path("data"), Path("out"))
        unit = cell.experts if cell.family in ("teamlora", "moelora") else 1
        if cell.targets == "ffn":
            asked = cell.share * budget
            off = {
                rank: abs(count_parameters(dataclasses.replace(options, rank=rank)) - asked)
                for rank in (options.rank - unit, options.rank, options.rank + unit)
                if rank > 0
            }
            assert min(off, key=off.__getitem__) == options.rank == nearest_rank(options, asked)
        # alpha over what it is divided by, times the sum of the routing weights, of experts side by side.
        side_by_side = cell.experts if cell.family in ("teamlora", "moelora") else 1
        routing_sum = cell.experts if cell.family == "teamlora" else 1
        divisor = options.rank / side_by_side
        each = options.used_alpha / divisor * routing_sum / side_by_side
        assert each == pytest.approx(4.0 * (TINY.rank / options.rank) ** (2 / 3), rel=0.01)


def test_a_step_of_the_optimiser_moves_the_experts_sum_equally_far_in_all_families_and_ranks():
    """On a layer of the real base's sizes, whose gradients agree in part, as those of a task do: none 1.4 times as far
    as another, where one scale for all ranks moves some three times as far."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(576, 1536, bias=False).requires_grad_(False)
    x = torch.randn(256, 576, generator=generator)
    gradient = torch.randn(256, 8, generator=generator) @ torch.randn(8, 1536, generator=generator)
    base = get_model("smollm2")
    signature = BaseSignature("one", {"up_proj": LinearShape(576, 1536, False, False)}, {}, "")
    moved, of_one_scale = {}, {}
    for cell in full_grid([0]):
        if cell.family == BASE or cell.targets != "ffn":
            continue
        options = options_of(cell, FULL, base, Path("data"), Path("out"))
        projection = start_adapter(signature, dataclasses.replace(options, targets=("up_proj",))).projections["up_proj"]
        layer = TrainedLinear(linear, projection, cell.family, 0.0, packed=True)
        optimizer = torch.optim.AdamW(layer.trained().values(), lr=FULL.learning_rate, weight_decay=0)
        (layer(x) * gradient).mean().backward()
        optimizer.step()
        moved[cell.group] = float((layer(x) - linear(x)).detach().square().mean().sqrt())
        of_one_scale[cell.group] = moved[cell.group] / (FULL.rank / options.rank) ** (2 / 3)
    assert len(moved) == 13
    assert max(moved.values()) < 1.4 * min(moved.values()), moved
    assert max(of_one_scale.values()) > 3 * min(of_one_scale.values())


def test_the_grids_have_every_cell_once_and_the_most_telling_first():
    grid = full_grid([0, 1, 2])
    names = [cell.name for cell in grid]
    assert len(set(names)) == len(names) == 1 + 3 * 2 * (3 * 4 + 1)
    assert names[:3] == ["base", "teamlora-k4-ffn-s0", "hydralora-k4-ffn-s0"]
    assert {cell.name for cell in quick_grid([0])} <= set(names)
    assert {cell.seed for cell in grid[: len(grid) // 3]} == {0}


def test_a_cell_is_trained_once_and_scored(team, place):
    assert team["parameters"] == 7_248 and team["rank"] == 8 and len(team["losses"]) == 2
    assert set(team["by_task"]) == set(TASKS) and 0 <= team["mean"] <= 100
    assert {task: len(right) for task, right in team["right"].items()} == dict.fromkeys(TASKS, TINY.test)
    # Routers that collapse are seen.
    assert set(team["expert_use"]) == set(TASKS) and team["balance_loss"] >= 0
    assert all(len(use) == 4 and sum(use) == pytest.approx(1, abs=1e-3) for use in team["expert_use"].values())
    assert place.find(TEAM) == json.loads(json.dumps(team))
    assert read_adapter(place.adapter(TEAM)).family == "teamlora"
    # From the files now: nothing is trained again.
    (place.of(TEAM) / "adapter" / "adapter_model.safetensors").rename(place.of(TEAM) / "moved")
    assert run_cell(TEAM, place) == place.find(TEAM)
    (place.of(TEAM) / "moved").rename(place.of(TEAM) / "adapter" / "adapter_model.safetensors")


def test_a_killed_cell_goes_on_where_it_was(team, place, monkeypatch):
    """Killed when the adapter was just written, and its checkpoints not yet gone: it is taken as it is."""
    import teamlora_export.train

    folder = place.of(TEAM)
    result = (folder / "result.json").rename(folder / "kept")
    (folder / "adapter.training").mkdir()
    monkeypatch.setattr(teamlora_export.train, "train", lambda *_: pytest.fail("trained again"))
    again = run_cell(TEAM, place)
    assert {**again, "seconds": 0} == {**team, "seconds": 0}
    assert not (folder / "adapter.training").exists()
    result.unlink()


def test_a_cell_that_another_process_is_at_is_left_to_it(place):
    folder = place.of(LORA)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_cell(LORA, place) is None
    assert place.find(LORA) is None


def test_other_code_or_other_options_are_other_cells(team, place, monkeypatch):
    longer = dataclasses.replace(place, settings=dataclasses.replace(TINY, steps=3))
    assert longer.find(TEAM) is None
    assert place.find(dataclasses.replace(TEAM, seed=1)) is None
    monkeypatch.setattr(cells_module, "code_version", lambda: "otherone")
    assert place.find(TEAM) is None
    assert dataclasses.replace(place, any_version=True).find(TEAM)["right"] == team["right"]
    assert dataclasses.replace(longer, any_version=True).find(TEAM) is None
    # Nor are results of other questions or rows found, whatever the version.
    for name in ("hash_of_questions", "hash_of_rows"):
        with monkeypatch.context() as patched:
            patched.setattr(cells_module, name, lambda _: "otherone")
            assert dataclasses.replace(place, any_version=True).find(TEAM) is None
            assert dataclasses.replace(place, any_version=True).adapter(TEAM) is None


def test_versions_are_of_the_code_that_results_depend_on():
    """Of a cell: what makes, reads and cuts rows, trains, goes on, chooses the best step, writes and reads adapters. Of
    an export: everything."""
    package, bench = cells_module._PACKAGE, cells_module._BENCH
    used = ("train/options.py", "train/data.py", "adapter/read.py", "adapter/write.py", "adapter/config.py")
    for path in (*used, "train/callbacks.py", "train/checkpoint.py", "deploy/words.py", "tokens.py"):
        assert package / path in cells_module._CODE, path
    assert bench / "write_tasks.py" in cells_module._CODE
    everything = {package / "graph" / "build.py", package / "deploy" / "runner.py", bench / "method" / "steps.py"}
    assert everything | set(cells_module._CODE) <= set(cells_module._ALL)
    assert all(path.is_file() for path in cells_module._ALL)


def test_another_tokenizer_or_weights_in_another_format_are_another_base(place, tmp_path):
    keys = {place._key(TEAM)}
    for name in ("tokenizer.json", "generation_config.json", "pytorch_model.bin", "merges.txt"):
        folder = tmp_path / name
        shutil.copytree(place.base, folder)
        with (folder / name).open("a") as file:
            file.write(" ")
        keys.add(dataclasses.replace(place, base=folder)._key(TEAM))
    assert len(keys) == 5
    (tmp_path / "empty").mkdir()
    for base in (Path("org/name"), tmp_path / "empty"):
        with pytest.raises(ExportError, match=f"--base {base}: is no folder with a model's weights"):
            dataclasses.replace(place, base=base).find(TEAM)


def test_another_version_of_a_library_is_another_cell(place, monkeypatch):
    before = place._key(TEAM)
    monkeypatch.setattr(cells_module, "_libraries", lambda: {"torch": "0.1"})
    assert place._key(TEAM) != before


def test_kept_timings_are_of_the_same_settings_base_and_code(place, monkeypatch, tmp_path):
    given = argparse.Namespace(quick=False, parts=["steps"], cells=[], any_version=False)
    (row,) = command._timed(place, "steps", given, lambda: [{"a": 1}])
    assert row["a"] == 1 and row["machine"]["cores"] >= 1
    given.parts = []

    def kept(of: Place) -> list:
        return command._timed(of, "steps", given, lambda: pytest.fail("measured"))

    assert kept(place) == [row]
    other = tmp_path / place.base.name
    shutil.copytree(place.base, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert kept(dataclasses.replace(place, base=other)) == []
    assert kept(dataclasses.replace(place, settings=dataclasses.replace(TINY, rank=16))) == []
    monkeypatch.setattr(command, "whole_version", lambda: "otherone")
    assert kept(place) == []
    given.any_version = True
    assert kept(place) == [row]


def test_cells_of_another_run_count_beside_this_ones_where_all_but_the_seed_is_the_same(
    team, place, tmp_path, monkeypatch, capsys
):
    """Seed 0 is in the cache, seed 1 in the figures of other code: one verdict of both, and nothing is trained."""
    theirs = {**team, "cell": "teamlora-k4-ffn-s1", "seed": 1, "code": "8aab571b"}
    figures = {"settings": dataclasses.asdict(TINY), "code": "8aab571b", "scores": [theirs]}
    path = tmp_path / "figures.json"

    def write(**changed: object) -> Path:
        path.write_text(json.dumps({**figures, **changed}))
        return path

    few = [w for n, v in dataclasses.asdict(TINY).items() if n != "data_seed" for w in (f"--{n.replace('_', '-')}", v)]
    asked = ("--quick", "--base", place.base, "--cache", place.folder, "--cells", "teamlora-k4-ffn", *few)
    monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, asked), "--with", str(write())])
    monkeypatch.setattr(command, "run_cell", lambda *_: pytest.fail("trained"))
    command.main()
    told = capsys.readouterr().out
    assert "| TeamLoRA, k=4 | gate, up, down | 8 | 7,248 | 2 |" in told
    assert (
        "From figures.json of code 8aab571b, which does not say of which weights its base was: teamlora-k4-ffn-s1."
        in told
    )
    assert "# A quick look at one family of adapters" in told
    for changed, refused in (
        ({"settings": {**figures["settings"], "steps": 3}}, r"was made with steps 3 \(here 2\)"),
        ({"base_sha256": "0"}, "another base"),
        ({"scores": [{**theirs, "rank": 4}]}, "has rank 4, alpha .* here it has 8"),
        ({"scores": [{**theirs, "seed": 2}]}, "is not what its options say"),
        ({"scores": [{**theirs, "right": {"topic": "01"}}]}, "was asked other questions"),
        ({"scores": [{**theirs, "right": {**team["right"], "topic": "2?"}}]}, "neither right nor wrong"),
        ({"scores": [{**theirs, "questions_sha256": "0"}]}, r"-s1 was asked other questions\."),
        ({"scores": [{**theirs, "rows_sha256": "0"}]}, r"-s1 was trained on other rows\."),
        ({"questions_sha256": "0", "rows_sha256": "0"}, "made with other questions; other rows to train on"),
        ({"scores": [{**theirs, "cell": "teamlora-k0-ffn-s1", "experts": 0}]}, "no cell of this grid"),
        ({"scores": [{**theirs, "cell": "teamlora-k4-mlp-s1", "targets": "mlp"}]}, "no cell of this grid"),
        ({"scores": [{**theirs, "versions": [1]}]}, "Expected `object`"),
        ({"scores": []}, "has no scores"),
        ({"scores": [theirs, theirs]}, "is there twice"),
        ({"scores": [{"cell": "base"}]}, "missing required field"),
    ):
        with pytest.raises(ExportError, match=refused):
            read_scores(write(**changed), place)
    hashes = {
        "base_sha256": cells_module.hash_of_base(place.base),
        "questions_sha256": theirs["questions_sha256"],
        "rows_sha256": theirs["rows_sha256"],
    }
    known = "From figures.json of code 8aab571b: teamlora-k4-ffn-s1."
    # What tables read is taken from the answers.
    assert read_scores(write(**hashes, scores=[{**theirs, "mean": math.nan, "by_task": {}}]), place) == (
        [theirs],
        known,
    )
    unsaid = {name: value for name, value in theirs.items() if not name.endswith("_sha256")}
    assert (
        "not say which questions were asked, which rows were trained on: "
        in read_scores(write(**hashes, scores=[unsaid]), place)[1]
    )
    # Of what this code has found itself, that comes first.
    turned = {task: right.translate({48: 49, 49: 48}) for task, right in team["right"].items()}
    scores, told = read_scores(
        write(**hashes, scores=[{**theirs, "cell": team["cell"], "seed": 0, "right": turned}]), place
    )
    assert scores[0]["right"] == team["right"] and scores[0]["code"] == team["code"]
    assert told == "Of figures.json left out, for results of this code: teamlora-k4-ffn-s0."


@pytest.mark.parametrize(("option", "part"), [("--test", "code: its test"), ("--validation", "topic: its validation")])
def test_more_questions_or_rows_than_there_are_are_refused_before_a_cell_runs(
    option, part, base, tmp_path, monkeypatch
):
    asked = ("--quick", "--base", base, "--cache", tmp_path, "--train", 3, "--validation", 1, "--test", 1, option, 250)
    monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, asked)])
    monkeypatch.setattr(command, "_run_cells", lambda *_: pytest.fail("a cell ran"))
    with pytest.raises(ExportError, match=rf"^{part} part has not 250 different examples\. Lower .*{option}"):
        command.main()
    assert not [path for path in tmp_path.rglob("*") if path.name != "data"], "nothing is left of them"


def test_layout_and_comments_leave_the_code_what_it_is(tmp_path):
    one, other, third = (tmp_path / name / "code.py" for name in "abc")
    for path, text in (
        (one, '"""Said."""\ndef f(x):\n    """Said."""\n    return x + 1\n'),
        (other, "def f( x ):\n    # not said\n    return (x + 1)\n"),
        (third, "def f(x):\n    return x + 2\n"),
    ):
        path.parent.mkdir()
        path.write_text(text)
    versions = [cells_module._hash_of_code((path,)) for path in (one, other, third)]
    assert versions[0] == versions[1] != versions[2]


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
    asked = inference.Asked(length=6, count=2, turns=2)
    rows = inference.time_inference(place, TEAM, asked, torch.get_num_threads(), Reporter(quiet=True))
    assert {inference.TORCH, inference.BODY} <= {row["row"] for row in rows}
    assert inference.TRACED not in {row["row"] for row in rows}, "nothing was traced before, and nothing shall be"
    for row in rows:
        assert row["quantity"] in ("prefill", "decode") and len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["over_base"]["low"] <= row["over_base"]["median"] <= row["over_base"]["high"]
        assert row["workload"] == {"batch": 1, "length": 6, "count": 2}


def _result(family: str, right: str, seed: int = 0, share: float = 1.0) -> dict:
    cell = Cell(family, 1 if family in ("lora", BASE) else 4, "ffn", share, seed)
    bits = {"one": right, "two": right[::-1]}
    by_task = {task: 100 * found.count("1") / len(found) for task, found in bits.items()}
    return {
        "cell": cell.name,
        **dataclasses.asdict(cell),
        "code": "8aab571b",
        "rank": 8,
        "parameters": 100,
        "best_step": None if family == BASE else 300,
        "mean": np.mean(list(by_task.values())),
        "by_task": by_task,
        "right": bits,
    }


def test_a_difference_has_the_error_of_its_questions_and_of_its_trainings():
    ours = [_result("teamlora", "111101110111"), _result("teamlora", "111111110111", seed=1)]
    theirs = [_result("moelora", "101001100011", seed=1), _result("moelora", "101001110011")]
    gap = difference(ours, theirs)
    means = [np.mean([[int(b) for b in r["right"]["one"]] for r in results], axis=0) for results in (ours, theirs)]
    by_question = means[0] - means[1]
    by_seed = [ours[0]["mean"] - theirs[1]["mean"], ours[1]["mean"] - theirs[0]["mean"]]
    # Of a training, pooled over both sides; each side's mean is of two of them.
    luck = np.mean([np.var([result["mean"] for result in results], ddof=1) for results in (ours, theirs)])
    assert gap.points == pytest.approx(100 * by_question.mean()) == pytest.approx(np.mean(by_seed))
    parts = (100**2 * 2 * by_question.var(ddof=1) / 12 / 2**2, luck * 2 / 2)
    assert gap.error == pytest.approx(math.sqrt(sum(parts))) and gap.seeds == 2
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 22 + parts[1] ** 2 / 2)
    assert gap.margin == pytest.approx(student(freedom) * gap.error)
    # Of a seed that the others do not have, nothing but how much luck there is.
    of_both = luck_of([ours, theirs])
    assert of_both.variance == pytest.approx(luck) and of_both.freedom == 2
    assert difference([*ours, _result("teamlora", "0" * 12, seed=2)], theirs, of_both) == gap
    # Of one question a task, no verdict, however well seeds agree.
    of_one = [
        [_result(family, bit, seed) for seed in range(2)] for family, bit in (("teamlora", "1"), ("moelora", "0"))
    ]
    assert not difference(*of_one).tells and str(difference(*of_one)) == "+100.0 points (of one question a task)"
    # Of one seed, no verdict, nor of two that are not the same.
    assert not difference([_result("teamlora", "1" * 12)], [_result("moelora", "0" * 12)]).tells
    assert not difference(ours[:1], theirs[:1]).tells and difference(ours[:1], theirs[:1]).seeds == 1


def test_students_t_is_that_of_the_tables_and_goes_between_them():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980, 1e6: 1.960}
    assert {freedom: round(student(freedom), 3) for freedom in known} == known
    assert student(2) > student(2.5) > student(3)


@pytest.mark.parametrize(("luck", "told_at_least"), [(0.2, 0.7), (0.5, 0.3)])
def test_equal_methods_seldom_get_a_verdict_and_unequal_ones_do(luck, told_at_least):
    """Eleven tasks of a hundred questions, three seeds of four families; `luck` of a training moves all answers of a
    task, in logits.

    Of equal methods one of twenty has a verdict (and of a hundred draws at the most ten, all but surely). Of a
    thousand draws 1 and 4 %; a difference of 5 points is told in 85 and 47 %.
    """
    rng = np.random.default_rng(0)

    def trained(easy: np.ndarray, shift: float) -> list[dict]:
        results = []
        for seed in range(3):
            logits = easy + shift + rng.normal(0.0, luck, (len(easy), 1))
            right = rng.random(easy.shape) < 1 / (1 + np.exp(-logits))
            rows = np.where(right, b"1", b"0")
            bits = {f"task{i}": row.tobytes().decode() for i, row in enumerate(rows)}
            results.append({**_result("moelora", "01", seed), "right": bits})
        return results

    def told(shift: float) -> tuple[float, float]:
        gaps = []
        for _ in range(100):
            easy = rng.normal(0, 1.5, (11, 100)) + rng.normal(0, 1, (11, 1))
            families = [trained(easy, by) for by in (shift, 0.0, 0.0, 0.0)]
            gaps.append(difference(families[0], families[1], luck_of(families)))
        return float(np.mean([gap.tells for gap in gaps])), float(np.mean([gap.points for gap in gaps]))

    assert told(0.0)[0] <= 0.1
    share, points = told(0.3)
    assert points == pytest.approx(4.8, abs=1) and share >= told_at_least


def test_two_seeds_that_agree_by_luck_are_not_sure_of_it():
    """Of equal methods, where luck has ten times the variance that the questions have: of an interval of 95 % one of
    twenty draws is outside. Two seeds of a comparison alone, one degree of freedom, are outside in one of eight; those
    of four families, pooled, in one of seventeen. (Of 600 draws with an error of one point.)"""
    rng = np.random.default_rng(0)

    def told(freedom: int) -> float:
        points = rng.normal(0.0, math.sqrt(1 + 10), 600)
        variances = 10 * rng.chisquare(freedom, 600) / freedom
        gaps = (Gap(by, 1.0, 1089, of, freedom, 2) for by, of in zip(points, variances, strict=True))
        return float(np.mean([gap.tells for gap in gaps]))

    of_four = luck_of([[_result(family, "01", seed) for seed in range(2)] for family in command.FAMILIES])
    assert of_four.freedom == 4
    assert told(1) > 0.095 and told(of_four.freedom) < 0.085


def test_the_tables_say_what_agrees_with_the_paper_and_what_does_not(tmp_path):
    scores = [
        _result(BASE, "000000000100"),
        *(_result("teamlora", "111101110111", seed) for seed in range(3)),
        *(_result("moelora", "000000000000", seed) for seed in range(3)),
        *(_result("lora", "111101110110", seed) for seed in range(3)),
        _result("hydralora", "000000000000"),
        *(_result("teamlora", "111001110011", seed, share=0.5) for seed in range(3)),
    ]
    row = {"experts": 4, "parameters": 1, "moved": 0.0107, "over_lora": {"median": 1.5, "low": 1.4, "high": 1.7}}
    steps = [
        {
            **row,
            "row": family,
            "family": family,
            "targets": targets,
            "implementation": how,
            "seconds": [seconds] * 5 + [4],
        }
        for family, targets, how, seconds in (
            ("teamlora", "ffn", "published", 3.0),
            ("teamlora", "ffn", "packed", 2.0),
            ("moelora", "ffn", "published", 4.0),
            ("teamlora", "all", "published", 4.2),
            ("moelora", "all", "published", 4.0),
        )
    ]
    ratio = {"median": 1.25, "low": 1.2, "high": 1.3}
    timed = {"experts": 4, "targets": "ffn", "quantity": "decode", "over_base": ratio}
    workload = {"batch": 1, "length": 64, "count": 24}
    exports = [{"cell": "c", "form": "int4", "mean": 40.0, "same": 90.0, "bytes": 5_000_000}]
    found = {
        "title": "A look",
        "notes": ["First.", "Second."],
        "seeds": [0],
        "scores": scores,
        "steps": steps,
        "inference": [
            {**timed, "family": family, "row": PUBLISHED, "workload": workload, "ratios": ratios}
            for family, ratios in (
                ("teamlora", [1.2, 1.25, 1.25, 1.25, 1.25, 1.3]),
                ("moelora", [1.45] + [1.5] * 4 + [1.55]),
            )
        ],
        "exports": exports,
    }
    text = tables(found)
    size = "of equal size on gate, up, down:"
    assert f"MoELoRA {size} +83.3 points (± 16.5 at 95 %, 3 seeds); the paper +0.6. Agrees" in text
    assert f" LoRA {size} +8.3 points (± 12.2 at 95 %, 3 seeds); the paper +1.5. Cannot tell: within the error." in text
    assert "+83.3 points (standard error of the questions alone 7.9); the paper +1.2. Cannot tell: one seed." in text
    assert "half the parameters over a MoELoRA on gate, up, down: +66.7 points (± 20.8 at 95 %, 3 seeds)." in text
    assert "half the parameters over one with all of them on gate, up, down: -16.7 points (± 16.5 at" in text
    assert "- Of 3 pairs of families of equal size, k=4 on gate, up, down, none is farther apart than 99.8" in text
    assert "\n- Differences of less than 12.2 to 20.8 points cannot be told here; the paper's are 0.6 to 1.5. " in text
    step = "- A training step of TeamLoRA"
    assert f"{step} (one by one) over MoELoRA's (one by one), k=4 on gate, up, down: 0.75 (95 %: 0.75 - 1.00)" in text
    assert "; the paper 0.70. Cannot tell which takes less." in text
    assert f"{step} (packed) over MoELoRA's (one by one), k=4 on gate, up, down: 0.50 (95 %" in text
    assert "| 3.00 | 1.50 (1.40 - 1.70) | 1.07 % |" in text
    # The paper's are of the feed-forward layers.
    assert (
        f"{step} (one by one) over MoELoRA's (one by one), k=4 on all projections: 1.05 (95 %: 1.00 - 1.05).\n" in text
    )
    assert (
        "- Inference with TeamLoRA over MoELoRA's, decode, published, PyTorch, k=4 on gate, up, down: 0.83 "
        "(95 %: 0.77 - 0.90); the paper 0.71 where 40 % faster is 1/1.4, and 0.60 where it is 40 % less time. Agrees "
        "that it takes less, but saves less of it."
    ) in text
    assert "| TeamLoRA, k=4 | gate, up, down | decode | 1.25 (1.20 - 1.30) |" in text
    assert "| c | ONNX Runtime, int4 | 5 MB | 40.0 | 90.0 % |" in text
    assert "| the base | - | - | 0 | 1 | - | 8.3 | - |" in text
    other_steps = [{**score, "best_step": 100} if score["seed"] == 1 else score for score in scores]
    assert "| 3 | 100, 300 | " in tables({**found, "scores": other_steps}) and "100, 300" not in text
    assert "pooled over all trainings of this run (8 degrees of" in text
    # A comparison of two versions of the code says so in its own line.
    assert "Of unlike code" not in text
    mixed = [{**score, "code": "0c0de"} if score["family"] == "moelora" else score for score in scores]
    (line,) = (line for line in verdicts({**found, "scores": mixed}) if "half the parameters over a MoELoRA" in line)
    assert line.endswith(" Of unlike code: TeamLoRA, k=4, half the parameters: 8aab571b; MoELoRA, k=4: 0c0de.")
    # What luck gives, beside what the base has without being taught the form of an answer.
    of_three = {"topic": 90, "code": 10, "oddity": 31}
    asked = {"by_task": of_three, "right": dict.fromkeys(of_three, "1" * 100)}
    guessed = tables({**found, "scores": [{**scores[1], **asked}]})
    assert " In oddity no family is above guessing (where that gives nothing: above 5) by more" in guessed
    assert "no family is above guessing" not in text
    hardly = {"by_task": {**of_three, "code": 8}, "right": asked["right"]}
    assert " In code, oddity no family" in tables({**found, "scores": [{**scores[1], **hardly}]})
    assert "| guessing | - | 25 | 0 | 25 |\n\nGuessing among the answers that a task has gives 16.7" in guessed
    assert "on average. The base was taught neither" in text and "The base was taught" not in guessed
    # Timings alone, on a machine with nothing else to do, and scores alone.
    alone = tables({**found, "scores": [], "exports": []})
    assert "## Scores" not in alone and "the paper 0.70" in alone and "## A training step" in alone
    assert "## A training step" not in tables({**found, "steps": [], "inference": []})
    # A machine is told once for each code that was timed there, whatever else it did at the time.
    on = {"processor": "a processor", "cores": 2, "versions": {"torch": "2"}}
    timings = [
        {**row, "code": code, "machine": {**on, "load": load}}
        for row, code, load in zip(found["inference"] * 2, ("0ne", "0ne", "0ne", "tw0"), range(4), strict=True)
    ]
    mixed = tables({**found, "inference": timings})
    assert [line for line in mixed.splitlines() if line.startswith("Timed on")] == [
        f"Timed on a processor, 2 cores, with torch 2, code {code}." for code in ("0ne", "tw0")
    ]
    assert "saves less of it. Rows are of unlike code or machines." in mixed and "unlike code or machines" not in text
    write_plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def _by_experts(scores: dict[int, str]) -> dict:
    results = [
        {**_result("teamlora", right, seed), "cell": f"teamlora-k{k}-ffn-s{seed}", "experts": k}
        for k, right in scores.items()
        for seed in range(3)
    ]
    return {"scores": results, "steps": [], "inference": []}


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({2: "0" * 12, 4: "1" * 12, 8: "0" * 12}, "Agrees."),
        ({2: "0" * 12, 4: "0" * 12, 8: "1" * 12}, "Does not agree."),
        ({2: "0" * 12, 4: "1" * 12, 8: "1" * 12}, "Cannot tell."),
    ],
)
def test_the_best_number_of_experts_has_a_verdict(scores, told):
    (line,) = verdicts(_by_experts(scores))
    assert line.endswith(f"The paper has k=4 best. {told}")


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([0.69, 0.7, 0.7, 0.7, 0.7, 0.71], "Agrees."),
        ([0.8] * 6, "Agrees that it takes less, but saves less of it."),
        ([0.6] * 6, "Agrees that it takes less, but saves more of it."),
        ([0.9, 0.9, 0.9, 0.9, 0.9, 1.1], "Cannot tell which takes less."),
        ([1.2] * 6, "Does not agree: it takes more."),
        ([0.7] * 5, "Cannot tell which takes less."),
    ],
)
def test_a_time_has_a_verdict_from_six_turns(ratios, told):
    row = {"experts": 4, "targets": "ffn", "implementation": "published"}
    steps = [
        {**row, "family": "teamlora", "seconds": ratios},
        {**row, "family": "moelora", "seconds": [1.0] * len(ratios)},
    ]
    (line,) = verdicts({"scores": [], "steps": steps, "inference": []})
    assert line.endswith(f"; the paper 0.70. {told}")
    assert interval([3, 1, 2, 4, 9, 5, 8, 7, 6]).bounds == (2, 8)


def test_a_cell_that_fails_costs_no_other(place, monkeypatch):
    """In threads, in place of processes."""

    def work(cell: Cell, _place: Place, _threads: int) -> dict[str, float] | None:
        if cell.family == "hydralora":
            raise ExportError("it diverged")
        return None if cell.family == "lora" else {"mean": 12.34}

    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(command, "_work", work)
    told = io.StringIO()
    elsewhere = dataclasses.replace(place, folder=place.folder / "elsewhere")
    failures = command._run_cells(quick_grid([0]), elsewhere, 2, Reporter(Console(file=told, width=200)))
    assert failures == ["hydralora-k4-ffn-s0: it diverged"]
    lines = sorted(line.partition(" s: ")[2] for line in told.getvalue().splitlines())
    assert lines == [
        "base: 12.3",
        "hydralora-k4-ffn-s0: it diverged",
        "lora-ffn-s0: another process is at it",
        "moelora-k4-ffn-s0: 12.3",
        "teamlora-k4-ffn-half-s0: 12.3",
        "teamlora-k4-ffn-s0: 12.3",
    ]


def _worked(cell: Cell, _place: Place, _threads: int) -> dict[str, float]:
    if cell.family == "hydralora":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"mean": 12.34}


def test_a_worker_that_is_killed_costs_no_other_cell(place, monkeypatch):
    """Forked, so that nothing is loaded again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(command.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(command, "_work", _worked)
    monkeypatch.setattr(command, "_INTERRUPTION_SECONDS", 0)
    elsewhere = dataclasses.replace(place, folder=place.folder / "elsewhere")
    told = io.StringIO()
    failures = command._run_cells(quick_grid([0]), elsewhere, 2, Reporter(Console(file=told, width=200)))
    (failure,) = failures
    assert failure.startswith(
        "hydralora-k4-ffn-s0: its process was ended (out of memory, or by a signal?); the same command goes on"
    )
    assert told.getvalue().count(": 12.3") == len(quick_grid([0])) - 1


def _interrupted(cell: Cell, place: Place, _threads: int) -> None:
    """As of Ctrl-C, which a worker may answer before the command does."""
    (place.folder / cell.name).touch()
    os.kill(os.getppid(), signal.SIGINT)
    os._exit(2)


def _at_work(cell: Cell, place: Place, _threads: int) -> None:
    """As of a signal to the command alone."""
    (place.folder / cell.name).touch()
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


@pytest.mark.parametrize("work", [_interrupted, _at_work])
def test_nothing_begins_or_goes_on_after_an_interruption(work, place, monkeypatch):
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(command.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(command, "_work", work)
    # As long as it may take until the interruption is known; those that it did not come to end at once.
    monkeypatch.setattr(command, "_INTERRUPTION_SECONDS", SECONDS)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))
    elsewhere = dataclasses.replace(place, folder=place.folder / work.__name__)
    elsewhere.folder.mkdir()
    grid = quick_grid([0])

    def late(*given: Any) -> None:
        """When the end of a worker that it came to before is known."""
        time.sleep(0.5)
        signal.default_int_handler(*given)

    before = signal.signal(signal.SIGINT, late)
    try:
        with pytest.raises(KeyboardInterrupt):
            command._run_cells(grid, elsewhere, 1, Reporter(quiet=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in elsewhere.folder.iterdir()] == [grid[0].name]
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(CancelledError):
        command._alone(grid[1], elsewhere, 1, stopped)


def test_answers_are_greedy_whatever_the_base_asks_for(make_base):
    """A penalty of words that the prompt has falls on every copied word, and the deployed programs know none."""
    base = make_base("llama")
    model = base.load(torch.float32)
    prompts = [[1, 5, 6, 7, 5, 6, 7], [1, 9, 8]]
    expected = torch_generate(model, base.folder)(prompts, 8)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=3)
    assert torch_generate(model, base.folder)(prompts, 8) == expected


def test_cells_are_chosen_by_their_names_and_not_by_parts_of_them():
    grid = full_grid([0, 1])

    def chosen(*asked: str) -> list[str]:
        return [cell.name for cell in command._chosen(grid, asked)]

    assert chosen("teamlora-k4-ffn") == ["teamlora-k4-ffn-s0", "teamlora-k4-ffn-s1"]
    assert chosen("lora-ffn-s1", "base") == ["base", "lora-ffn-s1"]
    assert chosen("*-half-s0") == [cell.name for cell in grid if cell.share != 1 and cell.seed == 0]
    assert len(chosen()) == len(grid)
    with pytest.raises(ExportError, match="--cells moelora: none of base, teamlora-k4-ffn-s0"):
        chosen("base", "moelora")


def test_cells_that_are_missing_are_told_by_group():
    names = ["base", "teamlora-k4-ffn-half-s0", "lora-ffn-s1", "lora-ffn-s2"]
    assert command._by_group(names) == "base, teamlora-k4-ffn-half (seed 0), lora-ffn (seeds 1, 2)"


def test_the_adapter_that_is_exported_is_kept_for_any_seed(place):
    assert Cell("teamlora", 4, "ffn", 1.0, 3).keeps_adapter and not Cell("teamlora", 2, "ffn", 1.0, 3).keeps_adapter
    told = io.StringIO()
    given = argparse.Namespace(parts=["exports"], quick=True, seeds=[9])
    assert command._exports(quick_grid([9]), place, given, Reporter(Console(file=told, width=200))) == []
    assert "Exports: left out. They are of teamlora-k4-ffn-s9, which is not trained." in told.getvalue()


def test_inference_is_timed_of_each_group_of_the_chosen_cells_and_kept_group_by_group(place, tmp_path, monkeypatch):
    timed: list[str] = []

    def measure(_place: Place, cell: Cell, *_: object) -> list[dict[str, str]]:
        timed.append(cell.group)
        return [{"group": cell.group}]

    monkeypatch.setattr(inference, "time_inference", measure)
    place = dataclasses.replace(place, folder=tmp_path)
    given = argparse.Namespace(quick=False, turns=6, parts=["inference"], cells=[], any_version=False)

    def groups(cells: list[Cell]) -> list[str]:
        return [row["group"] for row in command._inference(cells, place, given, Reporter(quiet=True))]

    grid = full_grid([0, 1])
    assert groups(command._chosen(grid, ["base", "lora-ffn", "teamlora-k8-ffn*"])) == ["lora-ffn", "teamlora-k8-ffn"]
    assert timed == ["lora-ffn", "teamlora-k8-ffn"]
    given.parts = ["scores"]
    assert groups(grid) == ["lora-ffn", "teamlora-k8-ffn"], "what was kept, in the order of the grid"
    assert groups(command._chosen(grid, ["lora-ffn"])) == ["lora-ffn"]
    assert len(timed) == 2
    given.parts = ["inference"]
    assert len(groups(grid)) == 20 and len(groups(quick_grid([0]))) == 4


def test_steps_of_some_cells_are_shown_where_they_are_asked_for(place, tmp_path, monkeypatch):
    monkeypatch.setattr("method.steps.time_steps", lambda _place, _experts, targets, *_: [{"targets": targets}])
    place = dataclasses.replace(place, folder=tmp_path)
    given = argparse.Namespace(quick=False, turns=6, parts=["steps"], cells=["lora-ffn"], any_version=False)

    def targets() -> list[str]:
        return [row["targets"] for row in command._steps(place, given, Reporter(quiet=True))]

    assert targets() == ["ffn", "all"]
    given.parts = ["scores"]
    assert targets() == []
    given.cells = []
    assert targets() == ["ffn", "all"]


def test_a_worker_that_is_interrupted_ends_where_a_training_may_stop():
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT / "scripts" / "bench")!r}]
import claims
from teamlora_export import interrupt

def run(cell, place):
    with interrupt.held():
        os.kill(os.getpid(), signal.SIGTERM)
        print("still at it", flush=True)
    print("went on", flush=True)

claims.run_cell = run
claims._work(None, None, 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "still at it\n")
    assert "Interrupted" in done.stderr


def test_only_a_folder_that_a_run_wrote_is_replaced(tmp_path):
    found = {"title": "A look", "notes": [], "scores": [], "steps": [], "inference": [], "exports": []}
    out = tmp_path / "out"
    for title in ("A look", "Another"):
        write_figures({**found, "title": title}, out)
        assert (out / "README.md").read_text().startswith(f"# {title}")
        assert json.loads((out / "figures.json").read_text())["title"] == title
    (out / "README.md").write_text("my own notes")
    foreign = tmp_path / "clone"
    foreign.mkdir()
    (foreign / "README.md").write_text("my own notes")
    before = tmp_path / "before"
    write_figures(found, before)
    figures = json.loads((before / "figures.json").read_text())
    (before / "figures.json").write_text(json.dumps({**figures, "written_by": ""}))
    (before / "README.md").write_text("my own notes")
    for folder, told in (
        (before, "an earlier version of it may have. .* Or remove that folder"),
        (out, "README.md: is not a file that"),
        (foreign, "no figures of this program are in it"),
    ):
        with pytest.raises(ExportError, match=told):
            require_output(folder)
        with pytest.raises(ExportError, match=told):
            write_figures(found, folder)
        assert (folder / "README.md").read_text() == "my own notes"


def test_a_seed_that_is_given_twice_counts_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["claims.py", "--seeds", "3", "3", "0"])
    assert command._arguments().seeds == [3, 0]
    monkeypatch.setattr(sys, "argv", ["claims.py", "--seeds", "-1"])
    with pytest.raises(SystemExit):
        command._arguments()
    assert "expected a whole number from 0" in capsys.readouterr().err


def claims(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "claims.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def test_the_command_runs_what_is_missing_and_writes_what_it_found(base, tmp_path):
    few = [
        word
        for name, value in dataclasses.asdict(TINY).items()
        if name != "data_seed"
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    asked = ("--quick", "--base", base, "--cache", tmp_path / "cache", "--cells", "base", "moelora*", *few)
    done = claims(*asked, "-o", tmp_path / "out", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    assert "2 of 2, after" in done.stderr
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert [result["cell"] for result in found["scores"]] == ["base", "moelora-k4-ffn-s0"]
    assert (found["missing"], found["quick"], found["settings"]["steps"]) == ([], True, 2)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text == done.stdout and "A quick run" in text
    again = claims(*asked)
    assert again.returncode == 0 and " of 2, after" not in again.stderr
    other = claims(*asked, "--seeds", 5, "--cells", "nothing")
    assert (other.returncode, other.stderr) == (2, other.stderr) and "none of base, teamlora-k4-ffn-s5" in other.stderr
    assert claims("--jobs", 0).returncode == 2
