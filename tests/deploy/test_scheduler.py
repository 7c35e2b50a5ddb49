"""Continuous batching, without a server: texts are the runner's whoever shares the batch, and fail alone."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import lose_device, poison_token, readme_block
from waiting import wait_until

from teamlora_export.deploy import scheduler, slots, slots_in_place
from teamlora_export.deploy.answers import Answer, Broken, Failed, Late, Overloaded, Token
from teamlora_export.deploy.device_tensor import DeviceTensor
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.sampling import Sampling
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.session import Session
from teamlora_export.deploy.slots import DeviceSlots, Slots


@pytest.fixture
def open_slots(make_bundle, monkeypatch) -> Callable[..., Any]:
    """Buffers that are short at first, so that they grow again and again."""
    open = slots.open_slots
    monkeypatch.setattr(slots_in_place, "_LEAST_CAPACITY", 4)

    def make(
        name: str = "llama", cache: str = "in-place", slots: int = 8, part: int = 256, most: int | None = None
    ) -> Slots:
        if cache == "on a device":
            # What runs on a GPU, on the one device that ONNX Runtime has here.
            return DeviceSlots(Session(make_bundle(name, cache="in-place").folder, threads=1), slots, part, most)
        return open(Session(make_bundle(name, cache=cache).folder, threads=1), slots, part, most)

    return make


def greedy(model: Slots, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """What each text is alone."""
    alone = Model(model._session.folder, threads=1)
    return [alone.generate([prompt], count)[0] for prompt in prompts]


def tokens(answer: Answer) -> list[int]:
    return [token.id for token in answer]


def finish(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.turn()


def at_work(model: Slots) -> int:
    return sum(length > 0 for length in model.lengths)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", "in-place"),
        ("mistral", "in-place"),
        ("gemma3", "in-place"),
        ("mistral", "growing"),
        ("llama", "on a device"),
        ("gemma3", "on a device"),
    ],
)
def test_texts_are_the_runners_in_whatever_order_they_come_and_go(name, cache, seed, open_slots):
    """Prompts are read in parts, some texts are cancelled, buffers grow, shrink and, with windows, wrap."""
    drawn = random.Random(seed)
    model = open_slots(name, cache, slots=drawn.choice([1, 2, 5]), part=drawn.choice([3, 8, 64]))
    requests = [
        ([drawn.randrange(3, 384) for _ in range(drawn.randrange(1, 60))], drawn.randrange(1, 60)) for _ in range(12)
    ]
    scheduler, answers = Scheduler(model), []
    for prompt, count in requests:
        answers.append(scheduler.submit(prompt, count))
        for _ in range(drawn.randrange(12)):
            scheduler.turn()
        if drawn.random() < 0.2:
            drawn.choice(answers).cancel()
    finish(scheduler)
    for (prompt, count), answer in zip(requests, answers, strict=True):
        (expected,) = greedy(model, [prompt], count)
        found = tokens(answer)
        if answer.finish == "cancelled":
            assert found == expected[: len(found)]
        else:
            assert found == expected
            assert answer.finish == ("length" if len(found) == min(count, 128 - len(prompt)) else "stop")
    assert {answer.finish for answer in answers} >= {"length"}
    assert at_work(model) == 0


def test_threads_that_ask_at_once_share_steps_and_get_what_they_get_alone(open_slots):
    model, drawn = open_slots(slots=8), random.Random(3)
    prompts = [[drawn.randrange(3, 384) for _ in range(drawn.randrange(1, 40))] for _ in range(200)]
    expected = greedy(model, prompts, 6)
    shared, read = [], model.read

    def watched(row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The first call is not over before each thread has asked."""
        wait_until(lambda: shared or sum(map(len, (scheduler._waiting, scheduler._reading, scheduler._writing))) == 8)
        shared.append(len(ids))
        return read(row, ids)

    model.read = watched  # type: ignore[method-assign]
    with Scheduler(model, waiting=200) as scheduler, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: tokens(scheduler.submit(prompt, 6)), prompts)) == expected
    assert max(shared) > 4


