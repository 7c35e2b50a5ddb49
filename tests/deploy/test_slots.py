"""The rows that texts of a batch have: what padding they take, what calls leave of them, and how long they are."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))
from scheduled_texts import finish, greedy, tokens, tokens_after

from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler

pytest_plugins = ["scheduler_fixtures"]


@pytest.mark.parametrize("cache", ["in-place", "growing"])
def test_a_model_that_makes_no_number_of_padding_reads_texts_alone(cache, open_slots):
    """As one whose mask is minus infinity: what a token sees that sees nothing is no number."""
    model, prompts = open_slots("mistral", cache, slots=3), [[5, 6, 7], [8], [9, 10]]
    expected, calls, run = greedy(model, prompts, 6), [], model._run

    def strict(rows: range, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        calls.append(counts.tolist())
        logits = run(rows, ids, counts)
        logits[counts < ids.shape[1]] = np.nan
        return logits

    model._run = strict  # type: ignore[method-assign]
    for _ in range(2):
        scheduler = Scheduler(model)
        answers = [scheduler.submit(prompt, 6) for prompt in prompts]
        finish(scheduler)
        assert [tokens(answer) for answer in answers] == expected
    assert [call for call in calls if call != [1] * len(call)] == [[3, 1, 2], [2], [3], [2]]


def test_what_a_call_gave_is_not_kept_for_the_next(open_slots):
    model = open_slots(slots=2)
    model.read(0, [[5, 6]])
    assert not model._calls[0, 1].binding.get_outputs()[0].has_value()


def test_a_text_that_has_begun_takes_no_padding(open_slots):
    model = open_slots(slots=2)
    model.read(0, [[5, 6, 7]])
    with pytest.raises(ModelError, match="takes no padding"):
        model.read(0, [[8], [9, 10]])
    model.read(0, [[8, 9], [10]])


def test_a_device_that_is_not_there_is_refused(make_bundle, monkeypatch):
    folder = make_bundle("llama").folder
    for device, message in (
        ("tpu", "give cpu, cuda"),
        ("cuda:", "give cpu"),
        ("cpu:1", "give cpu"),
        ("cuda", "is for CPUs"),
    ):
        with pytest.raises(ModelError, match=message):
            Model(folder, device=device)
    # As a package for GPUs on a machine without one: ONNX Runtime leaves the provider out, and says nothing.
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(ModelError, match=r"--device cuda:1: ONNX Runtime .* cannot use it"):
        Model(folder, device="cuda:1")


@pytest.mark.parametrize("cache", ["in-place", "growing", "on a device"])
def test_a_row_that_is_tried_out_keeps_nothing_and_changes_no_other(cache, open_slots, monkeypatch):
    model, prompts = open_slots(cache=cache, slots=3), [[9, 10, 11], [12, 13]]
    expected = greedy(model, prompts, 8)
    scheduler = Scheduler(model)
    answers = [scheduler.submit(prompt, 8) for prompt in prompts]
    scheduler.turn()
    model.try_out(2)
    assert model.lengths[2] == 0
    run, calls = model._run, []

    def fail_then(*given: Any) -> np.ndarray:
        calls.append(run(*given))
        return calls[-1] if len(calls) == 1 else 1 // 0

    with monkeypatch.context() as patch:
        patch.setattr(model, "_run", fail_then)
        with pytest.raises(ZeroDivisionError):
            model.try_out(2)
    assert (len(calls), model.lengths[2]) == (2, 0)
    finish(scheduler)
    assert [tokens(answer) for answer in answers] == expected
    if cache == "in-place":
        assert not any(buffer.any() for buffer in model._buffers.values())
    if cache == "growing":
        assert not model._batches
    # What is in its way is cleared, as what a failed call leaves: nothing takes less.
    model.read(0, [[5] * 20])
    seen, taken = [], model._session.taken
    with monkeypatch.context() as patch:
        patch.setattr(model._session, "taken", lambda feeds: seen.append(feeds["attention_mask"].sum()) or taken(feeds))
        model.try_out(0)
    assert seen == [2, 3]
    assert [tokens_after(scheduler, prompt, 8) for prompt in prompts] == expected


def test_a_model_that_takes_no_padding_reads_none(open_slots, monkeypatch):
    """As graphs of others: only rows of one length share a call."""
    model, drawn, masks = open_slots("mistral", "growing", slots=4), random.Random(0), []
    model.settings, model.padding = replace(model.settings, padded=False), 0
    taken = model._session.taken
    monkeypatch.setattr(model._session, "taken", lambda given: masks.append(given["attention_mask"]) or taken(given))
    prompts = [[drawn.randrange(3, 384) for _ in range(length)] for length in (9, 4, 9, 1, 9, 4, 17)]
    expected = greedy(model, prompts, 12)
    scheduler = Scheduler(model, reading=100)
    answers = [scheduler.submit(prompt, 12) for prompt in prompts]
    finish(scheduler)
    assert [tokens(answer) for answer in answers] == expected
    assert all(mask.all() for mask in masks)
    assert max(map(len, masks)) > 1, "rows that are of one length do"


def test_buffers_are_no_longer_than_the_longest_text_needs(open_slots):
    model = open_slots(slots=3)
    scheduler = Scheduler(model)
    long, short = scheduler.submit([7] * 100, 3), scheduler.submit([5, 6], 30)
    finish(scheduler)
    assert model.capacity < 128
    assert tokens(short) == greedy(model, [[5, 6]], 30)[0]
    assert tokens(long) == greedy(model, [[7] * 100], 3)[0]
