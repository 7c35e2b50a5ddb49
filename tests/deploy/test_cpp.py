"""`deploy cpp` as its README says to use it: built, run, compared with PyTorch, under sanitizers, on many threads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import (
    ANSWER,
    GREEDY_TOKENS,
    PROMPT,
    ROOT,
    assert_names_no_place,
    poison_token,
    pytorch_greedy,
    readme_block,
)
from cpp_programs import AROUND, as_engine, both_forms, build_cpp, generate, run
from systems import SYSTEMS, write_areas, write_system
from typer.testing import CliRunner

from teamlora_export.cli import app
from teamlora_export.deploy.cores import cores_of_quota, usable_cores
from teamlora_export.deploy.cpp import SOURCES, deploy_cpp
from teamlora_export.deploy.pages import has_large_pages
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of

_SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="module")
def runner(cpp_project) -> Path:
    """The program, built by following the README to the letter (but for what needs an administrator)."""
    commands = [line for line in readme_block(cpp_project, "sh").splitlines() if not line.startswith("sudo ")]
    environment = {**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    done = run(Path("sh"), "-e", "-c", "\n".join(commands), cwd=cpp_project, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Once upon a time" in done.stdout
    return cpp_project / "build" / "runner"


def test_greedy_text_equals_pytorchs_alone_and_in_batches(cpp_project, runner, smollm2_greedy):
    prompts, answers = list(smollm2_greedy), list(smollm2_greedy.values())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert generate(runner, cpp_project / "model", [prompt], GREEDY_TOKENS) == [answer]
    assert generate(runner, cpp_project / "model", [*prompts, prompts[0]], GREEDY_TOKENS) == [*answers, answers[0]]


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


def test_the_native_op_is_copied_beside_the_model_and_named_in_the_readme(make_bundle, tmp_path):
    bundle, library = make_bundle("llama"), build_library().path
    options = ["deploy", "cpp", str(bundle.folder), "-o", str(tmp_path / "out"), "--library", "auto"]
    assert CliRunner().invoke(app, options, catch_exceptions=False).exit_code == 0
    copied = tmp_path / "out" / "model" / library.name
    assert copied.read_bytes() == library.read_bytes()
    hashes = json.loads((copied.parent / "deploy.json").read_text())["files"]
    assert hashes[library.name] == sha256_of(library)
    assert f"build/runner --library model/{library.name}" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ExportError, match="--library is for ONNX Runtime"):
        deploy_cpp(bundle, tmp_path / "other", engine="fp16", library=library)
    deploy_cpp(bundle, tmp_path / "plain")
    assert "libteamlora" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_cache_in_place_gives_the_tokens_of_one_that_grows(cpp_programs, both_caches, rng):
    """A buffer begins with 256 places and grows by a quarter; parts of a prompt have 512 tokens, and the shorter rows
    of a batch are padding in the first of them."""
    short, middle, long = (rng.integers(3, 384, length).tolist() for length in (3, 600, 1100))
    program = cpp_programs / "deployed" / "runner"
    for prompts, count in (([short], 600), ([long, short, middle], 40)):
        expected = Model(both_caches[1]).generate(prompts, count)
        assert all(len(answer) == count for answer in expected)
        for model in both_caches:
            assert generate(program, model, prompts, count) == expected


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_text_of_many_windows_equals_pytorchs(name, cpp_programs, make_bundle, make_base, make_adapter, tmp_path, rng):
    """Windows of six tokens: a ring has room for 517, and the texts go around it up to three times."""
    ring, growing = both_forms(name, make_bundle, tmp_path)
    program = cpp_programs / "deployed" / "runner"
    short, middle, long = (rng.integers(3, 384, length).tolist() for length in (3, 600, 1100))
    expected = pytorch_greedy(make_base(name), make_adapter(name), short, 600)
    assert generate(program, ring, [short], 600) == [expected]
    prompts, count = [long, short, middle], 600
    assert generate(program, ring, prompts, count) == Model(growing).generate(prompts, count)


def test_a_thousand_requests_share_no_buffer(cpp_programs, both_caches):
    found = [run(cpp_programs / "requests", model, 1000) for model in both_caches]
    for done in found:
        assert done.returncode == 0, done.stdout + done.stderr
    assert found[0].stdout.splitlines()[0] == found[1].stdout.splitlines()[0]


def test_there_is_a_thread_for_each_core_that_may_be_used(cpp_programs):
    one = run(Path("taskset"), "-c", min(os.sched_getaffinity(0)), cpp_programs / "cores").stdout
    assert one.split()[0] == "1"
    assert run(cpp_programs / "cores").stdout.split() == [str(usable_cores()), str(cores_of_quota() or 0)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_there_are_no_more_threads_than_the_time_of_a_container_fills(name, cpp_programs, tmp_path):
    cores = write_system(name, tmp_path) or 0
    expected = min(len(os.sched_getaffinity(0)), cores or 64)
    assert run(cpp_programs / "cores", tmp_path).stdout.split() == [str(expected), str(cores)]


def test_what_is_in_use_comes_to_lie_in_large_pages(cpp_programs, tmp_path):
    expected = write_areas(tmp_path)
    assert run(cpp_programs / "pages", tmp_path).stdout.split() == [f"{start:x}-{end:x}" for start, end in expected]
    given, large, last = run(cpp_programs / "pages").stdout.split()
    assert (given, last) == (str(int(has_large_pages())), "1")
    assert given == "0" or int(large) >= 48


def test_words_are_streamed_and_batches_printed(runner, cpp_project, smollm2_greedy):
    told = run(runner, PROMPT, cwd=cpp_project)
    assert told.stdout == f"{PROMPT}{ANSWER}\n", told.stderr
    assert "a second" in told.stderr
    assert run(runner, cwd=cpp_project, input=PROMPT).stdout == told.stdout
    both = run(runner, "--tokens", 20, PROMPT, "Naïve 🦙 is", cwd=cpp_project)
    assert both.stdout.startswith(told.stdout + "Naïve 🦙 is")


def test_nothing_written_names_a_path_of_this_machine_and_every_file_has_its_hash(make_bundle, tmp_path):
    project = deploy_cpp(make_bundle("llama"), tmp_path / "project")
    assert_names_no_place(project, make_bundle("llama"))
    fields = json.loads((project / "model" / "deploy.json").read_text())
    names = {p.relative_to(project).as_posix() for p in project.rglob("*") if p.is_file()} - {"model/deploy.json"}
    assert {f"model/{name}" for name in fields["files"]} | set(fields["program"]) == names


def test_what_is_wrong_is_one_message_and_exit_code_2(runner, cpp_project, make_bundle, tmp_path):
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


def test_a_thousand_requests_on_eight_threads_are_answered_as_one_by_one(cpp_programs, make_bundle, tmp_path):
    for architecture in ("llama", "bert"):
        model = deploy_cpp(make_bundle(architecture), tmp_path / architecture) / "model"
        grown = []
        # Once more where the allocator kept what was free; a leak grows again.
        while len(grown) < 2 and (not grown or grown[-1] > 4):
            done = run(cpp_programs / "requests", model, 1000)
            assert done.returncode == 0, done.stdout + done.stderr
            growth = re.search(r"growth (\S+)", done.stdout)
            assert growth is not None, done.stdout
            grown.append(float(growth[1]))
        # Between the 250th and the last of 1,000: the caches of 750 are 16 MB.
        assert min(grown) < 4, done.stdout


def test_no_memory_error_undefined_behaviour_or_leak(make_bundle, make_shelf, both_caches, rng, tmp_path):
    # Lines are enough to know of: the rest of what debuggers want takes the compiler longer.
    options = (f"-DDEPLOYED={SOURCES}", f"-DCMAKE_CXX_FLAGS={_SANITIZE} -g1", "-DCMAKE_BUILD_TYPE=None")
    targets = ("requests", "tenants", "emulated_requests", "emulated_runner", "emulated_tenants", "runner")
    programs = build_cpp(AROUND, tmp_path / "sanitized", *options, targets=targets)
    model = deploy_cpp(make_bundle("llama"), tmp_path / "llama") / "model"
    alone = run(programs / "requests", model, 1000)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    many = run(programs / "requests", both_caches[0], 100)
    assert many.returncode == 0, many.stdout + many.stderr
    shelf = deploy_cpp(make_shelf(), tmp_path / "shelf") / "model"
    asked = "".join(f"request {name} 5 6 7\n" for name in ("team", "small", "-", "lora", "hydra"))
    for program in ("tenants", "emulated_tenants"):
        tenants = run(programs / program, shelf, 3, input=f"{asked}race 10\n")
        assert (tenants.returncode, tenants.stdout) == (0, "different 0\n"), tenants.stderr
        if program == "tenants":
            as_engine(shelf)
    prompts = [rng.integers(3, 384, length).tolist() for length in (600, 5)]
    assert len(generate(programs / "deployed" / "runner", both_caches[0], prompts, 3)) == 2
    refused = run(programs / "deployed" / "runner", "--model", model, "--ids", input="999\n")
    assert (refused.returncode, "vocabulary" in refused.stderr) == (2, True), refused.stderr
    engine = as_engine(Path(shutil.copytree(both_caches[0], tmp_path / "engine")), capacity=640)
    for emulated in (
        run(programs / "emulated_requests", as_engine(model), 200),
        run(programs / "emulated_requests", engine, 200),
    ):
        assert emulated.returncode == 0, emulated.stdout + emulated.stderr
    assert len(generate(programs / "emulated_runner", engine, prompts, 3)) == 2


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "minilm"])
def test_vectors_are_those_of_python(name, cpp_programs, make_bundle, tmp_path, request):
    """A sentence's embedding (minilm) comes beside the hidden states: an engine wants memory for both."""
    bundle = request.getfixturevalue("minilm") if name == "minilm" else make_bundle(name)
    expected = Model(bundle.folder).encode([[5, 6, 7], [9]])

    def encode(program: Path, model: Path) -> list[list[float]]:
        done = run(program, "--model", model, "--ids", input="5 6 7\n9\n")
        assert done.returncode == 0, done.stderr
        return [[float(value) for value in line.split()] for line in done.stdout.splitlines()]

    expected = [np.ravel(row) for row in expected]
    model = deploy_cpp(bundle, tmp_path / name) / "model"
    on_onnxruntime = encode(cpp_programs / "deployed" / "runner", model)
    on_an_engine = encode(cpp_programs / "emulated_runner", as_engine(model))
    for found in (on_onnxruntime, on_an_engine):
        assert [len(row) for row in found] == [len(row) for row in expected]
        assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cache", ["growing", "in-place"])
def test_a_model_in_float16_gives_the_text_of_python(cache, cpp_programs, make_bundle, tmp_path):
    bundle = make_bundle("llama", "fp16", cache=cache)
    prompts = [[5, 6, 7, 8], [9, 10]]
    expected = Model(bundle.folder).generate(prompts, 20)
    model = deploy_cpp(bundle, tmp_path / "llama") / "model"
    assert generate(cpp_programs / "deployed" / "runner", model, prompts, 20) == expected
    assert (
        generate(cpp_programs / "emulated_runner", as_engine(model, 128 if cache == "in-place" else None), prompts, 20)
        == expected
    )


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
