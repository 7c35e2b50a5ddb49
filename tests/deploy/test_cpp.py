"""`deploy cpp` as its README says to use it: built, run, compared with PyTorch, under sanitizers, on many threads.

Its TensorRT back end is compiled against TensorRT's headers and linked, and runs up to the missing driver. What lies
above TensorRT's own calls runs on the CPU as well: on an engine and a CUDA that are emulated (`cpp/`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import (
    GREEDY_TOKENS,
    ROOT,
    assert_names_no_place,
    build_cpp,
    poison_token,
    pytorch_greedy,
    readme_block,
)
from systems import SYSTEMS, write_system

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.cores import cores_of_quota, usable_cores
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.build import BuildOptions, build_engine
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.engine.toolchain import find_toolchain
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.graph.passes.fix_capacity import FixCapacity

_SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


def run(program: Path, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def generate(program: Path, model: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    return generate_and_tell(program, model, prompts, count)[0]


def generate_and_tell(
    program: Path, model: Path, prompts: Sequence[Sequence[int]], count: int
) -> tuple[list[list[int]], str]:
    """The answers, and what the program said beside them."""
    lines = "".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts)
    done = run(program, "--model", model, "--ids", "--tokens", count, input=lines)
    assert done.returncode == 0, done.stderr
    return [[int(token) for token in line.split()] for line in done.stdout.splitlines()], done.stderr


def launches(told: str) -> int:
    """How many steps of decoding were CUDA graphs."""
    found = re.search(r"graph launches: (\d+)", told)
    assert found is not None, told
    return int(found[1])


def as_engine(model: Path, capacity: int | None = None) -> Path:
    """The same model's folder with its graph as the engine of the emulated TensorRT. `capacity`: of a cache in
    place."""
    (model / "engines").mkdir()
    (model / "model.onnx").rename(model / "engines" / "emulated.engine")
    (model / "model.onnx.data").rename(model / "engines" / "model.onnx.data")
    if capacity is not None:
        graph = onnx.load(model / "engines" / "emulated.engine", load_external_data=False)
        fixed = ir.from_proto(graph)
        assert FixCapacity(capacity)(fixed).modified
        onnx.save(ir.to_proto(fixed), model / "engines" / "emulated.engine")
    fields = json.loads((model / "deploy.json").read_text())
    names = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    fields["files"] = {name: sha256_of(model / name) for name in names if name != "deploy.json"}
    (model / "deploy.json").write_text(json.dumps(fields))
    return model


@pytest.fixture(scope="module")
def project(smollm2, tmp_path_factory) -> Path:
    return deploy_cpp(smollm2, tmp_path_factory.mktemp("cpp") / "smollm2")


@pytest.fixture(scope="module")
def runner(project) -> Path:
    """The program, built by following the README to the letter (but for what needs an administrator)."""
    commands = [line for line in readme_block(project, "sh").splitlines() if not line.startswith("sudo ")]
    environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    done = run(Path("sh"), "-e", "-c", "\n".join(commands), cwd=project, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Once upon a time" in done.stdout
    return project / "build" / "runner"


@pytest.fixture(scope="module")
def requests(project, tmp_path_factory) -> Path:
    """The folder of the programs around the project."""
    return build_cpp(ROOT / "tests" / "deploy" / "cpp", tmp_path_factory.mktemp("requests"), f"-DDEPLOYED={project}")


@pytest.fixture(scope="module")
def emulated_model(smollm2, project, tmp_path_factory) -> Path:
    """Of the bundle's own graph, as `trt` builds engines; others here give the logits of the last token alone."""
    model = Path(shutil.copytree(project / "model", tmp_path_factory.mktemp("emulated") / "model"))
    shutil.copyfile(smollm2.model, model / "model.onnx")
    return as_engine(model)


def test_greedy_text_equals_pytorchs_alone_and_in_batches(project, runner, smollm2_greedy):
    prompts, answers = list(smollm2_greedy), list(smollm2_greedy.values())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate(runner, project / "model", [prompt], GREEDY_TOKENS) == [answer]
    assert generate(runner, project / "model", [*prompts, prompts[0]], GREEDY_TOKENS) == [*answers, answers[0]]


