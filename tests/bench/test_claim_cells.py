"""Cells of the measure of the method: equal numbers of parameters, and what is trained is kept, goes on, and is found
again where everything is the same."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import get_model

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from method import cells as cells_module
from method.cells import run_cell
from method.plan import BASE, FULL, count_parameters, full_grid, nearest_rank, options_of, quick_grid
from tasks import TASKS
from tiny_cells import LORA, TEAM, TINY

from teamlora_export.adapter import BaseSignature, LinearShape, read_adapter
from teamlora_export.errors import ExportError
from teamlora_export.train.model import TrainedLinear, start_adapter

pytest_plugins = ["claim_fixtures"]


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
    (place.of(TEAM) / "adapter" / "adapter_model.safetensors").unlink()
    assert run_cell(TEAM, place) == place.find(TEAM)


def test_a_killed_cell_goes_on_where_it_was(team, place, monkeypatch):
    """Killed when the adapter was just written, and its checkpoints not yet gone: it is taken as it is."""
    import teamlora_export.train

    folder = place.of(TEAM)
    (folder / "result.json").unlink()
    (folder / "adapter.training").mkdir()
    monkeypatch.setattr(teamlora_export.train, "train", lambda *_: pytest.fail("trained again"))
    again = run_cell(TEAM, place)
    assert {**again, "seconds": 0} == {**team, "seconds": 0}
    assert not (folder / "adapter.training").exists()


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
