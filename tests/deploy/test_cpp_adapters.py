"""`deploy cpp` of a bundle with a shelf: each row is answered by its own adapter, as Python's runner answers it alone,
whatever happens to the shelf meanwhile; on ONNX Runtime, and on the emulated TensorRT of `cpp/`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from cpp_programs import as_engine, launches, run
from shelves import write_family
from typer.testing import CliRunner
from waiting import wait_until

from teamlora_export.bundle import read_bundle
from teamlora_export.cli import app
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.export import export_onnx
from teamlora_export.files import sha256_of
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter

PROMPTS = [[5, 6, 7], [9, 3], [200, 100, 50, 25, 12], [5, 6, 7], [7] * 9, [44, 45, 46, 47], [5, 6, 7]]
# More than the three slots that there are.
NAMES = ["team", "small", None, "lora", "hydra", "moe", "team"]
COUNT = 12


def answer(
    program: Path, model: Path, prompts: Sequence[Sequence[int]], names: Sequence[str | None], *options: object
) -> list[list[int]]:
    """Of one batch."""
    lines = "".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts)
    chosen = [word for name in names for word in ("--adapter", name or "-")]
    done = run(program, "--model", model, "--ids", "--tokens", COUNT, *chosen, *options, input=lines)
    assert done.returncode == 0, done.stderr
    return [[int(token) for token in line.split()] for line in done.stdout.splitlines()]


def expected(folder: Path, names: Sequence[str | None] = NAMES) -> list[list[int]]:
    """Of each row alone, in Python."""
    model = Model(folder)
    return [model.generate([prompt], COUNT, adapters=[name])[0] for prompt, name in zip(PROMPTS, names, strict=True)]


@pytest.fixture
def program(cpp_programs) -> Path:
    return cpp_programs / "deployed" / "runner"


@pytest.fixture(scope="module")
def model(make_shelf, tmp_path_factory) -> Path:
    """The folder of the deployed model."""
    return deploy_cpp(make_shelf(), tmp_path_factory.mktemp("shelf") / "out") / "model"


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def engine_of(model: Path, folder: Path, capacity: int | None = 128) -> Path:
    """The deployed model with its graph as an engine."""
    in_place = any("capacity" in port["shape"] for port in json.loads((model / "deploy.json").read_text())["inputs"])
    return as_engine(copied(model, folder), capacity if in_place else None)


def change(model: Path, **fields: object) -> None:
    described = json.loads((model / "deploy.json").read_text())
    (model / "deploy.json").write_text(json.dumps({**described, **fields}))


@pytest.mark.parametrize(
    "options",
    [{}, {"cache": "in-place"}, {"dtype": "fp16", "cache": "in-place"}, {"adapter_dtype": "bf16"}],
    ids=str,
)
def test_each_row_is_answered_by_its_own_adapter(options, make_shelf, cpp_programs, program, tmp_path):
    """Five adapters and the base in one call, three slots; prompts of unlike lengths."""
    bundle = make_shelf(**options)
    model = deploy_cpp(bundle, tmp_path / "out") / "model"
    rows = expected(bundle.folder)
    assert answer(program, model, PROMPTS, NAMES) == rows
    assert len({tuple(row) for row in rows}) == len(rows) - 1, "the adapters answer alike"
    few = [0, 1, 2, 6]
    assert answer(program, model, [PROMPTS[i] for i in few], [NAMES[i] for i in few]) == [rows[i] for i in few]
    assert answer(program, model, PROMPTS, ["lora"]) == expected(bundle.folder, ["lora"] * len(PROMPTS))
    assert answer(program, model, PROMPTS, []) == expected(bundle.folder, [None] * len(PROMPTS))
    if "adapter_dtype" not in options:
        # Which engines are not built of.
        engine, emulated = engine_of(model, tmp_path / "engine"), cpp_programs / "emulated_runner"
        assert answer(emulated, engine, PROMPTS, NAMES) == rows
        assert answer(emulated, engine, PROMPTS, []) == expected(bundle.folder, [None] * len(PROMPTS))


@pytest.mark.parametrize("adapter_dtype", [None, "bf16"])
def test_each_input_of_an_encoder_is_read_by_its_own_adapter(adapter_dtype, cpp_programs, make_base, tmp_path):
    """More adapters than slots: as Python reads each alone."""
    base = make_base("bert")
    adapters = {
        name: write_family(tmp_path / name, base, family, ("query", "value"), 4, k, seed)
        for seed, (name, family, k) in enumerate([("a", "teamlora", 2), ("b", "lora", 1), ("c", "hydralora", 2)])
    }
    bundle = export_onnx(base.name, adapters, tmp_path / "bundle", slots=2, adapter_dtype=adapter_dtype)
    model = deploy_cpp(bundle, tmp_path / "out") / "model"
    inputs, names = [[5, 6, 7], [5, 6, 7], [9], [5, 6, 7], [5, 6, 7]], ["a", None, "b", "c", "b"]
    python = Model(bundle.folder)
    rows = [python.encode([ids], [name])[0] for ids, name in zip(inputs, names, strict=True)]
    together = python.encode([inputs[0], inputs[3], inputs[1]], ["a", "c", None])
    assert np.allclose(together, [rows[0], rows[3], rows[1]], atol=1e-5)
    chosen = [word for name in names for word in ("--adapter", name or "-")]
    lines = "".join(" ".join(map(str, ids)) + "\n" for ids in inputs)
    where = {cpp_programs / "deployed" / "runner": model}
    if adapter_dtype is None:
        where[cpp_programs / "emulated_runner"] = engine_of(model, tmp_path / "engine")
    for program, folder in where.items():
        done = run(program, "--model", folder, "--ids", *chosen, input=lines)
        assert done.returncode == 0, done.stderr
        found = np.array([[float(value) for value in line.split()] for line in done.stdout.splitlines()])
        assert np.allclose(found, np.array(rows), atol=1e-5)
    apart = [np.abs(rows[i] - rows[j]).max() for i, j in ((0, 1), (0, 3), (3, 4), (1, 4))]
    assert min(apart) > 1e-3, "the adapters answer alike"


def test_the_native_op_takes_each_rows_adapter_too(model, program, tmp_path):
    """In a model without the op's definition, so that nothing else can run it."""
    rows = expected(model)
    bare = copied(model, tmp_path / "model")
    graph = onnx.load(bare / "model.onnx", load_external_data=False)
    del graph.functions[:]
    (bare / "model.onnx").write_bytes(graph.SerializeToString())
    assert answer(program, bare, PROMPTS, NAMES, "--no-check", "--library", build_library().path) == rows