def test_the_native_op_runs_in_the_program_by_a_bare_name_too(runner, make_bundle, tmp_path):
    """In a model without the op's definition, so that nothing else can run it."""
    model = deploy_cpp(make_bundle("llama"), tmp_path / "out") / "model"
    expected = Model(model).generate([[5, 6, 7], [8]], 12)
    graph = onnx.load(model / "model.onnx", load_external_data=False)
    del graph.functions[:]
    (model / "model.onnx").write_bytes(graph.SerializeToString())
    library = build_library().path
    words = ("--model", model, "--ids", "--no-check", "--tokens", 12)
    found = run(runner, *words, "--library", library.name, cwd=library.parent, input="5 6 7\n8\n")
    assert [[int(token) for token in line.split()] for line in found.stdout.splitlines()] == expected, found.stderr
    assert "cannot load it" in run(runner, *words, input="5 6 7\n8\n").stderr


def endless(bundle: Bundle, folder: Path) -> Path:
    """The model's folder of a deployment that takes 4,096 tokens, and never stops."""
    model = deploy_cpp(bundle, folder, logits="all") / "model"
    fields = json.loads((model / "deploy.json").read_text())
    fields["tokens"] |= {"most": 4096, "stops": []}
    (model / "deploy.json").write_text(json.dumps(fields))
    return model


