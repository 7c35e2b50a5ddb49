"""Requests of a bundle with a shelf: each is answered by its own adapter, as PyTorch answers with that one alone,
whoever shares its steps; and what happens to the shelf meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from conftest import until_stop
from shelves import COUNT, NAMES, PROMPTS, SHELF, Answers, expected, write_family
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent))
from shelf_requests import ask_all, assert_refuses_an_unknown_one
from shelf_rows import WHERE, on_host, open_rows
from triton_front import serve
from triton_server import Server

from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.bundle import read_bundle
from teamlora_export.cli import app
from teamlora_export.deploy.adapter_slots import ADAPTER, Adapters, rows_adapter
from teamlora_export.deploy.answers import Failed
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.genai import deploy_genai
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.session import Session
from teamlora_export.deploy.slots import Slots, open_slots
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.model.inject import inject
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter
from teamlora_export.staging import entries


@pytest.fixture(scope="module")
def answers(shelf_answers) -> Answers:
    return shelf_answers


def own_copy(bundle, folder: Path) -> Path:  # type: ignore[no-untyped-def]
    shutil.copytree(bundle.folder, folder)
    return folder


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_each_prompt_of_a_batch_is_answered_by_its_own_adapter(cache, make_shelf, answers):
    model = Model(make_shelf(cache=cache).folder)
    assert model.adapters == ["hydra", "lora", "moe", "small", "team"]
    assert model.generate(PROMPTS, COUNT, adapters=NAMES) == expected(answers)
    assert len({tuple(tokens) for tokens in expected(answers)}) == len(answers), "the adapters answer alike"
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        assert list(model.stream(prompt, COUNT, adapter=name)) == answers[name, tuple(prompt)]


def test_eight_threads_of_one_model_keep_their_adapters(make_shelf, answers):
    """Three slots, five adapters: they make room for one another all the time."""
    model = Model(make_shelf().folder)
    wrong: list[object] = []

    def ask(first: int) -> None:
        order = [(first + i) % len(PROMPTS) for i in range(6)]
        found = [model.generate([PROMPTS[i]], COUNT, adapters=[NAMES[i]])[0] for i in order]
        wrong.extend(
            i for i, tokens in zip(order, found, strict=True) if tokens != answers[NAMES[i], tuple(PROMPTS[i])]
        )

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_name_that_is_not_on_the_shelf_is_an_error_and_never_the_base(make_shelf, make_bundle):
    model = Model(make_shelf().folder)
    with pytest.raises(ModelError, match="There is no adapter 'nobody'; there are hydra, lora, moe, small, team"):
        model.generate([[5]], 2, adapters=["nobody"])
    with pytest.raises(ModelError, match="2 adapters for 1 prompts"):
        model.generate([[5]], 2, adapters=["team", "lora"])
    with pytest.raises(ModelError, match="has one adapter of its own, and no other"):
        Model(make_bundle("llama").folder).generate([[5]], 2, adapters=["team"])


@pytest.mark.parametrize("where", WHERE)
def test_what_is_replaced_while_it_serves_is_new_for_those_that_come(
    where, make_shelf, shelf_adapters, answers, tmp_path
):
    folder = own_copy(make_shelf(cache="in-place"), tmp_path / "bundle")
    scheduler = Scheduler(open_rows(folder, 4, where))
    first = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    for _ in range(4):
        scheduler.turn()
    replace_adapter(folder, "team", shelf_adapters["small"])
    add_adapter(folder, "new", shelf_adapters["lora"])
    remove_adapter(folder, "lora")
    second = scheduler.submit(PROMPTS[1], COUNT, stops=(), adapter="team")
    third = scheduler.submit(PROMPTS[3], COUNT, stops=(), adapter="new")
    with pytest.raises(ModelError, match="no adapter 'lora'"):
        scheduler.submit(PROMPTS[3], COUNT, adapter="lora")
    while scheduler.busy:
        scheduler.turn()
    found = [[token.id for token in answer] for answer in (first, second, third)]
    assert found == [answers[name, tuple(PROMPTS[i])] for i, name in ((0, "team"), (1, "small"), (3, "lora"))]


@pytest.mark.parametrize("where", WHERE)
def test_a_request_that_waits_gets_what_the_name_stood_for_though_its_file_is_gone(
    where, make_shelf, shelf_adapters, answers, tmp_path
):
    """No request fails for a swap."""
    folder = own_copy(make_shelf(cache="in-place"), tmp_path / "bundle")
    scheduler = Scheduler(open_rows(folder, 1, where))
    asked = [scheduler.submit(PROMPTS[i], COUNT, stops=(), adapter=NAMES[i]) for i in (0, 1, 3)]
    scheduler.turn()
    for name in ("small", "lora"):
        replace_adapter(folder, name, shelf_adapters["moe"])
    remove_adapter(folder, "team")
    while scheduler.busy:
        scheduler.turn()
    for i, answer in zip((0, 1, 3), asked, strict=True):
        assert [token.id for token in answer] == answers[NAMES[i], tuple(PROMPTS[i])]


def off_by_one(self, rows):  # type: ignore[no-untyped-def]
    return {ADAPTER: (_ADAPTERS_OF(self, rows)[ADAPTER] + 1) % self._session.adapters.slots}


def first_rows(self, rows):  # type: ignore[no-untyped-def]
    """Of the first rows, whichever are asked for."""
    return _ADAPTERS_OF(self, range(len(rows)))


def swap_texts_alone(self, one, other):  # type: ignore[no-untyped-def]
    _SWAP(self, one, other)
    self._adapters[one], self._adapters[other] = self._adapters[other], self._adapters[one]


def copy_nothing(self, slot, load):  # type: ignore[no-untyped-def]
    """Into a slot that has had another."""
    held, before = {name: on_host(memory)[slot] for name, memory in self.memory.items()}, load.before
    failure = _FILL(self, slot, load)
    if before is not None:
        for name, array in held.items():
            self.memory[name][slot] = array
    return failure


_ADAPTERS_OF, _SWAP, _FILL = Slots._adapters_of, Slots.swap, Adapters._fill
# What goes wrong -> a place of the programs, and what it does in place of what it should.
FAULTS = {
    "index off by one": (Slots, "_adapters_of", off_by_one),
    "another row's adapter": (Slots, "_adapters_of", first_rows),
    "a text that moves without its adapter": (Slots, "swap", swap_texts_alone),
    "a stale slot": (Adapters, "_fill", copy_nothing),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_of_the_programs_show_in_what_they_answer(fault, where, make_shelf, answers, monkeypatch):
    """Texts of unlike lengths in three rows, which change their places; five adapters in three slots."""
    slots = open_rows(make_shelf(cache="in-place").folder, 3, where)
    if fault is not None:
        monkeypatch.setattr(*FAULTS[fault])
    scheduler = Scheduler(slots, waiting=8)
    counts = [COUNT, 3, 7, COUNT, 2, 9, 5]
    asked = [
        scheduler.submit(prompt, count, stops=(), adapter=name)
        for prompt, count, name in zip(PROMPTS, counts, NAMES, strict=True)
    ]
    while scheduler.busy:
        scheduler.turn()
    found = [[token.id for token in answer] for answer in asked]
    right = [tokens[:count] for tokens, count in zip(expected(answers), counts, strict=True)]
    assert (found == right) == (fault is None), found


@pytest.mark.parametrize("where", WHERE)
def test_a_request_whose_adapter_cannot_be_read_fails_alone(where, make_shelf, answers, tmp_path):
    folder = own_copy(make_shelf(cache="in-place"), tmp_path / "bundle")
    damaged = folder / read_bundle(folder).manifest.shelf["adapters"]["lora"]["file"]
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    scheduler = Scheduler(open_rows(folder, 4, where))
    good, bad = (scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter=name) for name in ("team", "lora"))
    while scheduler.busy:
        scheduler.turn()
    assert [token.id for token in good] == answers["team", tuple(PROMPTS[0])]
    with pytest.raises(Failed, match="SHA-256 differs"):
        list(bad)


def test_a_request_waits_for_a_slot_while_others_are_at_work_in_all_of_them(make_shelf, answers):
    """And one that stops in the middle gives its slot back."""
    session = Session(make_shelf().folder)
    scheduler = Scheduler(open_slots(session, 6))
    order = [0, 1, 3, 4, 5]
    asked = [scheduler.submit(PROMPTS[i], COUNT, stops=(), adapter=NAMES[i]) for i in order]
    scheduler.turn()
    asked[0].cancel()
    while scheduler.busy:
        scheduler.turn()
    for i, answer in list(zip(order, asked, strict=True))[1:]:
        assert [token.id for token in answer] == answers[NAMES[i], tuple(PROMPTS[i])]
    adapters = session.adapters
    assert adapters._users == [0, 0, 0]
    model = Model(make_shelf().folder)
    stream = model.stream([5, 6, 7], COUNT, adapter="team")
    next(stream)
    assert sum(model._session.adapters._users) == 1
    del stream
    assert sum(model._session.adapters._users) == 0


@pytest.mark.parametrize("where", WHERE)
def test_the_slots_memory_is_what_the_adapters_are(where, make_shelf):
    adapters = open_rows(make_shelf(cache="in-place").folder, 1, where)._session.adapters
    taken = [adapters.take(adapters.find(name)) for name in ("team", "lora", "moe")]
    assert sorted(taken) == [0, 1, 2]
    assert adapters.take(adapters.find("small")) is None
    assert adapters.take(adapters.find("lora")) == taken[1]
    adapters.give(taken[1])
    assert adapters.take(adapters.find("small")) is None, "one of two has it still"
    before, places = numbers(adapters), addresses(adapters)
    adapters.give(taken[1])
    assert adapters.take(adapters.find("small")) == taken[1]
    assert addresses(adapters) == places
    now = numbers(adapters)
    for name, memory in now.items():
        others = [taken[0], taken[2]]
        assert (memory[others] == before[name][others]).all()
    assert any((memory[taken[1]] != before[name][taken[1]]).any() for name, memory in now.items())


def numbers(adapters: Adapters) -> dict[str, np.ndarray]:
    return {name: on_host(memory) for name, memory in adapters.memory.items()}


def addresses(adapters: Adapters) -> list[int]:
    return [m.ctypes.data if isinstance(m, np.ndarray) else m.address for m in adapters.memory.values()]


def test_rows_of_one_adapter_are_one_number():
    assert rows_adapter([2, 2, 2]).tolist() == [2]
    assert rows_adapter([2, -1]).tolist() == [2, -1]
    assert rows_adapter([2, -1]).dtype == np.int32


def test_a_deployment_in_python_answers_by_name_and_takes_over_what_the_bundle_has_later(
    make_shelf, shelf_adapters, answers, tmp_path
):
    """Without this package; while it serves."""
    folder = own_copy(make_shelf(), tmp_path / "bundle")
    out = deploy_python(read_bundle(folder), tmp_path / "out")
    assert not [name for name in entries(out) if bytes(tmp_path) in (out / name).read_bytes()], "a path from here"
    program = """