def test_what_is_deployed_is_whole_and_the_readme_says_how(make_shelf, tmp_path):
    bundle = make_shelf()
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["deploy", "cpp", str(bundle.folder), "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    described = json.loads((out / "model" / "deploy.json").read_text())
    assert described["format_version"] == 2, "which programs that know no shelf refuse"
    assert sorted(described["shelf"]["adapters"]) == ["hydra", "lora", "moe", "small", "team"]
    for adapter in described["shelf"]["adapters"].values():
        assert described["files"][adapter["file"]] == sha256_of(out / "model" / adapter["file"]) == adapter["sha256"]
    assert "build/runner --adapter NAME" in (out / "README.md").read_text()


def refused(program: Path, model: Path, *options: object, words: str = "5\n") -> str:
    done = run(program, "--model", model, "--ids", *options, input=words)
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    return next(line for line in done.stderr.splitlines() if line.startswith("Error: "))


def test_a_name_that_is_not_on_the_shelf_is_an_error_and_never_the_base(model, program, make_bundle, tmp_path):
    known = "there are hydra, lora, moe, small, team"
    assert f"There is no adapter 'nobody'; {known}." in refused(program, model, "--adapter", "nobody")
    assert f"There is no adapter ''; {known}." in refused(program, model, "--adapter", "")
    two = ("--adapter", "team", "--adapter", "lora")
    assert "2 adapters for 3 prompts: name one for each." in refused(program, model, *two, words="5\n6\n7\n")
    plain = deploy_cpp(make_bundle("llama"), tmp_path / "plain") / "model"
    assert "has one adapter of its own, and no other ('team')" in refused(program, plain, "--adapter", "team")


def test_a_file_that_does_not_belong_is_refused_and_the_others_are_answered(
    model, program, make_shelf, make_bundle, tmp_path
):
    right = answer(program, model, [PROMPTS[0]], ["team"])
    broken = copied(model, tmp_path / "model")
    described = json.loads((broken / "deploy.json").read_text())
    lora, team = (broken / described["shelf"]["adapters"][name]["file"] for name in ("lora", "team"))
    whole = lora.read_bytes()
    content = bytearray(whole)
    content[-3] ^= 1
    lora.write_bytes(content)
    assert "is not the file that belongs here (its SHA-256 differs)" in refused(program, broken, "--adapter", "lora")
    assert answer(program, broken, [PROMPTS[0]], ["team"]) == right

    others = {file: sha256 for file, sha256 in described["files"].items() if broken / file != lora}

    def of(data: bytes) -> str:
        """What is said of a file that is listed with its own hash."""
        sha256 = hashlib.sha256(data).hexdigest()
        file = f"adapters/lora.{sha256[:16]}.safetensors"
        (broken / file).write_bytes(data)
        adapters = {**described["shelf"]["adapters"], "lora": {"file": file, "sha256": sha256}}
        change(broken, files={**others, file: sha256}, shelf={"slots": 3, "adapters": adapters})
        return refused(program, broken, "--adapter", "lora")

    halves = make_shelf(dtype="fp16", cache="in-place")
    other = halves.manifest.shelf["adapters"]["lora"]["file"]
    said = of((halves.folder / other).read_bytes())
    assert re.search(r"has F16 \[[\d,]+\] for \S+, expected F32 \[[\d,]+\]\. Is it of another model\?", said), said
    assert "is no file of an adapter (its header is not in it)" in of(whole[:100])
    assert "is no file of an adapter" in of(b"\xff" * 8 + whole[8:])
    assert "a tensor is not where it should be" in of(whole[:-4])
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def with_header(fields: dict[str, object]) -> bytes:
        text = json.dumps(fields).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    name = next(name for name in header if name != "__metadata__")
    left = {key: value for key, value in header.items() if key != name}
    assert f"has nothing for {name}, expected F32" in of(with_header(left))
    assert "has more than the model takes" in of(with_header({**header, "extra": header[name]}))
    huge = {**header[name], "data_offsets": [0, 2**63]}
    assert "a tensor is not where it should be" in of(with_header({**header, name: huge}))
    assert answer(program, broken, [PROMPTS[0]], ["team"]) == right
    assert "is no file of an adapter (it has" in of(whole + bytes(65 << 20))
    wrong = {**described["shelf"]["adapters"], "lora": described["shelf"]["adapters"]["team"] | {"file": ""}}
    wrong["lora"]["file"] = lora.relative_to(broken).as_posix()
    change(
        broken,
        files={**described["files"], wrong["lora"]["file"]: wrong["lora"]["sha256"]},
        shelf={"slots": 3, "adapters": wrong},
    )
    assert "its adapter lora has more than one hash" in refused(program, broken, "--adapter", "lora", "--no-check")
    change(broken, files=described["files"], shelf=described["shelf"])
    lora.unlink()
    assert "cannot be read (No such file or directory)" in refused(program, broken, "--adapter", "lora")
    for file in ("../secret", team.name, ""):
        shelf = {"slots": 3, "adapters": {"team": {"file": file}}}
        change(broken, files=described["files"] | {"../secret": "0" * 64}, shelf=shelf)
        assert "its adapter team is not as it should be" in refused(program, broken, "--adapter", "team")
    for slots in (0, 4097, "3"):
        change(broken, files=described["files"], shelf={"slots": slots, "adapters": {}})
        assert "not as" in refused(program, broken)
    change(broken, files=described["files"], shelf=None)
    assert "its model and its shelf of adapters do not belong together" in refused(program, broken, "--no-check")


class Tenants:
    """The program `tenants`, at work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, name: str | None, prompt: Sequence[int], command: str = "ask") -> None:
        self.say(f"{command} {name or '-'} {' '.join(map(str, prompt))}")

    def opened(self) -> set[Path]:
        """The files that it has open."""
        return {path.readlink() for path in Path(f"/proc/{self._process.pid}/fd").iterdir()}

    def answers(self, count: int) -> list[list[int]]:
        self.say("go")
        return [[int(token) for token in self.hear().split()] for _ in range(count)]


@contextmanager
def tenants(program: Path, model: Path, *patience: int) -> Iterator[Tenants]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([program, model, str(COUNT), *map(str, patience)], text=True, **pipes) as process:
        try:
            yield Tenants(process)
        finally:
            process.stdin.close()
            assert process.wait(60) == 0


@pytest.mark.parametrize("where", ["tenants", "emulated_tenants"])
def test_requests_that_are_at_work_keep_their_adapter_and_those_that_come_get_the_new_one(
    where, make_shelf, shelf_adapters, cpp_programs, tmp_path
):
    folder = Path(shutil.copytree(make_shelf().folder, tmp_path / "bundle"))
    out = deploy_cpp(read_bundle(folder), tmp_path / "out")
    before = expected(folder)
    if where == "emulated_tenants":
        as_engine(out / "model")
    with tenants(cpp_programs / where, out / "model") as program:
        program.say("names")
        assert program.hear() == "hydra lora moe small team"
        program.ask("team", PROMPTS[0])
        assert program.hear() == "begun"
        program.ask(None, PROMPTS[2])
        assert program.hear() == "begun"
        replace_adapter(folder, "team", shelf_adapters["small"])
        add_adapter(folder, "late", shelf_adapters["lora"])
        remove_adapter(folder, "moe")
        assert publish_shelf(read_bundle(folder), out) == ["hydra", "late", "lora", "small", "team"]
        program.say("names")
        assert program.hear() == "hydra late lora small team"
        program.ask("moe", PROMPTS[5])
        assert program.hear() == "There is no adapter 'moe'; there are hydra, late, lora, small, team."
        # What was small's file is team's too now: one slot for both.
        program.ask("team", PROMPTS[1])
        assert program.hear() == "begun"
        program.ask("late", PROMPTS[3])
        assert program.hear() == "begun"
        program.say("go")
        found = [program.hear() for _ in range(5)]
        assert found.pop(2) == "refused"
        assert [[int(token) for token in line.split()] for line in found] == [before[i] for i in (0, 2, 1, 3)]


def test_a_request_that_waits_for_a_slot_gets_what_its_name_stood_for_though_its_file_is_gone(
    make_shelf, shelf_adapters, cpp_programs, tmp_path
):
    """Three are at work in three slots."""
    folder = Path(shutil.copytree(make_shelf().folder, tmp_path / "bundle"))
    out = deploy_cpp(read_bundle(folder), tmp_path / "out")
    before = expected(folder)
    order = [0, 1, 3, 4]
    with tenants(cpp_programs / "tenants", out / "model") as program:
        for i in order[:3]:
            program.ask(NAMES[i], PROMPTS[i])
            assert program.hear() == "begun"
        hydra = out / "model" / read_bundle(folder).manifest.shelf["adapters"]["hydra"]["file"]
        program.ask(NAMES[4], PROMPTS[4], "queue")
        wait_until(lambda: hydra in program.opened())
        replace_adapter(folder, "hydra", shelf_adapters["moe"])
        publish_shelf(read_bundle(folder), out)
        assert not hydra.exists()
        assert program.answers(4) == [before[i] for i in order]


def test_a_program_at_work_takes_no_adapter_of_another_model(make_shelf, shelf_adapters, cpp_programs, tmp_path):
    """What was deployed into its folder meanwhile."""
    out = deploy_cpp(make_shelf(), tmp_path / "out")
    before = expected(out / "model")
    with tenants(cpp_programs / "tenants", out / "model") as program:
        program.ask("team", PROMPTS[0])
        assert program.hear() == "begun"
        deploy_cpp(make_shelf(cache="in-place"), out)
        program.ask("team", PROMPTS[0])
        assert program.hear().endswith("holds another model by now, and adapters of that. Open it anew.")
        program.say("go")
        assert program.hear() == " ".join(map(str, before[0]))
        assert program.hear() == "refused"


@pytest.mark.parametrize(("where", "rounds"), [("tenants", 40), ("emulated_tenants", 10)])
def test_eight_threads_keep_their_adapters_while_others_come_and_go(
    where, rounds, make_shelf, shelf_adapters, cpp_programs, tmp_path
):
    """Three slots, six adapters."""
    folder = Path(shutil.copytree(make_shelf(cache="in-place").folder, tmp_path / "bundle"))
    out = deploy_cpp(read_bundle(folder), tmp_path / "out")
    if where == "emulated_tenants":
        as_engine(out / "model", 64)
    with tenants(cpp_programs / where, out / "model") as program:
        for name, prompt in zip(NAMES, PROMPTS, strict=True):
            program.ask(name, prompt, "request")
        program.say(f"race {rounds}")
        for i in range(6):
            (replace_adapter if i else add_adapter)(folder, "late", shelf_adapters["small" if i % 2 else "moe"])
            publish_shelf(read_bundle(folder), out)
        assert program.hear() == "different 0"
    files = {path.name for path in (out / "model" / "adapters").iterdir()}
    assert files == {Path(a["file"]).name for a in read_bundle(folder).manifest.shelf["adapters"].values()}


def test_a_step_that_was_recorded_serves_the_adapters_that_come_into_its_slots(model, cpp_programs, tmp_path):
    """One lane, and a swap for each request but the first three; what cannot be read changes no slot."""
    engine = engine_of(model, tmp_path / "engine")
    rows = expected(model)
    lora = engine / json.loads((engine / "deploy.json").read_text())["shelf"]["adapters"]["lora"]["file"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([cpp_programs / "emulated_tenants", engine, str(COUNT)], text=True, **pipes) as process:
        program = Tenants(process)

        def ask(which: Sequence[int]) -> None:
            for i in which:
                program.ask(NAMES[i], PROMPTS[i])
                assert program.hear() == "begun"
                assert program.answers(1) == [rows[i]]

        ask(range(len(NAMES)))
        with lora.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"\xff\xff\xff")
        program.ask("lora", PROMPTS[0])
        assert program.hear().endswith("is not the file that belongs here (its SHA-256 differs). Copy it again.")
        program.say("go")
        assert program.hear() == "refused"
        ask([4, 5, 6])
        process.stdin.close()
        told = process.stderr.read()
    # All but the first: with each request's batch of one.
    asked = [*rows, *(rows[i] for i in (4, 5, 6))]
    assert launches(told) == sum(min(len(row), COUNT - 1) for row in asked) - 1


def test_an_engine_and_a_shelf_that_do_not_belong_together_are_refused(model, make_bundle, cpp_programs, tmp_path):
    program, engine = cpp_programs / "emulated_runner", engine_of(model, tmp_path / "engine")
    shelf = json.loads((engine / "deploy.json").read_text())["shelf"]
    named = ("--adapter", "nobody")
    assert "There is no adapter 'nobody'; there are hydra, lora" in refused(program, engine, *named)
    change(engine, shelf={**shelf, "slots": 4})
    assert "do not belong together (its input" in (told := refused(program, engine))
    assert told.endswith("does not have the shelf's 4 slots). Deploy it again.")
    change(engine, shelf=None)
    assert ", and there is no shelf). Deploy it again." in refused(program, engine)
    plain = as_engine(deploy_cpp(make_bundle("llama"), tmp_path / "plain") / "model")
    change(plain, shelf={"slots": 3, "adapters": {}})
    assert "(the engine takes no adapters). Deploy it again." in refused(program, plain)


def test_who_finds_no_slot_is_told_when_none_of_the_others_goes_on(model, cpp_programs):
    """For two seconds; as long as they do, it waits for longer."""
    rows, order = expected(model), [0, 1, 3]
    with tenants(cpp_programs / "tenants", model, 2) as program:
        for i in order:
            program.ask(NAMES[i], PROMPTS[i])
            assert program.hear() == "begun"
        program.ask(NAMES[4], PROMPTS[4])
        assert program.hear() == (
            "Others' adapters are in too many of the 3 slots, and none of their requests has gone on for 2 seconds."
        )
        program.ask(NAMES[5], PROMPTS[5], "queue")
        # Longer than its patience in all, and none of them nearly as long.
        for _ in range(10):
            time.sleep(0.24)
            program.say("step")
        program.say("go")
        assert [program.hear() for _ in range(5)] == [
            " ".join(map(str, rows[i])) if i != 4 else "refused" for i in (*order, 4, 5)
        ]
    done = run(cpp_programs / "tenants", model, COUNT, -1)
    assert "-1 seconds of patience: give 0 or more." in done.stderr
