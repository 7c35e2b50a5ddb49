"""Adapters are read in the background: those at work go on, and what fails or is slow is its own request's alone."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import lose_device
from shelves import COUNT, PROMPTS

sys.path.append(str(Path(__file__).parent))
from scheduled_texts import tokens
from shelf_rows import open_rows
from waiting import SECONDS, wait_until

from teamlora_export.bundle import read_bundle
from teamlora_export.deploy import adapter_slots
from teamlora_export.deploy.adapter_slots import Adapters, Shelved
from teamlora_export.deploy.answers import Failed, Late
from teamlora_export.deploy.device_tensor import DeviceTensor, DeviceTensors
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.session import Session
from teamlora_export.deploy.slots import open_slots
from teamlora_export.shelf import add_adapter, replace_adapter


class SlowFiles:
    """Files that are read when they are let through, in place of a disk that takes its time.

    Attributes:
        begun: the names of adapters whose files somebody began to read, in order.
    """

    def __init__(self, slow: set[str]) -> None:
        self.begun: list[str] = []
        self._slow, self._open = slow, threading.Event()
        self._read = adapter_slots.read_slot

    def read(self, adapter: Shelved, memory: Mapping[str, np.ndarray], check: bool = True) -> dict[str, np.ndarray]:
        self.begun.append(adapter.name)
        if adapter.name in self._slow and not self._open.wait(SECONDS):
            raise ModelError(f"{adapter.name}: was not let through.")
        return self._read(adapter, memory, check)

    def let_through(self) -> None:
        self._open.set()


@pytest.fixture
def slow_files(monkeypatch) -> Callable[..., SlowFiles]:
    def make(*slow: str) -> SlowFiles:
        files = SlowFiles(set(slow))
        monkeypatch.setattr(adapter_slots, "read_slot", files.read)
        return files

    return make


def turns_until(scheduler: Scheduler, condition: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        scheduler.turn()


def finish(scheduler: Scheduler) -> None:
    turns_until(scheduler, lambda: not scheduler.busy)


def state(shelf: Adapters) -> tuple[list[object], list[int], list[int]]:
    return list(shelf._content), list(shelf._users), list(shelf._free)


def settled(shelf: Adapters) -> None:
    """Nothing is being read any more."""
    wait_until(lambda: not shelf._readers)


@pytest.mark.parametrize(("cache", "where"), [("growing", "host"), ("in-place", "host"), ("in-place", "device")])
def test_while_an_adapter_is_read_others_go_on_and_pass_the_request_that_waits_for_it(
    cache, where, make_shelf, shelf_answers, slow_files
):
    """Each turn gives those at work a token, a request that came later is answered, another adapter is read."""
    files = slow_files("lora")
    scheduler = Scheduler(open_rows(make_shelf(cache=cache).folder, 2, where))
    working = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    turns_until(scheduler, lambda: scheduler._writing)
    waiting = scheduler.submit(PROMPTS[3], COUNT, stops=(), adapter="lora")
    others = {
        name: scheduler.submit(PROMPTS[i], COUNT, stops=(), adapter=name) for i, name in ((1, "small"), (2, None))
    }
    for _ in range(4):
        before = scheduler._writing[0].left
        scheduler.turn()
        assert scheduler._writing[0].left == before - 1
    turns_until(scheduler, lambda: working.finish and all(answer.finish for answer in others.values()))
    assert tokens(working) == shelf_answers["team", tuple(PROMPTS[0])]
    assert tokens(others["small"]) == shelf_answers["small", tuple(PROMPTS[1])]
    assert tokens(others[None]) == shelf_answers[None, tuple(PROMPTS[2])]
    assert not list(waiting.arrived()) and not waiting.finish
    files.let_through()
    finish(scheduler)
    assert tokens(waiting) == shelf_answers["lora", tuple(PROMPTS[3])]
    assert sorted(files.begun) == ["lora", "small", "team"]


def test_a_replaced_adapter_is_read_beside_the_one_it_replaces(make_shelf, shelf_adapters, shelf_answers, tmp_path):
    """The request at work keeps the old one, in its slot, to its end; the one that came later has the new one."""
    folder = Path(shutil.copytree(make_shelf().folder, tmp_path / "bundle"))
    session = Session(folder)
    scheduler = Scheduler(open_slots(session, 2))
    old = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    turns_until(scheduler, lambda: scheduler._writing)
    replace_adapter(folder, "team", shelf_adapters["small"])
    new = scheduler.submit(PROMPTS[1], COUNT, stops=(), adapter="team")
    scheduler.turn()
    settled(session.adapters)
    scheduler.turn()
    assert [len(scheduler._writing), scheduler._writing[0].answer] == [2, old]
    finish(scheduler)
    assert tokens(old) == shelf_answers["team", tuple(PROMPTS[0])]
    assert tokens(new) == shelf_answers["small", tuple(PROMPTS[1])]


def test_the_adapter_of_the_next_in_line_is_read_before_there_is_a_row_for_it(make_shelf, shelf_answers, slow_files):
    files = slow_files()
    scheduler = Scheduler(open_slots(Session(make_shelf().folder), 1))
    answers = [scheduler.submit(PROMPTS[i], COUNT, stops=(), adapter=name) for i, name in ((0, "team"), (3, "lora"))]
    turns_until(scheduler, lambda: scheduler._writing)
    scheduler.turn()
    wait_until(lambda: "lora" in files.begun)
    assert not answers[0].finish
    finish(scheduler)
    assert tokens(answers[1]) == shelf_answers["lora", tuple(PROMPTS[3])]


def test_who_is_not_wanted_any_more_or_late_while_an_adapter_is_read_leaves_no_slot_taken(make_shelf, slow_files):
    files, now = slow_files("lora", "moe"), [100.0]
    shelf = Session(make_shelf().folder)
    scheduler = Scheduler(open_slots(shelf, 2), clock=lambda: now[0])
    adapters = shelf.adapters
    assert adapters is not None
    cancelled = scheduler.submit(PROMPTS[0], COUNT, adapter="lora")
    late = scheduler.submit(PROMPTS[0], COUNT, adapter="moe", seconds=5)
    # Both readers are busy with the two before it: nobody begins to read this one.
    unread = scheduler.submit(PROMPTS[0], COUNT, adapter="team")
    turns_until(scheduler, lambda: len(files.begun) == 2)
    cancelled.cancel()
    unread.cancel()
    now[0] = 106.0
    scheduler.turn()
    assert (cancelled.finish, unread.finish) == ("cancelled", "cancelled")
    with pytest.raises(Late):
        tokens(late)
    assert adapters._users == [1, 1, 1], "of those who read"
    files.let_through()
    settled(adapters)
    content, users, free = state(adapters)
    assert (users, sorted(free), content.count(None)) == ([0, 0, 0], [0, 1, 2], 1)
    assert sorted(files.begun) == ["lora", "moe"]


def test_a_scheduler_that_is_closed_or_dropped_leaves_no_slot_taken(make_shelf, slow_files):
    files, session = slow_files("lora"), Session(make_shelf().folder)
    adapters = session.adapters
    with Scheduler(open_slots(session, 2)) as scheduler:
        closed = scheduler.submit(PROMPTS[0], COUNT, adapter="lora")
        wait_until(lambda: files.begun)
    with pytest.raises(Failed, match="closing"):
        tokens(closed)
    dropped = Scheduler(open_slots(session, 2))
    dropped.submit(PROMPTS[0], COUNT, adapter="lora")
    dropped.turn()
    assert sum(adapters._users) == 2
    del dropped
    files.let_through()
    settled(adapters)
    assert adapters._users == [0, 0, 0]
    assert files.begun == ["lora"], "it was read once for both"


def test_an_adapter_that_cannot_be_read_is_its_requests_sentence_and_what_was_in_the_slot_is_kept(
    make_shelf, shelf_answers, slow_files, tmp_path, monkeypatch
):
    folder = Path(shutil.copytree(make_shelf().folder, tmp_path / "bundle"))
    damaged = folder / read_bundle(folder).manifest.shelf["adapters"]["moe"]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    session = Session(folder)
    adapters = session.adapters
    for name in ("team", "lora", "small"):
        adapters.give(adapters.take(adapters.find(name)))
    settled(adapters)
    before, files, slots = state(adapters), slow_files("moe"), open_slots(session, 3)
    # A file tells nothing of the model, which is not tried out.
    monkeypatch.setattr(slots, "try_out", lambda row: 1 // 0)
    scheduler = Scheduler(slots)
    bad = [scheduler.submit(PROMPTS[5], COUNT, adapter="moe") for _ in range(2)]
    good = scheduler.submit(PROMPTS[3], COUNT, stops=(), adapter="lora")
    turns_until(scheduler, lambda: good.finish)
    files.let_through()
    finish(scheduler)
    for answer in bad:
        with pytest.raises(Failed, match="SHA-256 differs"):
            tokens(answer)
    assert tokens(good) == shelf_answers["lora", tuple(PROMPTS[3])]
    settled(adapters)
    content, users, free = state(adapters)
    assert (content, users) == (before[0], [0, 0, 0])
    # The one that was to make room is still the first to do so; that which had a text since is the last.
    assert free == [0, 2, 1]
    assert set(files.begun) == {"moe"}


def test_a_damaged_copy_of_an_adapter_fails_no_request_of_the_whole_one(
    make_shelf, shelf_adapters, slow_files, tmp_path
):
    folder = Path(shutil.copytree(make_shelf().folder, tmp_path / "bundle"))
    add_adapter(folder, "twin", shelf_adapters["lora"])
    shelf = read_bundle(folder).manifest.shelf["adapters"]
    assert shelf["twin"]["sha256"] == shelf["lora"]["sha256"]
    (folder / shelf["twin"]["file"]).write_bytes(b"")
    files, adapters = slow_files("twin", "lora"), Session(folder).adapters
    held = [adapters.reserve(adapters.find(name)) for name in ("twin", "lora")]
    files.let_through()
    with pytest.raises(ModelError, match="SHA-256 differs"):
        adapters.wait(held[0])
    adapters.wait(held[1])
    with pytest.raises(ModelError, match="SHA-256 differs"):
        adapters.take(adapters.find("twin"))


def test_a_file_that_is_far_too_large_is_not_read_and_fails_its_request_alone(make_shelf, shelf_answers, tmp_path):
    folder = Path(shutil.copytree(make_shelf().folder, tmp_path / "bundle"))
    os.truncate(folder / read_bundle(folder).manifest.shelf["adapters"]["moe"]["file"], 1 << 40)
    scheduler = Scheduler(open_slots(Session(folder), 3))
    good, bad = (scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter=name) for name in ("team", "moe"))
    finish(scheduler)
    with pytest.raises(Failed, match=r"is no file of an adapter \(1,099,511,627,776 bytes for a slot of"):
        tokens(bad)
    assert tokens(good) == shelf_answers["team", tuple(PROMPTS[0])]


@pytest.mark.parametrize("rows", [1, 3])
def test_whatever_goes_wrong_where_a_request_is_taken_in_fails_it_alone(rows, make_shelf, shelf_answers, monkeypatch):
    """Also while there is no other row."""
    slots = open_slots(Session(make_shelf().folder), rows)
    reserve = slots.reserve

    def fail_for_one(adapter: Shelved | None) -> bool:
        if adapter is not None and adapter.name == "moe":
            raise MemoryError("no more")
        return reserve(adapter)

    tried, try_out = [], slots.try_out
    monkeypatch.setattr(slots, "reserve", fail_for_one)
    monkeypatch.setattr(slots, "try_out", lambda row: tried.append(row) or try_out(row))
    scheduler = Scheduler(slots)
    good = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    while not slots.lengths[0]:
        scheduler.turn()
    bad = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="moe")
    finish(scheduler)
    with pytest.raises(Failed, match="no more"):
        tokens(bad)
    # Others' adapters are theirs while a row is tried out, and nobody's later.
    assert tokens(good) == shelf_answers["team", tuple(PROMPTS[0])]
    assert (len(tried), set(slots._session.adapters._users)) == (int(rows > 1), {0})


def test_requests_of_one_adapter_share_its_open_file(make_shelf):
    def opened(path: Path) -> int:
        links = (entry.resolve() for entry in Path("/proc/self/fd").iterdir())
        return sum(link == path for link in links)

    adapters = Session(make_shelf().folder).adapters
    held = [adapters.find("team") for _ in range(50)]
    path = held[0].path.resolve()
    assert opened(path) == 1
    adapters.give(adapters.take(held[3]))
    settled(adapters)
    held.clear()
    assert opened(path) == 0


def test_streams_that_are_left_in_the_middle_do_not_hold_up_others_for_ever(make_shelf, monkeypatch):
    model = Model(make_shelf().folder)
    streams = [model.stream([5, 6, 7], COUNT, adapter=name) for name in ("team", "small", "lora")]
    assert all(next(stream) >= 0 for stream in streams)
    monkeypatch.setattr("teamlora_export.deploy.scheduler._PATIENCE", 0.2)
    with pytest.raises(ModelError, match="Others' adapters are in all slots, and none of their texts goes on"):
        model.generate([[5, 6]], 2, adapters=["moe"])
    assert len(model.generate([[5, 6]], 2, adapters=["team"])[0]) == 2, "what is in a slot is shared"
    streams.pop()
    assert len(model.generate([[5, 6]], 2, adapters=["moe"])[0]) == 2


def test_a_program_at_work_takes_no_adapter_of_another_model(make_shelf, shelf_answers, tmp_path):
    """What was deployed into its folder meanwhile."""
    out = deploy_python(make_shelf(), tmp_path / "out")
    model = Model(out)
    scheduler = Scheduler(model.slots(2))
    first = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    deploy_python(make_shelf(cache="in-place"), out)
    with pytest.raises(ModelError, match="holds another model by now, and adapters of that"):
        scheduler.submit(PROMPTS[1], COUNT, stops=(), adapter="small")
    finish(scheduler)
    assert tokens(first) == shelf_answers["team", tuple(PROMPTS[0])]


def test_no_thread_for_reading_is_a_sentence(make_shelf, monkeypatch):
    adapters = Session(make_shelf().folder).adapters

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ModelError, match=r"cannot be read \(can't start new thread\)"):
            adapters.take(adapters.find("lora"))
    assert state(adapters) == ([None] * 3, [0] * 3, [0, 1, 2])
    assert adapters.take(adapters.find("lora")) == 0


def test_the_one_that_was_given_back_first_makes_room(make_shelf):
    adapters = Session(make_shelf().folder).adapters
    slots = {name: adapters.take(adapters.find(name)) for name in ("team", "lora", "moe")}
    for name in ("lora", "team", "moe"):
        adapters.give(slots[name])
    adapters.give(adapters.take(adapters.find("lora")))
    assert adapters.take(adapters.find("small")) == slots["team"]
    assert adapters.take(adapters.find("hydra")) == slots["moe"]
    assert adapters.take(adapters.find("lora")) == slots["lora"]
    settled(adapters)


def test_a_device_whose_memory_cannot_be_written_fails_the_request_and_forgets_what_the_slot_had(
    make_shelf, shelf_answers, monkeypatch
):
    """Half of it may be another's by then."""
    slots = open_rows(make_shelf(cache="in-place").folder, 2, "device")
    adapters, write, written = slots._session.adapters, DeviceTensor.__setitem__, []
    for name in ("team", "lora", "small"):
        adapters.give(adapters.take(adapters.find(name)))
    settled(adapters)

    def fail(self: DeviceTensor, slot: int, numbers: np.ndarray) -> None:
        written.append(slot)
        if len(written) == 5:
            raise RuntimeError("CUDA error 700")
        write(self, slot, numbers)

    scheduler = Scheduler(slots)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceTensor, "__setitem__", fail)
        bad = scheduler.submit(PROMPTS[5], COUNT, adapter="moe")
        finish(scheduler)
    with pytest.raises(Failed, match="CUDA error 700"):
        tokens(bad)
    settled(adapters)
    assert (set(written), adapters._content[0], adapters._free) == ({0}, None, [0, 1, 2])
    again = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    finish(scheduler)
    assert tokens(again) == shelf_answers["team", tuple(PROMPTS[0])]