@pytest.mark.parametrize("cache", ["in-place", "growing", "on a device"])
def test_short_prompts_that_wait_together_are_read_in_one_call(cache, open_slots):
    """Each is what it is alone, and those are left out whose padding costs more than a call of their own."""
    model, drawn = open_slots("mistral", cache, slots=6), random.Random(4)
    lengths = (5, 9, 1, 60, 7, 50)
    prompts = [[drawn.randrange(3, 384) for _ in range(length)] for length in lengths]
    expected = greedy(model, prompts, 20)
    calls, read = [], model.read
    model.read = lambda row, ids: calls.append(list(map(len, ids))) or read(row, ids)  # type: ignore[method-assign]
    scheduler = Scheduler(model, reading=200)
    answers = [scheduler.submit(prompt, 20) for prompt in prompts]
    scheduler.turn()
    assert calls == [[5, 9, 1, 7], [60, 50]]
    finish(scheduler)
    assert [tokens(answer) for answer in answers] == expected


def test_requests_that_come_at_one_moment_share_their_first_call(open_slots, monkeypatch):
    monkeypatch.setattr(scheduler, "_MOMENT", 5.0)
    model, calls = open_slots(slots=3), []
    read = model.read
    model.read = lambda row, ids: calls.append(len(ids)) or read(row, ids)  # type: ignore[method-assign]
    with Scheduler(model) as running:
        for answer in [running.submit([token], 2) for token in (5, 6, 7)]:
            assert len(tokens(answer)) <= 2
    assert calls[0] == 3


@pytest.mark.parametrize("cache", ["in-place", "growing", "on a device"])
def test_a_device_that_has_failed_ends_every_request_and_takes_no_more(cache, open_slots, monkeypatch):
    """Which is known before the first of them ends: whoever meets that end can act on it."""
    scheduler, known, end = Scheduler(open_slots(cache=cache, slots=2)), [], Answer.end
    answers = [scheduler.submit([5 + n, 6], 60) for n in range(3)]
    scheduler.turn()
    monkeypatch.setattr(Answer, "end", lambda answer, how: known.append(scheduler.broken) or end(answer, how))
    lose_device(monkeypatch)
    finish(scheduler)
    for answer in answers:
        with pytest.raises(Failed, match=r"cannot be run any more .*CUDA error 700.* Start its process again"):
            tokens(answer)
    assert len(known) == 3 and all(known)
    # It is not one that may be sent again later.
    with pytest.raises(Broken, match="cannot be run any more"):
        scheduler.submit([5, 6], 60)
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the model \(CUDA error 700\)\.$"):
        Scheduler(open_slots(cache=cache, slots=2)).__enter__()


def test_a_row_that_cannot_be_cleared_ends_every_request_and_takes_no_more(open_slots, monkeypatch, capfd):
    model, known, end = open_slots(slots=2), [], Answer.end
    come: list[Answer] = []

    def fail(row: int) -> None:
        """Others come until the very end."""
        if len(come) < 3:
            come.append(running.submit([5, 6], 2))
        raise ZeroDivisionError("division by zero")

    with Scheduler(model) as running:
        monkeypatch.setattr(model, "clear", fail)
        monkeypatch.setattr(Answer, "end", lambda answer, how: known.append(running.broken) or end(answer, how))
        come.append(running.submit([5, 6], 2))
        wait_until(lambda: len(known) == 3)
        assert len(come) == 3 and all(known)
        for answer in come:
            with pytest.raises(Failed, match=r"cannot be run any more .*by zero"):
                tokens(answer)
        with pytest.raises(Broken, match="cannot be run any more"):
            running.submit([5, 6], 2)
    # It is closed after that, when no row can be cleared either.
    logged = capfd.readouterr().err
    assert logged.count("What failed first") == logged.count("What failed first: The scheduler failed") == 1