import sys
from runner import Model
model = Model(".", threads=1)
print(model.adapters)
print(model.generate([[5, 6, 7], [9, 3]], 12, adapters=["team", "small"]))
sys.stdout.flush()
sys.stdin.readline()
print(model.adapters)
print(model.generate([[9, 3], [9, 3]], 12, adapters=["team", "late"]))
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=out, env=environment, text=True, **pipes)
    assert json.loads(process.stdout.readline().replace("'", '"')) == sorted(SHELF)
    first = json.loads(process.stdout.readline())
    replace_adapter(folder, "team", shelf_adapters["small"])
    add_adapter(folder, "late", shelf_adapters["small"])
    remove_adapter(folder, "moe")
    done = CliRunner().invoke(app, ["adapters", "publish", str(folder), str(out)])
    assert done.output == f"{out}: hydra, late, lora, small, team\n"
    process.stdin.write("\n")
    names, second = process.communicate()[0].splitlines()
    assert names == "['hydra', 'late', 'lora', 'small', 'team']"
    small = until_stop(answers["small", (9, 3)])
    assert first == [until_stop(answers["team", (5, 6, 7)]), small]
    assert json.loads(second) == [small, small]
    files = {name for name in entries(out) if name.startswith("adapters/")}
    assert files == {a["file"] for a in read_bundle(folder).manifest.shelf["adapters"].values()}
    with pytest.raises(ExportError, match="was not made of"):
        publish_shelf(make_shelf(dtype="fp16"), out)
    with pytest.raises(ExportError, match="is not a deployment"):
        publish_shelf(make_shelf(), tmp_path)