def test_a_device_that_fails_as_it_is_given_an_adapter_ends_every_request(make_shelf, monkeypatch):
    scheduler = Scheduler(open_rows(make_shelf(cache="in-place").folder, 2, "device"))
    lose_device(monkeypatch)
    answer = scheduler.submit(PROMPTS[0], COUNT, adapter="team")
    finish(scheduler)
    with pytest.raises(Failed, match=r"The model cannot be run any more .*CUDA error 700"):
        tokens(answer)
    assert scheduler.broken


def test_a_part_of_a_devices_tensor_is_written_and_no_other():
    make = DeviceTensors(("cpu", 0), ["CPUExecutionProvider"])
    for kind in (np.float32, np.float16, np.uint16):
        tensor = make((3, 2, 100), kind)
        numbers = np.arange(200, dtype=kind).reshape(2, 100)
        # As they are in a file's bytes.
        tensor[1] = np.frombuffer(numbers.tobytes(), kind).reshape(2, 100)
        assert (tensor.numpy()[1] == numbers).all()
        assert not tensor.numpy()[[0, 2]].any()
        for place, wrong in ((3, numbers), (-1, numbers), (1, numbers[:1]), (1, numbers.astype(np.float64))):
            with pytest.raises(ValueError, match="is no entry"):
                tensor[place] = wrong


def test_a_device_without_so_much_memory_for_adapters_is_a_sentence(make_shelf, monkeypatch):
    session = Session(make_shelf().folder)
    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", lambda *_: 1 // 0)
    with pytest.raises(ModelError, match=r"MiB of cpu memory for 3 adapters \(.*by zero.*\)\. Export it with fewer"):
        session._open_adapters(True, on_device=True)
