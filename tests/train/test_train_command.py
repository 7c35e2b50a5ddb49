"""A training from end to end on tiny models: what it writes, what it keeps, and how it goes on after it was killed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ARCHITECTURES, MIXTURES, OTHERS, ROTATIONS
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from teamlora_export import interrupt, staging
from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.files import sha256_of
from teamlora_export.inspect import inspect_path
from teamlora_export.model.inject import inject
from teamlora_export.progress import Reporter
from teamlora_export.train import TrainOptions, TrainResult, checkpoint, count_parameters, train
from teamlora_export.train import model as model_module
from teamlora_export.train import run as run_module
from teamlora_export.train import trainer as trainer_module
from teamlora_export.train.card import summary
from teamlora_export.train.data import read_rows, split_rows
from teamlora_export.train.encode import Encoder
from teamlora_export.train.options import FAMILY_NAMES
from teamlora_export.validate.run import validate_bundle

QUIET = Reporter(quiet=True)
GENERATORS = [
    name
    for name, architecture in {**ARCHITECTURES, **MIXTURES, **ROTATIONS, **OTHERS}.items()
    if architecture.task == "text-generation"
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tasks of 24 rows: words, and words turned around."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for task, change in (("copy", lambda word: word), ("turn", lambda word: word[::-1])):
        words = ("".join(rng.choices("abcdef", k=rng.randint(2, 6))) for _ in range(24))
        lines = [json.dumps({"prompt": f"{task} {word}:", "answer": f" {change(word)}"}) for word in words]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def asked(base: str, data: Path, output: Path) -> TrainOptions:
    """Three epochs of six steps, with dropout, so that random numbers count, and held-out rows."""
    return TrainOptions(
        base=base,
        data=(data,),
        output=output,
        rank=4,
        experts=2,
        targets=("q_proj", "down_proj"),
        dropout=0.1,
        steps=18,
        batch=6,
        learning_rate=2e-2,
        validation=0.25,
        evaluate_every=4,
        save_every=4,
        log_every=5,
        patience=0,
    )


@pytest.fixture
def options(make_base, data, tmp_path) -> TrainOptions:
    return asked(make_base("llama").name, data, tmp_path / "adapter")


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


# Of `training.json`; and of what it logs at the end.
UNLIKE = ("command", "seconds_per_step", "sha256", "log")
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def record_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `training.json` says, and what it has logged, but for times and places."""
    record = json.loads((folder / "training.json").read_text())
    log = [{name: value for name, value in entry.items() if name not in TIMES} for entry in record["log"]]
    return {name: value for name, value in record.items() if name not in UNLIKE}, log


def assert_same(one: Path, other: Path) -> None:
    """To the bit, and so is what was logged."""
    assert record_of(one) == record_of(other)
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


class Crash(Exception):
    pass


def crash_at(monkeypatch, forward: int) -> None:
    """The n-th forward of the training from now on fails."""
    count = iter(range(1, 10_000))
    compute = trainer_module.AdapterTrainer.compute_loss

    def fail(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if next(count) == forward:
            raise Crash
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "compute_loss", fail)


def crash(options: TrainOptions, monkeypatch, forward: int) -> Path:
    """A training that is killed in its n-th step; the folder of what it left."""
    with monkeypatch.context() as patched:
        crash_at(patched, forward)
        with pytest.raises(Crash):
            train(options, QUIET)
    return options.output.with_name(f"{options.output.name}.training")


KILLED = """
import os, signal, sys
from teamlora_export.train import trainer
from teamlora_export import cli
compute, count = trainer.AdapterTrainer.compute_loss, iter(range(1, 10_000))
def kill(self, *args, **kwargs):
    loss = compute(self, *args, **kwargs)
    if next(count) == int(os.environ["STEP"]):
        os.kill(os.getpid(), getattr(signal, os.environ["KIND"]))
    return loss
trainer.AdapterTrainer.compute_loss = kill
cli.main()
"""


