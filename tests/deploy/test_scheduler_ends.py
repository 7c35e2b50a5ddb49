"""What ends a scheduler, or an answer before it is whole: whoever asked is told, and nobody waits for ever."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import lose_device
from waiting import wait_until

sys.path.append(str(Path(__file__).parent))
from scheduled_texts import finish, greedy, tokens

from teamlora_export.deploy.answers import Answer, Broken, Failed, Late, Overloaded, Token
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.scheduler import Scheduler

pytest_plugins = ["scheduler_fixtures"]


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