@pytest.fixture(scope="module")
def in_place(make_bundle, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a model whose cache is in place, and of the same with a growing one."""
    return both_forms("llama", make_bundle, tmp_path_factory.mktemp("llama"))


def both_forms(name: str, make_bundle: Callable[..., Bundle], folder: Path) -> tuple[Path, Path]:
    """`endless` folders of a model whose cache is in place, and of the same with a growing one."""
    in_place, growing = (endless(make_bundle(name, cache=form), folder / form) for form in ("in-place", "growing"))
    return in_place, growing


def test_a_cache_in_place_gives_the_tokens_of_one_that_grows(requests, in_place, rng):
    """A buffer begins with 256 places and grows by a quarter; parts of a prompt have 512 tokens, and the shorter rows
    of a batch are padding in the first of them."""
    short, middle, long = (rng.integers(3, 384, length).tolist() for length in (3, 600, 1100))
    program = requests / "deployed" / "runner"
    for prompts, count in (([short], 600), ([long, short, middle], 40)):
        expected = Model(in_place[1]).generate(prompts, count)
        assert all(len(answer) == count for answer in expected)
        for model in in_place:
            assert generate(program, model, prompts, count) == expected


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_text_of_many_windows_equals_pytorchs(name, requests, make_bundle, make_base, make_adapter, tmp_path, rng):
    """Windows of six tokens: a ring has room for 517, and the texts go around it up to three times."""
    ring, growing = both_forms(name, make_bundle, tmp_path)
    program = requests / "deployed" / "runner"
    short, middle, long = (rng.integers(3, 384, length).tolist() for length in (3, 600, 1100))
    expected = pytorch_greedy(make_base(name), make_adapter(name), short, 600)
    assert generate(program, ring, [short], 600) == [expected]
    prompts, count = [long, short, middle], 600
    assert generate(program, ring, prompts, count) == Model(growing).generate(prompts, count)


def test_a_thousand_requests_share_no_buffer(requests, in_place):
    found = [run(requests / "requests", model, 1000) for model in in_place]
    for done in found:
        assert done.returncode == 0, done.stdout + done.stderr
    assert found[0].stdout.splitlines()[0] == found[1].stdout.splitlines()[0]


def test_there_is_a_thread_for_each_core_that_may_be_used(requests):
    one = run(Path("taskset"), "-c", min(os.sched_getaffinity(0)), requests / "cores").stdout
    assert one.split()[0] == "1"
    assert run(requests / "cores").stdout.split() == [str(usable_cores()), str(cores_of_quota() or 0)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_there_are_no_more_threads_than_the_time_of_a_container_fills(name, requests, tmp_path):
    cores = write_system(name, tmp_path) or 0
    expected = min(len(os.sched_getaffinity(0)), cores or 64)
    assert run(requests / "cores", tmp_path).stdout.split() == [str(expected), str(cores)]


def test_words_are_streamed_and_batches_printed(runner, project, smollm2_greedy):
    prompt = "Words: house, apple, door, cloud\nSorted:"
    told = run(runner, prompt, cwd=project)
    assert told.stdout == "Words: house, apple, door, cloud\nSorted: apple, cloud, door, house\n", told.stderr
    assert "a second" in told.stderr
    assert run(runner, cwd=project, input=prompt).stdout == told.stdout
    both = run(runner, "--tokens", 7, prompt, "Naïve 🦙 is", cwd=project)
    assert both.stdout.startswith(told.stdout + "Naïve 🦙 is")


def test_nothing_written_names_a_path_of_this_machine_and_every_file_has_its_hash(make_bundle, tmp_path):
    project = deploy_cpp(make_bundle("llama"), tmp_path / "project")
    assert_names_no_place(project, make_bundle("llama"))
    fields = json.loads((project / "model" / "deploy.json").read_text())
    names = {p.relative_to(project).as_posix() for p in project.rglob("*") if p.is_file()} - {"model/deploy.json"}
    assert {f"model/{name}" for name in fields["files"]} | set(fields["program"]) == names


def test_what_is_wrong_is_one_message_and_exit_code_2(runner, project, make_bundle, tmp_path):
    def refused(*arguments: object, words: str = "1\n") -> str:
        done = run(runner, *arguments, input=words)
        assert done.returncode == 2
        assert done.stdout == ""
        return done.stderr.splitlines()[-1]

    model = deploy_cpp(make_bundle("llama"), tmp_path / "llama") / "model"
    assert "Token 384 is not in the model's vocabulary of 384" in refused("--model", model, "--ids", words="1 384")
    assert "Not a line of token ids: 1 x" in refused("--model", model, "--ids", words="1 x")
    assert "There is no prompt" in refused("--model", model, "--ids", words="\n")
    for line in ("5 99999999999999999999", "5 1.5", "5 0x7", "5,6", "5 " + "9" * 5000):
        assert "Not a line of token ids: 5" in refused("--model", model, "--ids", words=line)
    assert "Token -1 is not in" in refused("--model", model, "--ids", words="5 -1")
    for count in (128, 129):
        assert f"{count} tokens; the model takes 128" in refused("--model", model, "--ids", words="7 " * count)
    assert "0 tokens: give at least 1" in refused("--model", model, "--ids", "--tokens", 0)
    assert "give a number" in refused("--model", model, "--ids", "--tokens", -3)
    assert "give 0 to 1024" in refused("--model", model, "--ids", "--threads", 100_000_000)
    assert "not text in UTF-8" in refused("--model", model, os.fsdecode(b"\xff\xfe"))
    assert "not text in UTF-8" in refused("--model", model, words="a\0b")
    most = Model(model).generate([[7] * 120], 8)
    assert generate(runner, model, [[7] * 120], 2**31 - 1) == most
    roberta = deploy_cpp(make_bundle("roberta"), tmp_path / "roberta") / "model"
    assert "129 tokens; the model takes 128" in refused("--model", roberta, "--ids", words="7 " * 129)
    assert run(runner, "--model", roberta, "--ids", input="7 " * 128).returncode == 0
    assert "tokenizer.json: is missing" in refused("--model", roberta, "word")
    assert "without the back end tensorrt" in refused("--model", model, "--backend", "tensorrt")
    assert "cannot be loaded as a library of ops" in refused("--model", model, "--ids", "--library", model / "none.so")
    assert "no such option" in refused("--verbose")
    assert "--\\x1b[31m\\x9b\\x0aé: there is no such option" in refused("--\x1b[31m\x9b\né")
    assert "give a number" in refused("--tokens", "many")
    assert "holds no deploy.json" in refused("--model", tmp_path)
    with (model / "model.onnx.data").open("r+b") as file:
        file.write(b"\1")
    assert "model.onnx.data: is not the file that belongs here" in refused("--model", model, "--ids")
    assert run(runner, "--model", model, "--ids", "--no-check", "--tokens", 1, input="1").returncode == 0
    poison_token(model, 7)
    assert "no number (NaN)" in refused("--model", model, "--ids", "--no-check", words="5 7")
    (model / "model.onnx").write_bytes(b"no model")
    assert "cannot load it" in refused("--model", model, "--ids", "--no-check")
    fields = json.loads((model / "deploy.json").read_text())
    tokens = fields["tokens"]
    for message, changes in {
        "not in its folder": {"files": {**fields["files"], "../secret": "0"}},
        "lists no model": {"files": {}},
        "does not list tokenizer.json": {"files": {n: h for n, h in fields["files"].items() if n != "tokenizer.json"}},
        "must be string": {"files": {"model.onnx": 5}},
        "a number is not as it should be: 1.5": {"tokens": {**tokens, "padding": 1.5}},
        "a number is not as it should be: -1": {"tokens": {**tokens, "stops": [-1]}},
        "a number is not as it should be: 4294967296": {"tokens": {**tokens, "most": 2**32}},
        "key 'vocabulary' not found": {"tokens": {}},
        "cannot use at() with array": {"tokens": []},
    }.items():
        (model / "deploy.json").write_text(json.dumps({**fields, **changes}))
        assert message in refused("--model", model, "--ids")
    (model / "deploy.json").write_text('{"a":' * 100_000)
    assert "cannot be read" in refused("--model", model, "--ids")
    (model / "deploy.json").write_text(json.dumps({**fields, "format_version": 99}))
    assert "newer teamlora-export" in refused("--model", model, "--ids")
    (model / "deploy.json").write_text("{")
    assert "cannot be read" in refused("--model", model, "--ids")


def test_a_thousand_requests_on_eight_threads_are_answered_as_one_by_one(requests, make_bundle, tmp_path):
    for architecture in ("llama", "bert"):
        model = deploy_cpp(make_bundle(architecture), tmp_path / architecture) / "model"
        done = run(requests / "requests", model, 1000)
        assert done.returncode == 0, done.stdout + done.stderr
        growth = re.search(r"growth (\S+)", done.stdout)
        # Between the 250th and the last of 1,000: the caches of 750 are 16 MB.
        assert growth is not None and float(growth[1]) < 4, done.stdout


def test_no_memory_error_undefined_behaviour_or_leak(project, make_bundle, in_place, rng, tmp_path):
    source = ROOT / "tests" / "deploy" / "cpp"
    options = (f"-DDEPLOYED={project}", f"-DCMAKE_CXX_FLAGS={_SANITIZE}", "-DCMAKE_BUILD_TYPE=Debug")
    targets = ("requests", "emulated_requests", "emulated_runner", "runner")
    programs = build_cpp(source, tmp_path / "sanitized", *options, targets=targets)
    model = deploy_cpp(make_bundle("llama"), tmp_path / "llama") / "model"
    alone = run(programs / "requests", model, 1000)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    many = run(programs / "requests", in_place[0], 100)
    assert many.returncode == 0, many.stdout + many.stderr
    prompts = [rng.integers(3, 384, length).tolist() for length in (600, 5)]
    assert len(generate(programs / "deployed" / "runner", in_place[0], prompts, 3)) == 2
    refused = run(programs / "deployed" / "runner", "--model", model, "--ids", input="999\n")
    assert (refused.returncode, "vocabulary" in refused.stderr) == (2, True), refused.stderr
    engine = as_engine(Path(shutil.copytree(in_place[0], tmp_path / "engine")), capacity=640)
    for emulated in (
        run(programs / "emulated_requests", as_engine(model), 200),
        run(programs / "emulated_requests", engine, 200),
    ):
        assert emulated.returncode == 0, emulated.stdout + emulated.stderr
    assert len(generate(programs / "emulated_runner", engine, prompts, 3)) == 2


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "minilm"])
def test_vectors_are_those_of_python(name, requests, make_bundle, tmp_path, request):
    """A sentence's embedding (minilm) comes beside the hidden states: an engine wants memory for both."""
    bundle = request.getfixturevalue("minilm") if name == "minilm" else make_bundle(name)
    expected = Model(bundle.folder).encode([[5, 6, 7], [9]])

    def encode(program: Path, model: Path) -> list[list[float]]:
        done = run(program, "--model", model, "--ids", input="5 6 7\n9\n")
        assert done.returncode == 0, done.stderr
        return [[float(value) for value in line.split()] for line in done.stdout.splitlines()]

    expected = [np.ravel(row) for row in expected]
    model = deploy_cpp(bundle, tmp_path / name) / "model"
    on_onnxruntime = encode(requests / "deployed" / "runner", model)
    on_an_engine = encode(requests / "emulated_runner", as_engine(model))
    for found in (on_onnxruntime, on_an_engine):
        assert [len(row) for row in found] == [len(row) for row in expected]
        assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_a_model_in_float16_gives_the_text_of_python(cache, requests, make_bundle, tmp_path):
    bundle = make_bundle("llama", "fp16", cache=cache)
    prompts = [[5, 6, 7, 8], [9, 10]]
    expected = Model(bundle.folder).generate(prompts, 20)
    model = deploy_cpp(bundle, tmp_path / "llama") / "model"
    assert generate(requests / "deployed" / "runner", model, prompts, 20) == expected
    assert (
        generate(requests / "emulated_runner", as_engine(model, 128 if cache == "in-place" else None), prompts, 20)
        == expected
    )


def test_the_tensorrt_back_end_gives_pytorchs_text_on_an_emulated_engine(emulated_model, requests, smollm2_greedy):
    prompts, answers = list(smollm2_greedy), list(smollm2_greedy.values())
    assert generate(requests / "emulated_runner", emulated_model, [prompts[1]], GREEDY_TOKENS) == [answers[1]]
    found, told = generate_and_tell(requests / "emulated_runner", emulated_model, [*prompts, prompts[0]], GREEDY_TOKENS)
    assert found == [*answers, answers[0]]
    # All steps but the first run of the engine for the shape: that one is not recorded.
    assert launches(told) >= max(map(len, answers)) - 2


def test_recorded_steps_serve_requests_of_their_own_batch_and_length_alone(project, emulated_model, requests):
    assert_same_answers(requests, project / "model", emulated_model, 8)


def test_steps_that_were_recorded_for_a_cache_in_place_end_with_their_memory(requests, in_place, tmp_path):
    """Logits of all tokens: a longer prompt takes other memory for them."""
    engine = as_engine(Path(shutil.copytree(in_place[0], tmp_path / "model")), capacity=64)
    assert_same_answers(requests, in_place[1], engine, 200)


def assert_same_answers(requests: Path, model: Path, engine: Path, count: int) -> None:
    """Of `model` on ONNX Runtime and `engine` on the emulated TensorRT, one by one and on eight threads."""
    found = (run(requests / "requests", model, count), run(requests / "emulated_requests", engine, count))
    for done in found:
        assert done.returncode == 0, done.stdout + done.stderr
    assert found[0].stdout.splitlines()[0] == found[1].stdout.splitlines()[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_engine_whose_cache_is_in_place_reads_long_prompts_in_parts(
    architecture, requests, make_bundle, rng, tmp_path
):
    """The emulated prefill profile takes 300 tokens at most; the shorter rows of a batch are padding in the first
    parts, and a last part may be one token."""
    growing = endless(make_bundle(architecture), tmp_path / "growing")
    engine = as_engine(endless(make_bundle(architecture, cache="in-place"), tmp_path / "in-place"), capacity=1140)
    lengths = ([3], [301], [1100, 3, 600])
    for prompts in ([rng.integers(3, 384, length).tolist() for length in batch] for batch in lengths):
        expected = generate(requests / "deployed" / "runner", growing, prompts, 40)
        assert all(len(answer) == 40 for answer in expected)
        found, told = generate_and_tell(requests / "emulated_runner", engine, prompts, 40)
        assert found == expected
        # A step follows on each token but the last; the first one is not recorded.
        assert launches(told) == 38 + (len(prompts[0]) % 300 == 1)


def decode(
    program: Path, model: Path, most: int, ids: np.ndarray, mask: np.ndarray, parts: Sequence[int], **options: object
) -> list[str]:
    """The lines of a `decoder` that is called with so many of the columns of `ids` and `mask` at a time; 0 begins
    another request."""
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    calls, end = [], 0
    for part in parts:
        start, end = end, end + part if part else 0
        values = (ids[:, start:end], positions[:, start:end], mask[:, :end])
        calls.append(" ".join(map(str, [part, end, *np.concatenate([np.ravel(value) for value in values])])))
    done = run(program, model, len(ids), most, input="\n".join(calls), **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_part_sees_all_that_was_read_before_it(architecture, requests, make_bundle, rng, tmp_path):
    """Logits, since a random model's next token depends on little more than its last one. The reference reads all at
    once; float32 differs by 2e-7 then, and a part that sees itself alone by 0.1."""
    engine = as_engine(endless(make_bundle(architecture, cache="in-place"), tmp_path / "model"), capacity=64)
    ids, mask = rng.integers(3, 384, (3, 33)), np.ones((3, 33), np.int64)
    for row, padding in enumerate((0, 25, 9)):
        mask[row, :padding] = 0
    parts = (9, 1, 12, 8, 1, 1, 1)
    found = decode(requests / "decoder", engine, 33, ids, mask, parts)
    assert len(found) == len(parts)
    bundle = make_bundle(architecture)
    whole = {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    for port in bundle.manifest.inputs:
        if port.name.startswith("past_key_values."):
            whole[port.name] = np.zeros((3, port.shape[1], 0, port.shape[3]), np.float32)
    expected = ort.InferenceSession(bundle.model).run(["logits"], whole)[0]
    for end, line in zip(np.cumsum(parts), found, strict=True):
        logits = np.array(line.split(), np.float32).reshape(3, -1)
        seen = mask[:, end - 1] > 0
        assert np.allclose(logits[seen], expected[seen, end - 1], atol=1e-5)


def test_a_cache_that_is_full_is_refused_before_the_engine_is_called(requests, in_place, make_bundle, tmp_path):
    """`generate` asks for room first; a program of one's own may not."""
    engine = as_engine(Path(shutil.copytree(in_place[0], tmp_path / "in-place")), capacity=40)
    assert [len(row) for row in generate(requests / "emulated_runner", engine, [[7] * 30], 10)] == [10]
    told = run(requests / "emulated_runner", "--model", engine, "--ids", "--tokens", 11, input="7 " * 30)
    assert (told.returncode, told.stdout) == (2, "")
    assert "The engine was built for 40 tokens, this request needs 41. Build it with other --shapes." in told.stderr

    def fill(model: Path) -> tuple[int, str]:
        """A cache for 9 tokens: how many it takes, 5 and then one at a time, and what it says then."""
        ids, mask = np.full((1, 300), 7), np.ones((1, 300), np.int64)
        lines = decode(requests / "decoder", model, 9, ids, mask, [5] + [1] * 295)
        return 5 + len(lines) - 2, lines[-1]

    assert fill(engine) == (40, "The cache has room for 40 tokens, and this would be 41.")
    fixed = as_engine(Path(shutil.copytree(in_place[1], tmp_path / "fixed")))
    assert fill(fixed) == (256, "The cache has room for 256 tokens, and this would be 257.")
    growing = as_engine(endless(make_bundle("mistral"), tmp_path / "mistral"))
    assert fill(growing) == (9, "The cache has room for 9 tokens, and this would be 10.")


def test_a_request_that_finds_no_memory_leaves_no_recorded_step_of_memory_that_is_gone(requests, in_place, tmp_path):
    """The logits of 20 tokens are refused their memory; the next request begins with a step."""
    engine = as_engine(Path(shutil.copytree(in_place[0], tmp_path / "model")), capacity=64)
    ids, mask = np.full((1, 20), 7), np.ones((1, 20), np.int64)
    few = {**os.environ, "EMULATED_LARGEST": str(10 * 384 * 4)}
    found = decode(requests / "decoder", engine, 30, ids, mask, [1, 0, 4, 1, 1, 1, 0, 20, 0, 1], env=few)
    assert found[5] == "No memory on the GPU: an emulated error."
    assert found[6] == found[0]
    assert len(found) == 7


@pytest.mark.parametrize("fault", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("cache", ["growing", "in-place"])
@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_no_request_sees_what_a_request_with_nan_has_left(architecture, cache, fault, requests, make_bundle, tmp_path):
    """Masked rows of a cache are multiplied by zero, which leaves NaN: in a cache of fixed length, in a growing one, in
    one that is in place."""
    model = deploy_cpp(make_bundle(architecture, cache=cache), tmp_path / "project") / "model"
    poison(model, 383, fault)
    alone = run(requests / "requests", model, 20)
    after = run(requests / "requests", model, 20, 383)
    engine = as_engine(model, 128 if cache == "in-place" else None)
    emulated = run(requests / "emulated_requests", engine, 20, 383)
    for done in (alone, after, emulated):
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[0] == alone.stdout.splitlines()[0]


def poison(model: Path, token: int, fault: float) -> None:
    """Put `fault` into the embedding of `token`: a prompt with it has nothing else in its cache."""
    graph = ir.load(model / "model.onnx")
    table = next(v for name, v in graph.graph.initializers.items() if name.endswith("embed_tokens.weight"))
    array = table.const_value.numpy().copy()
    array[token] = fault
    table.const_value = ir.tensor(array, name=table.name)
    ir.save(graph, model / "model.onnx", external_data="model.onnx.data")
    fields = json.loads((model / "deploy.json").read_text())
    fields["files"] |= {name: sha256_of(model / name) for name in ("model.onnx", "model.onnx.data")}
    (model / "deploy.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("cache", ["growing", "in-place"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_the_tensorrt_back_end_keeps_the_cache_as_the_model_needs_it(
    architecture, cache, requests, make_bundle, tmp_path
):
    """Python's text, which is PyTorch's: models that learn their positions see whether padding is counted."""
    bundle = make_bundle(architecture, cache=cache)
    model = deploy_cpp(bundle, tmp_path / "project") / "model"
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15]]
    expected = Model(bundle.folder).generate(prompts, 40)
    assert generate(requests / "deployed" / "runner", model, prompts, 40) == expected
    alone = run(requests / "requests", model, 100)
    engine = as_engine(model, 128 if cache == "in-place" else None)
    assert generate(requests / "emulated_runner", engine, prompts, 40) == expected
    done = run(requests / "emulated_requests", engine, 100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == alone.stdout.splitlines()[0]
    grows = cache == "growing" and architecture in ("mistral", "gemma2", "gemma3")
    assert (launches(done.stderr) == 0) == grows


def test_the_tensorrt_project_is_compiled_linked_and_runs_up_to_the_missing_driver(make_bundle, plugin, tmp_path):
    source = make_bundle("llama")
    bundle = Bundle(Path(shutil.copytree(source.folder, tmp_path / "bundle")), source.manifest)
    build_engine(bundle, BuildOptions(dtype="fp16", runtime="rtx", capabilities=("8.9",)), None)
    project = deploy_cpp(bundle, tmp_path / "project", engine="fp16-rtx")
    assert not (project / "model" / "model.onnx").exists()
    include = f"-DTENSORRT_INCLUDE_DIR={find_toolchain().tensorrt_include}"
    options = ("-DTEAMLORA_ONNXRUNTIME=OFF", "-DTEAMLORA_TENSORRT=ON", include)
    runner = build_cpp(project, project / "build", *options) / "runner"
    done = run(runner, "--ids", cwd=project, input="1 2 3\n")
    assert done.returncode == 2
    assert "TensorRT runs on a GPU, and none can be used here" in done.stderr
    # TensorRT-RTX's library, which stands in for TensorRT's, is of another major version than the plugin.
    (project / "model" / "plugins").mkdir()
    library = Path(shutil.copy(plugin.path, project / "model" / "plugins"))
    other = run(runner, "--ids", cwd=project, input="1\n")
    assert f"{library.name}: was built with the headers of TensorRT {plugin.tensorrt}, and this is 1." in other.stderr
    shutil.rmtree(library.parent)
    assert "there is no such engine" in run(runner, "--ids", "--engine", "other", cwd=project, input="1\n").stderr
    with (project / "model" / "engines" / "fp16-rtx.engine").open("r+b") as file:
        file.write(b"\1")
    refused = run(runner, "--ids", cwd=project, input="1\n")
    assert "fp16-rtx.engine: is not the file that belongs here" in refused.stderr
    for path in (project / "model").rglob("*"):
        if path.suffix == ".json":
            assert str(tmp_path) not in path.read_text(), path
    with pytest.raises(ExportError, match="no engine of that name"):
        deploy_cpp(bundle, tmp_path / "other", engine="none")


def test_an_engine_and_a_plugin_that_do_not_belong_are_refused(make_bundle, plugin, tmp_path):
    source = make_bundle("llama")
    bundle = Bundle(Path(shutil.copytree(source.folder, tmp_path / "bundle")), source.manifest)
    engine, _ = build_engine(bundle, BuildOptions(dtype="fp16", runtime="rtx", capabilities=("8.9",)), None)
    facts = json.loads(engine.with_suffix(".json").read_text())

    def deploy(**changes: object) -> Path:
        engine.with_suffix(".json").write_text(json.dumps({**facts, "runtime_version": plugin.tensorrt, **changes}))
        return deploy_cpp(bundle, tmp_path / "out", engine="fp16-rtx", plugin=library)

    described = {name: getattr(plugin, name) for name in ("op", "op_version", "build", "sha256", "tensorrt")}
    library = None
    made = deploy(plugin=described)
    assert (made / "model" / "plugins" / plugin.path.name).read_bytes() == plugin.path.read_bytes()
    described_model = json.loads((made / "model" / "deploy.json").read_text())
    assert described_model["dtype"] == "fp16"
    assert {port["dtype"] for port in described_model["outputs"]} == {"float16"}
    assert described_model["adapter_sha256"] == facts["adapter_sha256"]
    assert f'"{plugin.path.name}"' in (made / "runner" / "folder.h").read_text(), "where the program looks for it"
    refitted = deploy(plugin=described, adapter_sha256="1" * 64) / "model" / "deploy.json"
    assert json.loads(refitted.read_text())["adapter_sha256"] == "1" * 64
    assert f"built with the headers of TensorRT {plugin.tensorrt}" in (made / "README.md").read_text()
    with pytest.raises(ExportError, match=r"is not for TensorRT 99\.0"):
        deploy(plugin=described, runtime_version="99.0")
    with pytest.raises(ExportError, match="was built with the plugin 000000000000 "):
        deploy(plugin={**described, "sha256": "0" * 64})
    library = plugin.path
    deploy(plugin=described)
    with pytest.raises(ExportError, match="is not the plugin that"):
        deploy(plugin={**described, "sha256": "0" * 64})
    with pytest.raises(ExportError, match="built from another export"):
        deploy(model_sha256={"model.onnx": "0" * 64})
    with pytest.raises(ExportError, match="holds no weights"):
        deploy(stripped=True)


def test_the_command_line_writes_it(make_bundle, tmp_path):
    bundle = make_bundle("llama").folder
    command = [sys.executable, "-m", "teamlora_export.cli", "deploy", "cpp", bundle, "-o", tmp_path / "out"]
    command += ["--logits", "all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"CMakeLists.txt", "main.cpp", "get_libraries.sh", "runner", "model", "README.md"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert (tmp_path / "out" / "model" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