def test_triton_answers_each_request_by_its_adapter(make_shelf, answers, tmp_path):
    """In the tests' stand-in for the server."""
    bundle = read_bundle(shutil.copytree(make_shelf(cache="in-place").folder, tmp_path / "bundle"))
    out = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", batch=4))
    assert "the name of the adapter that answers (hydra, lora, moe, small, team)" in (out / "README.md").read_text()
    server = Server(out / "models")
    assert ask_all(server) == [until_stop(tokens) for tokens in expected(answers)]
    assert_refuses_an_unknown_one(server)

    def listed() -> list[bytes]:
        (answer,) = server.stream("m_text", {"list_adapters": np.array([[True]])})
        assert list(answer) == ["adapters"]
        return answer["adapters"][0].tolist()

    assert listed() == [b"hydra", b"lora", b"moe", b"small", b"team"]
    for name in ("hydra", "moe", "team"):
        remove_adapter(bundle.folder, name)
    publish_shelf(bundle, out)
    assert listed() == [b"lora", b"small"]
    with serve(server) as (_, grpc):
        told = run(sys.executable, out / "client.py", "--url", grpc, "--adapter", "small", "--ids", *PROMPTS[1])
        assert told.stdout.split()[:COUNT] == [str(token) for token in until_stop(answers["small", tuple(PROMPTS[1])])]
        refused = run(sys.executable, out / "client.py", "--url", grpc, "--adapter", "nobody", "--ids", 5)
        assert refused.returncode == 2 and "There is no adapter 'nobody'" in refused.stderr
        told = run(sys.executable, out / "client.py", "--url", grpc, "--list-adapters")
        assert told.stdout.split() == ["lora", "small"], told.stderr
    # As its other fields, which the stand-in takes of other models alone.
    assert '"max_tokens": 16, "adapter": "hydra"}' in (out / "client.sh").read_text()
    assert run("sh", "-n", out / "client.sh").returncode == 0
    server.models["m_text"].unload()


