"""What fails in a shared batch fails alone, and the scheduler goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import poison_token

sys.path.append(str(Path(__file__).parent))
from scheduled_texts import finish, greedy, tokens, tokens_after

from teamlora_export.deploy.answers import Failed
from teamlora_export.deploy.device_tensor import DeviceTensor
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler

pytest_plugins = ["scheduler_fixtures"]


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