def run_killed(options: TrainOptions, kind: str, step: int = 11) -> subprocess.CompletedProcess[str]:
    """The command, which gets a signal within a step."""
    command = [sys.executable, "-c", KILLED, *shlex.split(options.command())[1:]]
    environment = {**os.environ, "KIND": kind, "STEP": str(step), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def whole(make_base, data, tmp_path_factory) -> TrainResult:
    """The training of `options`, uninterrupted."""
    return train(asked(make_base("llama").name, data, tmp_path_factory.mktemp("whole") / "adapter"), QUIET)


def test_a_killed_training_goes_on_and_ends_with_the_same_adapter_to_the_bit(options, whole, monkeypatch):
    assert run_killed(options, "SIGKILL").returncode == -signal.SIGKILL
    work = options.output.with_name("adapter.training")
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-8", "session.json"]
    assert not options.output.exists()
    size = sum(path.stat().st_size for path in work.rglob("*"))
    # The adapter, the best one, and two moments of each number; the base has 35,000 more.
    assert size < 4 * 4 * whole.trained_parameters + 60_000, "the base is in no checkpoint"
    with pytest.raises(ExportError, match=r"left unfinished\. Go on with --resume"):
        train(options, QUIET)
    again = dataclasses.replace(options, resume=True)
    # In the middle of an epoch once more, after two more checkpoints.
    crash(again, monkeypatch, 9)
    assert (work / "checkpoint-16").is_dir()
    resumed = train(again, QUIET)
    assert not work.exists()
    assert_same(options.output, whole.folder)
    with pytest.raises(ExportError, match="its training has ended"):
        train(again, QUIET)
    assert (resumed.held_out, resumed.best_step) == (whole.held_out, whole.best_step)
    assert resumed.held_out_before == whole.held_out_before


def test_a_training_that_was_killed_after_its_last_step_is_only_written(options, whole, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_result", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            train(options, QUIET)
    again = dataclasses.replace(options, resume=True)
    with monkeypatch.context() as patched:
        crash_at(patched, 1)
        result = train(again, QUIET)
    assert_same(options.output, whole.folder)
    assert (result.steps, result.best_step, result.held_out) == (whole.steps, whole.best_step, whole.held_out)


@pytest.mark.parametrize("step", [4, 8, 10, 18])
def test_ctrl_c_ends_it_with_a_checkpoint_and_says_how_it_goes_on(step, options, whole):
    """After steps 4, 8 and 18, the last, an evaluation is due: it is the first that is done when it goes on. At step 10
    all was just logged."""
    done = run_killed(options, "SIGINT", step)
    assert done.returncode == 2
    found = options.output.with_name("adapter.training") / f"checkpoint-{step}"
    told = f"Error: Interrupted; was written whole before: {found}; --resume goes on from there."
    assert done.stderr.splitlines()[-1] == told
    resumed = train(dataclasses.replace(options, resume=True), QUIET)
    assert_same(options.output, whole.folder)
    assert (resumed.held_out, resumed.best_step) == (whole.held_out, whole.best_step)
    evaluated = [[(e["step"], e["eval_loss"]) for e in r.log if "eval_loss" in e] for r in (resumed, whole)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 5


def test_an_evaluation_that_is_interrupted_twice_is_done_when_it_goes_on(options, whole, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr(interrupt, "note_written", written.append)

    def interrupted(batch: int, asked_for: TrainOptions) -> None:
        """Within an evaluation, before its n-th batch since the training began."""
        count = iter(range(1, 10_000))

        def leave(self: object) -> None:
            if next(count) == batch:
                raise interrupt.Interrupted

        with monkeypatch.context() as patched:
            patched.setattr(trainer_module.AdapterTrainer, "_leave_where_interrupted", leave)
            with pytest.raises(interrupt.Interrupted):
                train(asked_for, QUIET)

    again = dataclasses.replace(options, resume=True)
    # Two batches before the first step, two after steps 4 and 8.
    interrupted(6, options)
    interrupted(2, again)
    assert [told.partition(";")[0].rpartition("/")[2] for told in written] == ["checkpoint-8"] * 2
    result = train(again, QUIET)
    assert_same(options.output, whole.folder)
    assert [(e["step"], e["eval_loss"]) for e in result.log if "eval_loss" in e] == [
        (e["step"], e["eval_loss"]) for e in whole.log if "eval_loss" in e
    ]


def test_a_training_goes_on_with_the_same_options_and_files_only(options, whole, data, tmp_path, monkeypatch):
    work = crash(options, monkeypatch, 6)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    with (other / "copy.jsonl").open("a") as file:
        file.write('{"prompt": "new", "answer": "row"}\n')
    again = dataclasses.replace(options, resume=True)
    for changed, told in (
        (dataclasses.replace(again, learning_rate=1e-3, rank=8), r"--rank 4 \(now 8\); --learning-rate 0.02 \(now"),
        (dataclasses.replace(again, data=(other,)), "other contents of .*copy.jsonl"),
    ):
        with pytest.raises(ExportError, match=told):
            train(changed, QUIET)
    with checkpoint.alone(work), pytest.raises(ExportError, match="another training is at work"):
        train(again, QUIET)
    # Two that saw nothing there begin at the same moment: one does.
    session = checkpoint.Session({}, {}, 1, {})
    with checkpoint.begin(tmp_path / "both.training", session):
        for begin in (
            checkpoint.begin(tmp_path / "both.training", session),
            checkpoint.alone(tmp_path / "both.training"),
        ):
            with pytest.raises(ExportError, match="another training is at work"), begin:
                pass
    # As a version before has begun it: without hashes of the rows as tokens.
    begun = json.loads((work / "session.json").read_text())
    begun["hashes"] = {name: of for name, of in begun["hashes"].items() if "rows as tokens" not in name}
    (work / "session.json").write_text(json.dumps(begun))
    asked_for = checkpoint.Session(begun["options"], begun["hashes"], 1, begun["versions"])
    with_tokens = {**begun["hashes"], "rows as tokens": "0", "held-out rows as tokens": "1"}
    (told,) = checkpoint.refuse_other(work, dataclasses.replace(asked_for, hashes=with_tokens))
    assert told.startswith("an earlier version, which kept no hash")
    with pytest.raises(ExportError, match="other contents of copy"):
        checkpoint.refuse_other(work, dataclasses.replace(asked_for, hashes={**with_tokens, "copy": "2"}))
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    # Nor had its checkpoints the sums of what is logged next: that is of the steps since.
    changed_tensors(work / "checkpoint-4" / "tensors.safetensors", without("sums."))
    rehash(work / "checkpoint-4")
    saved, write = list[int](), trainer_module.write_checkpoint
    monkeypatch.setattr(trainer_module, "write_checkpoint", lambda *of: saved.append(of[1]) or write(*of))
    result = train(dataclasses.replace(again, data=(moved,), save_every=3), QUIET)
    assert saved == [6, 9, 12, 15, 18]
    assert result.steps == 18 and result.losses[1:] == whole.losses[1:]
    (_, of_one), (step, of_five) = result.losses[0], whole.losses[0]
    assert step == 5 and of_one != of_five
    total = 18 * whole.log[-1]["train_loss"] - 5 * of_five + of_one
    assert result.log[-1]["train_loss"] == pytest.approx(total / 14)


def test_a_training_that_was_killed_while_it_cleared_up_has_ended(options, whole, monkeypatch):
    """With all of its checkpoint, with a part of it, with none; and a folder that is still, or already, empty."""
    work, kept = options.output.with_name("adapter.training"), options.output.with_name("kept")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "finish", lambda _: None)
        train(options, QUIET)
    work.rename(kept)

    def part() -> None:
        """As of a process that is killed when the first file of the checkpoint has gone."""

        def killed(path: Path) -> None:
            (path / "sha256.json").unlink()
            raise Crash

        with monkeypatch.context() as patched:
            patched.setattr(staging, "_rmtree", killed)
            with pytest.raises(Crash):
                checkpoint.finish(work)

    again = dataclasses.replace(options, resume=True)
    for stop in (lambda: None, part, lambda: shutil.rmtree(work / "checkpoint-18")):
        shutil.copytree(kept, work)
        stop()
        assert work.is_dir() and any(work.iterdir())
        with pytest.raises(ExportError, match="its training has ended"):
            train(again, QUIET)
        assert not work.exists()
        assert_same(options.output, whole.folder)
    # What is there is of another type of numbers: its checkpoint is all that there is of what is asked now.
    in_bf16 = dataclasses.replace(again, save_dtype="bf16")
    shutil.copytree(kept, work)
    with pytest.raises(ExportError, match="left unfinished"):
        train(dataclasses.replace(in_bf16, resume=False), QUIET)
    assert (work / "checkpoint-18").is_dir()
    train(in_bf16, QUIET)
    assert json.loads((options.output / "training.json").read_text())["options"]["save_dtype"] == "bf16"
    work.mkdir()
    with pytest.raises(ExportError, match="its training has ended"):
        train(again, QUIET)
    assert train(dataclasses.replace(options, steps=1), QUIET).steps == 1 and not work.exists()


def test_a_training_goes_on_with_the_same_tokens_only(make_base, data, tmp_path, monkeypatch):
    """Another end of a text, and a file that moves from one part to the other: the same files, other rows."""
    base = tmp_path / "base"
    shutil.copytree(make_base("llama").folder, base)
    parts = [shutil.copy(data / f"{name}.jsonl", tmp_path / f"{name}.jsonl") for name in ("copy", "turn")]
    third = tmp_path / "third.jsonl"
    third.write_text('{"prompt": "third", "answer": " row", "task": "copy"}\n')
    options = asked(str(base), data, tmp_path / "adapter")
    options = dataclasses.replace(options, data=tuple(map(Path, parts)), validation=(third,), resume=True)
    crash(options, monkeypatch, 6)
    moved = dataclasses.replace(options, data=options.data[:1], validation=(*options.data[1:], third))
    with pytest.raises(ExportError, match="other contents of rows as tokens, held-out rows as tokens"):
        train(moved, QUIET)
    (base / "generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(ExportError, match="other contents of rows as tokens, held-out rows as tokens"):
        train(options, QUIET)


def test_a_full_disk_is_told_with_the_checkpoint_that_is_whole(options, whole, monkeypatch):
    save, calls = safetensors.torch.save_file, iter(range(10))

    def full(*arguments: Any, **_: Any) -> None:
        if next(calls) == 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        told = r"checkpoint-8\S*: No space left on device; .*checkpoint-4 is whole: --resume goes on from it\."
        with pytest.raises(ExportError, match=told):
            train(options, QUIET)
    with monkeypatch.context() as patched:
        patched.setattr("teamlora_export.adapter.write.save_file", full)
        calls = iter([1])
        with pytest.raises(ExportError, match=r"No space left on device; .*checkpoint-18 is whole: --resume goes on"):
            train(dataclasses.replace(options, resume=True), QUIET)
    train(dataclasses.replace(options, resume=True), QUIET)
    assert_same(options.output, whole.folder)


def test_the_root_of_the_file_system_is_no_output(options):
    with pytest.raises(ExportError, match=r"/: is the root of the file system"):
        train(dataclasses.replace(options, output=Path("/")), QUIET)


def test_rows_that_were_left_out_or_cut_are_in_the_record_and_on_the_card(options, data, tmp_path):
    path = tmp_path / "rows.jsonl"
    long = json.dumps({"prompt": "abc " * 100, "answer": " d", "task": "a\nb"})
    path.write_text((data / "copy.jsonl").read_text() + f"{long}\n" * 2)
    asked_for = dataclasses.replace(
        options, data=(path,), validation=None, steps=1, max_length=100, implementation="published"
    )
    for way, told, figures in (
        ("skip", "Longer than 100 tokens: 2 rows were left out.", (0, 2)),
        ("cut", "Longer than 100 tokens: 2 prompts lost their beginning.", (2, 0)),
    ):
        train(dataclasses.replace(asked_for, too_long=way), QUIET)
        record = json.loads((options.output / "training.json").read_text())
        assert (record["rows_cut"], record["rows_skipped"]) == figures
        assert told in (options.output / "README.md").read_text()
    used = {"alpha": 4.0, "balance_weight": 0.05, "experts": 2, "targets": ["down_proj", "q_proj"], "max_length": 100}
    assert {**record["used"], "targets": sorted(record["used"]["targets"])} == used
    assert "--implementation" not in record["command"]


def test_a_task_is_one_line_of_the_summary(whole):
    forged = dataclasses.replace(whole, held_out={"one\ntwo: held-out loss 0.0": 1.0}, held_out_before={})
    assert len(summary(forged).splitlines()) == len(
        summary(dataclasses.replace(whole, held_out={"one": 1.0})).splitlines()
    )


def changed_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def changed_fields(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def without(part: str) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(part)]


def rehash(folder: Path) -> None:
    """As of a checkpoint that was written so."""
    hashes = {name: sha256_of(folder / name) for name in DAMAGES if name != "sha256.json"}
    (folder / "sha256.json").write_text(json.dumps(hashes))


# Each would go on, to another adapter, or fail within a library.
DAMAGES = {
    "tensors.safetensors": [
        without("random.cpu"),
        without("optimizer."),
        without("best."),
        lambda tensors: tensors.update({"random.cpu": np.zeros_like(tensors["random.cpu"])}),
        lambda tensors: tensors.update({"random.cpu": tensors["random.cpu"][:, :10].copy()}),
    ],
    "state.json": [
        lambda fields: fields.update(schedule={}),
        lambda fields: fields.update(schedule={"step": 3}),
        lambda fields: fields.update(groups=[]),
    ],
    "trainer_state.json": [lambda fields: fields.update(log_history=[{"loss": "x"}, 3])],
    "sha256.json": [lambda fields: fields.clear()],
}


def test_a_damaged_checkpoint_is_refused_by_name(options, monkeypatch):
    found = crash(options, monkeypatch, 6) / "checkpoint-4"
    assert checkpoint.read_checkpoint(found).step == 4
    for name, changes in DAMAGES.items():
        before = (found / name).read_bytes()
        for change in changes:
            (changed_tensors if name.endswith("safetensors") else changed_fields)(found / name, change)
            told = "" if name == "sha256.json" else re.escape(name)
            with pytest.raises(ExportError, match=f"{told}: is not as it was written. Remove checkpoint-4"):
                checkpoint.read_checkpoint(found)
            (found / name).write_bytes(before)
        (found / name).unlink()
        with pytest.raises(ExportError, match=f"{re.escape(name)}: is missing"):
            checkpoint.read_checkpoint(found)
        (found / name).write_bytes(before)
    changed_fields(found / "state.json", lambda fields: fields.update(schedule={}))
    crash_at(monkeypatch, 1)
    with pytest.raises(ExportError, match="is not as it was written"):
        train(dataclasses.replace(options, resume=True), QUIET)


def test_a_foreign_checkpoint_is_refused_by_name(options, monkeypatch):
    """One whose hashes are right."""
    work = crash(options, monkeypatch, 6)
    again = dataclasses.replace(options, resume=True)
    found = work / "checkpoint-4"

    def refused(path: Path, content: bytes | None, told: str) -> None:
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        rehash(found)
        with pytest.raises(ExportError, match=told):
            train(again, QUIET)
        path.write_bytes(before)

    state = json.loads((found / "state.json").read_text())
    refused(found / "state.json", json.dumps({**state, "standing": 3}).encode(), "state.json: .*standing")
    refused(found / "trainer_state.json", b'{"global_step": 4, "strange": 1}', "strange")
    # A pickle, were it opened as one, would run.
    refused(found / "tensors.safetensors", pickle.dumps(Crash("run")), "tensors.safetensors: cannot be read")
    refused(work / "session.json", None, "no training of this tool is in it")
    changed_tensors(found / "tensors.safetensors", lambda tensors: tensors.pop(min(tensors)))
    rehash(found)
    with pytest.raises(ExportError, match="of another adapter"):
        train(again, QUIET)


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_written_does_what_was_measured(family, save_dtype, options, make_base):
    """The files, read back into the reference layer, have the held-out loss that the record tells."""
    asked_for = dataclasses.replace(options, family=family, targets="all-linear", save_dtype=save_dtype)
    result = train(asked_for, QUIET)
    assert count_parameters(asked_for) == result.trained_parameters
    assert result.held_out_loss < sum(result.held_out_before.values()) / 2 - 0.1, "it learns"
    base = make_base("llama")
    model = base.load(torch.float32)
    inject(model, align_with_base(read_adapter(options.output), base.signature))
    rows = split_rows(read_rows(options.data).rows, 0.25, options.seed)[1]
    encoder = Encoder(base.folder, options)
    losses = []
    for row in encoder.encode(rows, ["copy", "turn"])[0]:
        ids = torch.tensor([row.ids])
        logits = model(ids).logits[0, row.prompt_length - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, row.prompt_length :], reduction="none").tolist()
    # 1e-4: means of float32 losses, summed in another order.
    assert np.mean(losses) == pytest.approx(result.held_out_loss, abs=1e-4)
    record = json.loads((options.output / "training.json").read_text())
    assert record["held_out_loss"] == result.held_out
    trained = min(entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry)
    assert (result.held_out_loss == trained) == (save_dtype == "fp32"), "of the file, whose numbers are rounded"
    shares = [*record["expert_use"].values(), *record["expert_use_by_layer"].values()]
    assert bool(shares) == (family != "lora")
    assert all(sum(share) == pytest.approx(1, abs=1e-3) for share in shares)
    assert "model.safetensors" in record["inputs"] and "config.json" in record["inputs"]
    card = (options.output / "README.md").read_text()
    assert f"{result.trained_parameters:,} trained parameters" in card and options.command().split()[1] in card


@pytest.mark.parametrize("name", GENERATORS)
def test_every_text_generator_is_trained_on_all_of_its_linear_layers(name, make_base, data, tmp_path):
    """Some flatten rows and tokens before a projection."""
    options = TrainOptions(make_base(name).name, (data,), tmp_path / "adapter", rank=2, experts=2, steps=1, warmup=0.0)
    result = train(options, QUIET)
    shares = [*result.expert_use.values(), *result.layer_use.values()]
    assert np.isfinite(result.losses).all() and result.balance_loss is not None
    assert all(sum(share) == pytest.approx(1, abs=1e-3) for share in shares)


def test_layers_that_do_not_see_each_token_are_refused_by_name_before_the_training(options, monkeypatch):
    forward = model_module.TrainedLinear.forward

    def skip(self, x):  # type: ignore[no-untyped-def]
        """The second layer's q_proj sees no text, or a part of it."""
        if not self.path.endswith("1.self_attn.q_proj"):
            return forward(self, x)
        return torch.cat([forward(self, x[:, :seen]), self.base_projection(x[:, seen:])], dim=1)

    monkeypatch.setattr(model_module.TrainedLinear, "forward", skip)
    seen = 1
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.q_proj: is called on 2 tokens where the text has"):
        train(options, QUIET)
    monkeypatch.setattr(model_module.TrainedLinear, "forward", lambda self, x: self.base_projection(x))
    with pytest.raises(ExportError, match=r"layers\.0\.\S*: is not called on a text"):
        train(options, QUIET)
    assert not list(options.output.parent.iterdir())


def test_a_trained_adapter_is_exported_and_found_right(options, whole, make_base, tmp_path):
    bundle = export_onnx(make_base("llama").name, whole.folder, tmp_path / "bundle")
    assert validate_bundle(bundle).passed
    assert "teamlora" in "\n".join(inspect_path(whole.folder).lines())


def test_memory_and_batches_of_a_step_change_no_figure(options, whole):
    for fields in ({"gradient_checkpointing": True}, {"batch": 3, "accumulate": 2, "balance_weight": 0.0}):
        plain = dataclasses.replace(options, dropout=0.0, steps=6, **{k: fields[k] for k in fields if k[:2] == "ba"})
        expected = train(dataclasses.replace(plain, batch=6), QUIET).held_out_loss
        found = train(dataclasses.replace(options, dropout=0.0, steps=6, **fields), QUIET).held_out_loss
        # 1e-4: float32, other sums.
        assert found == pytest.approx(expected, abs=1e-4), fields


def test_two_processes_train_what_one_does_with_twice_the_batch(options):
    alone = dataclasses.replace(options, dropout=0.0, steps=6, balance_weight=0.0)
    expected = train(alone, QUIET)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = dataclasses.replace(alone, batch=3, output=options.output.with_name("both"))
    command = [*launch, "-m", "teamlora_export", *shlex.split(both.command())[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seconds a step") == 1, "one of them tells"
    record = json.loads((both.output / "training.json").read_text())
    # 1e-4: float32 in collectives, other sums.
    assert record["held_out_loss"] == pytest.approx(expected.held_out, abs=1e-4)


def test_a_training_that_can_learn_nothing_is_warned_of(options, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(Reporter, "warn", lambda self, text: told.append(text))
    train(dataclasses.replace(options, steps=2, learning_rate=0.0, warmup=2.0, validation=None), QUIET)
    assert [text.split()[0] for text in told] == ["--learning-rate", "--evaluate-every:", "--warmup"]


def test_what_a_launcher_asks_for_beside_processes_is_refused(options, monkeypatch):
    for name, value in (("ACCELERATE_MIXED_PRECISION", "bf16"), ("ACCELERATE_DYNAMO_BACKEND", "eager")):
        monkeypatch.setenv(name, value)
        with pytest.raises(ExportError, match=f"{name} is {value}: not supported"):
            train(options, QUIET)
        monkeypatch.setenv(name, "no")
    assert train(dataclasses.replace(options, steps=1, validation=None), QUIET).steps == 1


def test_it_stops_when_the_held_out_loss_rises_and_keeps_the_best(options, monkeypatch):
    rising = dataclasses.replace(options, learning_rate=0.5, warmup=0.0, schedule="constant", steps=60, patience=2)
    rising = dataclasses.replace(rising, evaluate_every=2, save_every=7)
    left: list[str] = []
    work = options.output.with_name("adapter.training")
    # Killed before it has cleared up.
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "finish", lambda folder: left.extend(path.name for path in folder.iterdir()))
        result = train(rising, QUIET)
    assert result.steps % 7 and sorted(left) == [f"checkpoint-{result.steps}", "session.json"]
    with pytest.raises(ExportError, match="its training has ended"):
        train(dataclasses.replace(rising, resume=True), QUIET)
    assert not work.exists()
    record = json.loads((options.output / "training.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry}
    assert result.stopped_early and result.steps < 60
    assert result.steps == max(losses) == result.best_step + 4
    assert result.held_out_loss == pytest.approx(min(losses.values())) == pytest.approx(losses[result.best_step])


def test_a_training_that_diverges_is_one_sentence(options, monkeypatch):
    losses = trainer_module.token_losses
    steps = iter(range(100))
    monkeypatch.setattr(
        trainer_module, "token_losses", lambda *args: losses(*args) * (math.nan if next(steps) == 2 else 1.0)
    )
    with pytest.raises(ExportError, match=r"Step 3: loss is nan: the training diverged\. Lower --learning-rate"):
        train(dataclasses.replace(options, log_every=1), QUIET)
    assert not list(options.output.parent.iterdir()), "there is nothing to go on from"
    monkeypatch.undo()


def test_numbers_that_do_not_fit_into_the_files_type_are_written_in_another(options):
    asked_for = dataclasses.replace(options, save_dtype="fp16", learning_rate=1e5, steps=2, validation=None)
    with pytest.raises(ExportError, match=r"do not fit into --save-dtype fp16\. .* --resume --save-dtype fp32"):
        train(asked_for, QUIET)
    assert not options.output.exists()
    train(dataclasses.replace(asked_for, save_dtype="fp32", resume=True), QUIET)
    assert max(np.abs(value).max() for value in weights(options.output).values()) > 65504
    assert json.loads((options.output / "training.json").read_text())["options"]["save_dtype"] == "fp32"


def test_only_what_a_training_wrote_is_replaced(options, whole):
    shutil.copytree(whole.folder, options.output)
    with (options.output / "README.md").open("a") as file:
        file.write("My own notes.\n")
    with pytest.raises(ExportError, match=r"README\.md: is not a file that teamlora-export wrote"):
        train(options, QUIET)
    shutil.copy(whole.folder / "README.md", options.output)
    train(dataclasses.replace(options, steps=2), QUIET)
    (options.output / "training.json").unlink()
    with pytest.raises(ExportError, match="no training of this tool is in it"):
        train(options, QUIET)