def test_a_call_that_does_not_come_back_holds_up_nobody_beyond_a_time_limit(open_slots):
    model, calls, goes_on = open_slots(slots=1), [], threading.Event()
    (expected,) = greedy(model, [[7]], 2)
    read, running = model.read, Scheduler(model)

    def held(row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        calls.append(ids)
        assert goes_on.wait(60)
        return read(row, ids)

    try:
        with running:
            model.read = held  # type: ignore[method-assign]
            polled, late = running.submit([5], 2, seconds=0.2), running.submit([6], 2, seconds=0.2)
            patient = running.submit([7], 2)
            wait_until(lambda: calls)
            with pytest.raises(Late, match="longer than its time limit"):
                tokens(late)
            # Nobody waits for it.
            with pytest.raises(Late):
                list(polled.arrived())
            assert list(patient.arrived()) == []
            goes_on.set()
            assert tokens(patient) == expected
            # What has come behind its end is not its.
            assert (late.finish, polled.finish, running.broken) == ("", "", "")
            for _ in range(2):
                with pytest.raises(Late):
                    tokens(late)
    finally:
        goes_on.set()


def test_an_answer_that_is_late_stays_so_whatever_comes_behind_it():
    now = [100.0]
    answer = Answer(105, lambda: now[0])
    answer.put(Token(4, None))
    now[0] += 6
    given = iter(answer)
    # What is there is given.
    assert next(given).id == 4
    for again in (given, answer, answer.arrived()):
        with pytest.raises(Late):
            list(again)
        answer.put(Token(5, None))
        answer.end("stop")
    assert answer.finish == ""


def test_an_answer_that_has_ended_is_not_late():
    now = [100.0]
    answer = Answer(105, lambda: now[0])
    answer.put(Token(4, None))
    answer.end("length")
    now[0] += 6
    assert [tokens(answer), tokens(answer), answer.finish] == [[4], [], "length"]


def test_whose_scheduler_is_left_in_a_hurry_is_told_when_its_call_comes_back(open_slots, monkeypatch):
    model, goes_on = open_slots(slots=1), threading.Event()
    read, running = model.read, Scheduler(model).__enter__()
    model.read = lambda row, ids: goes_on.wait(60) and read(row, ids)  # type: ignore[method-assign]
    answers, thread = [running.submit([token], 100, seconds=60) for token in (5, 6)], running._thread
    with monkeypatch.context() as patch:
        # As by Ctrl-C.
        patch.setattr(thread, "join", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            running.__exit__()
    goes_on.set()
    for answer in answers:
        with pytest.raises(Failed, match="closing"):
            tokens(answer)
    running.__exit__()


def test_a_scheduler_whose_thread_has_died_takes_no_more(open_slots, monkeypatch):
    # What a thread cannot do is told by Python.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Scheduler(open_slots(slots=1)) as running:
        with monkeypatch.context() as patch:
            for name in ("_drop", "_end_all"):
                patch.setattr(running, name, lambda *_: 1 // 0)
            left = running.submit([5], 2, seconds=60)
            wait_until(lambda: not running._thread.is_alive())
        with pytest.raises(Broken, match="thread has died"):
            running.submit([5], 2)
    with pytest.raises(Failed, match="closing"):
        tokens(left)


def test_texts_that_cannot_exchange_their_rows_are_all_told(open_slots, monkeypatch):
    model = open_slots(slots=3, part=4)
    scheduler = Scheduler(model, reading=4)
    answers = [scheduler.submit(prompt, 60) for prompt in ([5], [6] * 40, [7])]
    monkeypatch.setattr(model, "swap", lambda one, other: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        finish(scheduler)
    scheduler.__exit__()
    for answer in answers:
        with pytest.raises(Failed, match="closing"):
            list(answer.arrived())


def test_a_device_that_has_no_memory_for_a_moment_is_not_taken_for_one_that_has_failed(open_slots, monkeypatch):
    """What a spoilt row is wiped with takes some; while there is none, it costs those whose row that is."""
    model, wipe, failures = open_slots(cache="on a device", slots=1), DeviceTensor.clear, []
    (expected,) = greedy(model, [[5, 6]], 8)

    def wipe_or_fail(tensor: DeviceTensor, entry: int) -> None:
        if failures:
            raise failures.pop()
        wipe(tensor, entry)

    monkeypatch.setattr(DeviceTensor, "clear", wipe_or_fail)
    scheduler = Scheduler(model)
    spoilt = scheduler.submit([5, 6], 8)
    scheduler.turn()
    for value in model._values.values():
        value.numpy()[0, :, :2] = np.nan
    # A call that fails is made once more.
    failures[:] = [RuntimeError("out of memory")] * 3
    finish(scheduler)
    with pytest.raises(Failed, match=r"no number \(NaN\)"):
        tokens(spoilt)
    with pytest.raises(Failed, match=r"cannot run the model \(out of memory\)"):
        tokens_after(scheduler, [5, 6], 8)
    assert tokens_after(scheduler, [5, 6], 8) == expected
    assert not failures and not scheduler.broken


def test_a_model_that_is_short_of_memory_for_whatever_is_asked_of_it_goes_on_when_there_is_some(
    open_slots, monkeypatch
):
    model = open_slots(slots=1)
    scheduler = Scheduler(model)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model, "_run", fail)
        for _ in range(2):
            with pytest.raises(Failed, match=r"cannot run the model \(MemoryError\)"):
                tokens_after(scheduler, [5, 6], 2)
    assert tokens_after(scheduler, [5, 6], 2) == greedy(model, [[5, 6]], 2)[0]


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


def test_short_requests_hold_up_no_text_for_long(open_slots):
    """Each call that reads them counts, however short they are."""
    model, steps = open_slots(slots=2), []
    read = model.read
    model.read = lambda row, ids: steps.append(row) or read(row, ids)  # type: ignore[method-assign]
    scheduler = Scheduler(model, waiting=200)
    scheduler.submit([5], 100)
    for _ in range(150):
        scheduler.submit([6], 1)
    scheduler.turn()
    assert len(steps) <= 256 // 17 + 1


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


def test_a_row_whose_numbers_are_none_fails_alone_and_leaves_nothing(open_slots):
    model = open_slots(slots=3)
    prompts = [[9, 10, 11], [12, 13], [14, 15, 16, 17]]
    expected = greedy(model, prompts, 8)
    scheduler = Scheduler(model)
    answers = [scheduler.submit(prompt, 8) for prompt in prompts]
    scheduler.turn()
    scheduler.turn()
    for buffer in model._buffers.values():
        buffer[1, :, : model.lengths[1]] = np.nan
    # It takes the row of the one that fails, before the others are done.
    late = scheduler.submit(prompts[1], 8)
    finish(scheduler)
    with pytest.raises(Failed, match=r"no number \(NaN\)"):
        tokens(answers[1])
    assert [tokens(answers[0]), tokens(answers[2]), tokens(late)] == [expected[0], expected[2], expected[1]]
    assert not any(buffer.any() for buffer in model._buffers.values()), "nothing is left of any text"


def test_a_spoilt_row_of_a_device_is_wiped_and_others_are_not_moved(open_slots):
    model = open_slots(cache="on a device", slots=3)
    prompts = [[9, 10, 11], [12, 13], [14, 15, 16, 17]]
    expected = greedy(model, prompts, 8)
    scheduler = Scheduler(model)
    answers = [scheduler.submit(prompt, 8) for prompt in prompts]
    scheduler.turn()
    for value in model._values.values():
        value.numpy()[1, :, :4] = np.nan
    late = scheduler.submit(prompts[1], 8)
    scheduler.turn()
    assert not any(np.isnan(value.numpy()).any() for value in model._values.values())
    finish(scheduler)
    with pytest.raises(Failed, match=r"no number \(NaN\)"):
        tokens(answers[1])
    assert [tokens(answers[0]), tokens(answers[2]), tokens(late)] == [expected[0], expected[2], expected[1]]


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


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_a_token_that_overflows_fails_alone(cache, make_bundle, tmp_path):
    folder = deploy_python(make_bundle("mistral", cache=cache), tmp_path / "out")
    prompts = [[9, 10, 11, 12, 13], [14, 15], [7, 9]]
    expected = Model(folder).generate(prompts[:2], 8)
    poison_token(folder, 7)
    with Scheduler(Model(folder, check=False).slots(2)) as scheduler:
        answers = [scheduler.submit(prompt, 8) for prompt in (prompts[2], *prompts[:2], prompts[2], *prompts[:2])]
        for answer, right in zip(answers, [None, *expected] * 2, strict=True):
            if right is None:
                with pytest.raises(Failed, match="no number"):
                    tokens(answer)
            else:
                assert tokens(answer) == right


def test_an_infinite_key_that_no_one_saw_reaches_no_later_text(open_slots):
    """A number that is none in the row of a text that was cancelled in good health."""
    model = open_slots(slots=2)
    (expected,) = greedy(model, [[12, 13]], 8)
    scheduler = Scheduler(model)
    # It keeps the buffers as long as they are.
    scheduler.submit([20, 21, 22], 60)
    first = scheduler.submit([9, 10, 11], 60)
    for _ in range(20):
        scheduler.turn()
    for buffer in model._buffers.values():
        buffer[1, :, model.lengths[1] - 1] = -np.inf
    first.cancel()
    second = scheduler.submit([12, 13], 8)
    finish(scheduler)
    assert tokens(second) == expected


def test_a_prompt_that_is_read_moves_for_one_that_is_read_before_it(open_slots):
    model = open_slots(slots=2, part=4)
    prompts = [list(range(30, 50)), [9, 10]]
    scheduler = Scheduler(model)
    answers = [scheduler.submit(prompt, 10) for prompt in prompts]
    finish(scheduler)
    assert [tokens(answer) for answer in answers] == greedy(model, prompts, 10)


def test_a_long_prompt_holds_up_neither_texts_nor_short_prompts(open_slots):
    model = open_slots(slots=3, part=8)
    scheduler = Scheduler(model)
    written = scheduler.submit([5, 6], 60)
    scheduler.turn()
    read, steps = model.read, []
    model.read = lambda row, ids: steps.append((len(ids), len(ids[0]))) or read(row, ids)  # type: ignore[method-assign]
    scheduler.submit([7] * 100, 4)
    scheduler.submit([8] * 6, 60)
    for _ in range(30):
        scheduler.turn()
    # Between two steps no more than a part of prompts is read, and the two prompts take turns.
    between = [list(run) for is_step, run in itertools.groupby(steps, lambda call: call[1] == 1) if not is_step]
    assert max(sum(length for _, length in run) for run in between) == 8
    assert steps[:5] == [(1, 1), (1, 8), (1, 1), (1, 6), (2, 1)]
    assert sum(length for run in between for _, length in run) == 106
    assert sum(call[1] == 1 for call in steps) == 30
    assert not written.finish


def test_so_many_wait_and_no_more(open_slots):
    model = open_slots(slots=1)
    scheduler = Scheduler(model, waiting=2)
    working = scheduler.submit([5], 40)
    scheduler.turn()
    waiting = [scheduler.submit([6], 4), scheduler.submit([7], 4)]
    with pytest.raises(Overloaded, match="2 requests wait already"):
        scheduler.submit([8], 4)
    # Who waits and is not wanted any more makes room without a row.
    waiting[0].cancel()
    scheduler.turn()
    scheduler.submit([8], 4)
    working.cancel()
    scheduler.turn()
    assert waiting[0].finish == working.finish == "cancelled"
    finish(scheduler)
    assert tokens(waiting[1]) == greedy(model, [[7]], 4)[0]


def test_requests_that_come_at_once_are_taken_while_rows_are_free_for_them(open_slots):
    scheduler = Scheduler(open_slots(slots=2), waiting=1)
    answers = [scheduler.submit([5 + number], 4) for number in range(3)]
    with pytest.raises(Overloaded, match="1 requests wait already"):
        scheduler.submit([8], 4)
    finish(scheduler)
    assert all(answer.finish for answer in answers)


def test_a_time_limit_ends_what_works_and_what_waits(open_slots):
    now = [100.0]
    model = open_slots(slots=1)
    scheduler = Scheduler(model, clock=lambda: now[0])
    working, waiting = scheduler.submit([5], 40, seconds=5), scheduler.submit([6], 4, seconds=3)
    unlimited = scheduler.submit([7], 4)
    scheduler.turn()
    now[0] = 103.5
    scheduler.turn()
    with pytest.raises(Late):
        tokens(waiting)
    assert at_work(model) == 1
    now[0] = 105.5
    finish(scheduler)
    with pytest.raises(Late):
        tokens(working)
    assert tokens(unlimited) == greedy(model, [[7]], 4)[0]
    with pytest.raises(ModelError, match="above 0"):
        scheduler.submit([5], seconds=0)


def test_what_is_abandoned_frees_its_row_at_the_next_turn(open_slots):
    model, gone = open_slots(slots=1), threading.Event()
    scheduler = Scheduler(model)
    answer = scheduler.submit([5], 100, abandoned=gone.is_set)
    for _ in range(5):
        scheduler.turn()
    assert at_work(model) == 1
    gone.set()
    scheduler.turn()
    assert (at_work(model), answer.finish) == (0, "cancelled")
    broken = scheduler.submit([5], 4, abandoned=lambda: 1 // 0 > 0)
    finish(scheduler)
    with pytest.raises(Failed, match="by zero"):
        tokens(broken)


def test_an_exception_in_a_shared_step_fails_the_one_it_comes_from(open_slots):
    model = open_slots(slots=4)
    prompts = [[9, 10], [11, 12, 13], [14], [15, 16]]
    expected = greedy(model, prompts, 12)
    scheduler = Scheduler(model)
    read, fails = model.read, []

    def guarded(row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        if any(guilty in ids for guilty in fails):
            # As a kernel that fails half way leaves it.
            for buffer in model._buffers.values():
                for other in range(row, row + len(ids)):
                    buffer[other, :, model.lengths[other]] = np.nan
                    model._written[other] = model.lengths[other] + 1
            raise RuntimeError("a kernel failed")
        return read(row, ids)

    model.read = guarded  # type: ignore[method-assign]
    answers = [scheduler.submit(prompt, 12) for prompt in prompts]
    for _ in range(4):
        scheduler.turn()
    fails.append(scheduler._writing[0].unread)
    guilty = scheduler._writing[0].answer
    scheduler.turn()
    fails.clear()
    again = [scheduler.submit(prompt, 12) for prompt in prompts]
    finish(scheduler)
    for answer, right in zip([*answers, *again], expected * 2, strict=True):
        if answer is guilty:
            with pytest.raises(Failed, match="a kernel failed"):
                tokens(answer)
        else:
            assert tokens(answer) == right


def test_a_text_for_which_there_is_no_memory_fails_alone(open_slots, monkeypatch):
    model = open_slots(slots=2)
    expected = greedy(model, [[5, 6]], 10)[0]
    resize = model._resize

    def limited(capacity: int) -> None:
        if capacity > 64:
            raise MemoryError
        resize(capacity)

    monkeypatch.setattr(model, "_resize", limited)
    scheduler = Scheduler(model)
    short, long = scheduler.submit([5, 6], 10), scheduler.submit([7] * 50, 70)
    finish(scheduler)
    assert tokens(short) == expected
    with pytest.raises(Failed, match="MemoryError"):
        tokens(long)
    assert tokens_after(scheduler, [5, 6], 10) == expected


def tokens_after(scheduler: Scheduler, prompt: list[int], count: int) -> list[int]:
    answer = scheduler.submit(prompt, count)
    finish(scheduler)
    return tokens(answer)


def test_nothing_stops_the_loop(open_slots, monkeypatch):
    model = open_slots(slots=2)
    (expected,) = greedy(model, [[5, 6]], 6)
    with Scheduler(model) as scheduler:
        admit = scheduler._admit
        monkeypatch.setattr(scheduler, "_admit", lambda: 1 // 0)
        with pytest.raises(Failed, match="by zero"):
            tokens(scheduler.submit([5, 6], 6))
        monkeypatch.setattr(scheduler, "_admit", admit)
        assert tokens(scheduler.submit([5, 6], 6)) == expected


def test_closing_ends_what_is_not_done_and_takes_no_more(open_slots):
    model, steps = open_slots(slots=1), []
    scheduler, read = Scheduler(model), model.read

    def held(row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The second call is not over before it is closing."""
        wait_until(lambda: not steps or scheduler._closing)
        steps.append(ids)
        return read(row, ids)

    model.read = held  # type: ignore[method-assign]
    with scheduler:
        answers = [scheduler.submit([5], 120), scheduler.submit([6], 120)]
        next(iter(answers[0]))
    with pytest.raises(Failed, match="closing"):
        tokens(answers[1])
    with pytest.raises(Overloaded, match="closing"):
        scheduler.submit([5])


def test_the_same_seed_draws_the_same_text_in_any_company(open_slots):
    model = open_slots(slots=4)
    drawn = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=11)

    def text(company: int) -> list[int]:
        scheduler = Scheduler(model)
        others = [scheduler.submit([20 + n] * (3 + n), 30, Sampling(1.0, seed=n)) for n in range(company)]
        answer = scheduler.submit([5, 6, 7], 20, drawn)
        finish(scheduler)
        assert all(others)
        return tokens(answer)

    alone = text(0)
    assert text(3) == text(1) == alone != greedy(model, [[5, 6, 7]], 20)[0]


def test_log_probabilities_are_the_models_own(open_slots):
    model = open_slots(slots=1)
    scheduler = Scheduler(model)
    answer = scheduler.submit([5, 6, 7], 3, Sampling(temperature=2.0, top_k=3, seed=1), log_probabilities=True)
    finish(scheduler)
    found, ids = list(answer), [5, 6, 7]
    assert len(found) == 3
    for token in found:
        model.clear(0)
        logits = model.read(0, [ids])[0].astype(np.float64)
        expected = logits[token.id] - np.log(np.exp(logits).sum())
        assert token.log_probability == pytest.approx(expected, abs=1e-4)
        ids.append(token.id)


def test_buffers_are_no_longer_than_the_longest_text_needs(open_slots):
    model = open_slots(slots=3)
    scheduler = Scheduler(model)
    long, short = scheduler.submit([7] * 100, 3), scheduler.submit([5, 6], 30)
    finish(scheduler)
    assert model.capacity < 128
    assert tokens(short) == greedy(model, [[5, 6]], 30)[0]
    assert tokens(long) == greedy(model, [[7] * 100], 3)[0]


def test_requests_and_models_that_cannot_be_are_refused(open_slots, make_bundle):
    scheduler = Scheduler(open_slots(most=40))
    for prompt, count, message in (
        ([], 4, "empty prompt"),
        ([384], 4, "not in the model's vocabulary of 384"),
        ([5] * 40, 4, "40 tokens; the model takes 40, its answer included"),
        ([5], 0, "give at least 1"),
    ):
        with pytest.raises(ModelError, match=message):
            scheduler.submit(prompt, count)
    assert not scheduler.busy
    with pytest.raises(ModelError, match="does not generate text"):
        slots.open_slots(Session(make_bundle("bert").folder))
    with pytest.raises(ModelError, match="0 slots"):
        open_slots(slots=0)
    with pytest.raises(ModelError, match="0 waiting"):
        Scheduler(scheduler._model, waiting=0)


def test_deployed_with_the_runner_it_works_as_its_readme_says(make_bundle, tmp_path):
    folder = deploy_python(make_bundle("llama", cache="in-place"), tmp_path / "out")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # It is imported from where it lies, and nothing else of ours is.
    program = f"{readme_block(folder, 'python', 2)}\nimport sys\nassert 'teamlora_export' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
