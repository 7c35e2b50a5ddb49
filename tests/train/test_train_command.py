"""A training from end to end on tiny models: what it writes, what it keeps, and how it goes on after it was killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter
from teamlora_export.train import TrainOptions, count_parameters, train
from teamlora_export.train import trainer as trainer_module
from teamlora_export.train.options import FAMILY_NAMES

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tasks of 24 rows: words, and words turned around."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for task, change in (("copy", lambda word: word), ("turn", lambda word: word[::-1])):
        words = ("".join(rng.choices("abcdef", k=rng.randint(2, 6))) for _ in range(24))
        lines = [json.dumps({"prompt": f"{task} {word}:", "answer": f" {change(word)}"}) for word in words]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def options(make_base, data, tmp_path) -> TrainOptions:
    """Three epochs of six steps, with dropout, so that random numbers count, and held-out rows."""
    return TrainOptions(
        base=make_base("llama").name,
        data=(data,),
        output=tmp_path / "adapter",
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
        patience=0,
    )


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    """To the bit."""
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


KILLED = """
import os, signal, sys
from teamlora_export.train import trainer
from teamlora_export import cli
compute, count = trainer.AdapterTrainer.compute_loss, iter(range(1, 10_000))
def kill(self, *args, **kwargs):
    loss = compute(self, *args, **kwargs)
    if next(count) == 11:
        os.kill(os.getpid(), getattr(signal, os.environ["KIND"]))
    return loss
trainer.AdapterTrainer.compute_loss = kill
cli.main()
"""


def run_killed(options: TrainOptions, kind: str) -> subprocess.CompletedProcess[str]:
    """The command, which gets a signal within its eleventh step."""
    import shlex

    command = [sys.executable, "-c", KILLED, *shlex.split(options.command())[1:]]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "KIND": kind}, check=False)


def test_a_killed_training_goes_on_and_ends_with_the_same_adapter_to_the_bit(options, tmp_path, monkeypatch):
    whole = dataclasses.replace(options, output=tmp_path / "whole")
    result = train(whole, QUIET)
    assert run_killed(options, "SIGKILL").returncode == -signal.SIGKILL
    work = tmp_path / "adapter.training"
    assert sorted(path.name for path in work.iterdir()) == ["checkpoint-8", "session.json"]
    assert not options.output.exists()
    size = sum(path.stat().st_size for path in work.rglob("*"))
    assert size < 12 * 4 * result.trained_parameters + 60_000, "the base is in no checkpoint"

    with pytest.raises(ExportError, match="left unfinished. Go on with --resume"):
        train(options, QUIET)
    again = dataclasses.replace(options, resume=True)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        # In the middle of an epoch once more, after two more checkpoints.
        crash_at(patched, 9)
        train(again, QUIET)
    assert (work / "checkpoint-16").is_dir()
    resumed = train(again, QUIET)
    assert not work.exists()
    assert_same(options.output, whole.output)
    assert resumed.held_out == result.held_out
    assert resumed.held_out_before == result.held_out_before
    assert resumed.best_step == result.best_step