@pytest.mark.parametrize("where", WHERE)
def test_each_row_of_an_encoder_has_its_own_adapter(where, encoders):
    bundle, expected = encoders
    model = Model(bundle.folder)
    if where == "device":
        model._session.adapters = model._session._open_adapters(True, on_device=True)
    rows, names = [[5, 6, 7, 8], [9, 3], [5, 6, 7, 8], [20]], ["one", "two", None, "one"]
    found = model.encode(rows, names)
    for row, name, logits in zip(rows, names, found, strict=True):
        assert np.allclose(logits, expected(row, name), atol=2e-5), name
        assert np.allclose(model.encode([row], [name])[0], expected(row, name), atol=2e-5)
    assert not np.allclose(found[0], found[2], atol=1e-3)
    assert np.allclose(model.encode(rows)[0], expected(rows[0], None), atol=2e-5)
    with pytest.raises(ModelError, match="has 2 slots, and others are at work in them"):
        model.encode(rows[:3], ["one", "two", "three"])
    with pytest.raises(ModelError, match="There is no adapter 'nobody'"):
        model.encode(rows[:1], ["nobody"])
    assert model._session.adapters._users == [0, 0]


def test_triton_serves_no_shelf_but_where_texts_are_batched_continuously_and_says_what_does(
    encoders, make_shelf, tmp_path
):
    for bundle, options, words in (
        (
            encoders[0],
            {},
            r"back ends know none\. Export a bundle with a single --adapter for each, or serve it by `dep",
        ),
        (make_shelf(), {"text": False}, r"the model that batches continuously does\. .* needs the model's tokenizer"),
        # Of engines too, what the shelf needs, not what their cache would without one.
        (encoders[0], {"engine": "fp16"}, r"a single --adapter for each, or serve it by `deploy python`"),
        (
            make_shelf(),
            {"engine": "fp16"},
            r"does\. .* the model with --cache in-place, and build an engine",
        ),
        (make_shelf(cache="in-place"), {"engine": "fp16", "text": False}, r"takes words, so .* no --no-text"),
        (make_shelf(cache="in-place"), {"engine": "fp16", "batching": "sequence"}, r"Leave out --batching sequence:"),
    ):
        with pytest.raises(ExportError, match=words):
            deploy_triton(bundle, tmp_path / "out", TritonOptions(**options))
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def encoders(make_base, tmp_path_factory):
    """A tiny classifier with three adapters for two slots, and what PyTorch computes of a row with one of them."""
    base, folder, targets = make_base("bert"), tmp_path_factory.mktemp("encoders"), ("query", "value")
    named = {
        name: write_family(folder / name, base, family, targets, 4, k, seed)
        for seed, (name, family, k) in enumerate((("one", "teamlora", 2), ("two", "lora", 1), ("three", "moelora", 2)))
    }
    bundle = export_onnx(base.name, named, folder / "bundle", task=base.task, slots=2)

    def expected(row: list[int], name: str | None) -> np.ndarray:
        model = base.load(torch.float32)
        if name is not None:
            inject(model, align_with_base(read_adapter(named[name]), base.signature))
        with torch.no_grad():
            return model(torch.tensor([row])).logits[0].numpy()

    return bundle, expected


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_onnxruntime_genais_own_adapters_are_ours(cache, make_shelf, answers, tmp_path):
    """One for all rows of a generator, by its `Adapters`; any of them beside another generator's."""
    out = deploy_genai(make_shelf(cache=cache), tmp_path / "out")
    assert "(hydra, lora, moe, small, team)" in (out / "README.md").read_text()
    assert not [name for name in entries(out) if name.endswith(".safetensors")]
    model = og.Model(str(out))
    adapters = og.Adapters(model)
    generators = []
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + COUNT, do_sample=False)
        generators.append(og.Generator(model, parameters))
        if name is not None:
            if NAMES.index(name) == len(generators) - 1:
                adapters.load(str(out / "adapters" / f"{name}.onnx_adapter"), name)
            generators[-1].set_active_adapter(adapters, name)
        generators[-1].append_tokens(np.array([prompt], np.int32))
    found: list[list[int]] = [[] for _ in generators]
    for _ in range(COUNT):
        for tokens, generator in zip(found, generators, strict=True):
            if not generator.is_done():
                generator.generate_next_token()
                tokens.append(int(generator.get_next_tokens()[0]))
    assert [until_stop(tokens) for tokens in found] == [until_stop(tokens) for tokens in expected(answers)]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
