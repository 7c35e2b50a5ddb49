"""Whose turn it is: requests share calls, hold up no others, and wait so many and so long."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from scheduled_texts import at_work, finish, greedy, tokens

from teamlora_export.deploy import scheduler
from teamlora_export.deploy.answers import Failed, Late, Overloaded
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.scheduler import Scheduler

pytest_plugins = ["scheduler_fixtures"]


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
