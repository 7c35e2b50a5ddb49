"""The TensorRT back end of `deploy cpp`.

It is compiled against TensorRT's headers and linked, and runs up to the missing driver. What lies above TensorRT's own
calls runs on the CPU as well: on an engine and a CUDA that are emulated (`cpp/`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import GREEDY_TOKENS
from cpp_programs import as_engine, build_cpp, endless, generate, generate_and_tell, launches, run

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.build import BuildOptions, build_engine
from teamlora_export.engine.facts import find_engine
from teamlora_export.engine.toolchain import find_toolchain
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of


@pytest.fixture(scope="module")
def emulated_model(smollm2, cpp_project, tmp_path_factory) -> Path:
    """Of the bundle's own graph, as `trt` builds engines; others here give the logits of the last token alone."""
    model = Path(shutil.copytree(cpp_project / "model", tmp_path_factory.mktemp("emulated") / "model"))
    shutil.copyfile(smollm2.model, model / "model.onnx")
    return as_engine(model)


def test_the_tensorrt_back_end_gives_pytorchs_text_on_an_emulated_engine(emulated_model, cpp_programs, smollm2_greedy):
    prompts, answers = list(smollm2_greedy), list(smollm2_greedy.values())
    assert generate(cpp_programs / "emulated_runner", emulated_model, [prompts[1]], GREEDY_TOKENS) == [answers[1]]
    found, told = generate_and_tell(
        cpp_programs / "emulated_runner", emulated_model, [*prompts, prompts[0]], GREEDY_TOKENS
    )
    assert found == [*answers, answers[0]]
    # All steps but the first run of the engine for the shape: that one is not recorded.
    assert launches(told) >= max(map(len, answers)) - 2


def test_recorded_steps_serve_requests_of_their_own_batch_and_length_alone(cpp_project, emulated_model, cpp_programs):
    assert_same_answers(cpp_programs, cpp_project / "model", emulated_model, 8)


def test_steps_that_were_recorded_for_a_cache_in_place_end_with_their_memory(cpp_programs, both_caches, tmp_path):
    """Logits of all tokens: a longer prompt takes other memory for them."""
    engine = as_engine(Path(shutil.copytree(both_caches[0], tmp_path / "model")), capacity=64)
    assert_same_answers(cpp_programs, both_caches[1], engine, 200)


def assert_same_answers(cpp_programs: Path, model: Path, engine: Path, count: int) -> None:
    """Of `model` on ONNX Runtime and `engine` on the emulated TensorRT, one by one and on eight threads."""
    found = (run(cpp_programs / "requests", model, count), run(cpp_programs / "emulated_requests", engine, count))
    for done in found:
        assert done.returncode == 0, done.stdout + done.stderr
    assert found[0].stdout.splitlines()[0] == found[1].stdout.splitlines()[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_engine_whose_cache_is_in_place_reads_long_prompts_in_parts(
    architecture, cpp_programs, make_bundle, rng, tmp_path
):
    """The emulated prefill profile takes 300 tokens at most; the shorter rows of a batch are padding in the first
    parts, and a last part may be one token."""
    growing = endless(make_bundle(architecture), tmp_path / "growing")
    engine = as_engine(endless(make_bundle(architecture, cache="in-place"), tmp_path / "in-place"), capacity=1140)
    lengths = ([3], [301], [1100, 3, 600])
    for prompts in ([rng.integers(3, 384, length).tolist() for length in batch] for batch in lengths):
        expected = generate(cpp_programs / "deployed" / "runner", growing, prompts, 40)
        assert all(len(answer) == 40 for answer in expected)
        found, told = generate_and_tell(cpp_programs / "emulated_runner", engine, prompts, 40)
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
def test_a_part_sees_all_that_was_read_before_it(architecture, cpp_programs, make_bundle, rng, tmp_path):
    """Logits, since a random model's next token depends on little more than its last one. The reference reads all at
    once; float32 differs by 2e-7 then, and a part that sees itself alone by 0.1."""
    engine = as_engine(endless(make_bundle(architecture, cache="in-place"), tmp_path / "model"), capacity=64)
    ids, mask = rng.integers(3, 384, (3, 33)), np.ones((3, 33), np.int64)
    for row, padding in enumerate((0, 25, 9)):
        mask[row, :padding] = 0
    parts = (9, 1, 12, 8, 1, 1, 1)
    found = decode(cpp_programs / "decoder", engine, 33, ids, mask, parts)
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


def test_a_cache_that_is_full_is_refused_before_the_engine_is_called(cpp_programs, both_caches, make_bundle, tmp_path):
    """`generate` asks for room first; a program of one's own may not."""
    engine = as_engine(Path(shutil.copytree(both_caches[0], tmp_path / "in-place")), capacity=40)
    assert [len(row) for row in generate(cpp_programs / "emulated_runner", engine, [[7] * 30], 10)] == [10]
    told = run(cpp_programs / "emulated_runner", "--model", engine, "--ids", "--tokens", 11, input="7 " * 30)
    assert (told.returncode, told.stdout) == (2, "")
    assert "The engine was built for 40 tokens, this request needs 41. Build it with other --shapes." in told.stderr

    def fill(model: Path) -> tuple[int, str]:
        """A cache for 9 tokens: how many it takes, 5 and then one at a time, and what it says then."""
        ids, mask = np.full((1, 300), 7), np.ones((1, 300), np.int64)
        lines = decode(cpp_programs / "decoder", model, 9, ids, mask, [5] + [1] * 295)
        return 5 + len(lines) - 2, lines[-1]

    assert fill(engine) == (40, "The cache has room for 40 tokens, and this would be 41.")
    fixed = as_engine(Path(shutil.copytree(both_caches[1], tmp_path / "fixed")))
    assert fill(fixed) == (256, "The cache has room for 256 tokens, and this would be 257.")
    growing = as_engine(endless(make_bundle("mistral"), tmp_path / "mistral"))
    assert fill(growing) == (9, "The cache has room for 9 tokens, and this would be 10.")


def test_a_request_that_finds_no_memory_leaves_no_recorded_step_of_memory_that_is_gone(
    cpp_programs, both_caches, tmp_path
):
    """The logits of 20 tokens are refused their memory; the next request begins with a step."""
    engine = as_engine(Path(shutil.copytree(both_caches[0], tmp_path / "model")), capacity=64)
    ids, mask = np.full((1, 20), 7), np.ones((1, 20), np.int64)
    few = {**os.environ, "EMULATED_LARGEST": str(10 * 384 * 4)}
    found = decode(cpp_programs / "decoder", engine, 30, ids, mask, [1, 0, 4, 1, 1, 1, 0, 20, 0, 1], env=few)
    assert found[5] == "No memory on the GPU: an emulated error."
    assert found[6] == found[0]
    assert len(found) == 7


@pytest.mark.parametrize("fault", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("cache", ["growing", "in-place"])
@pytest.mark.parametrize("architecture", ["qwen2", "mistral"])
def test_no_request_sees_what_a_request_with_nan_has_left(
    architecture, cache, fault, cpp_programs, make_bundle, tmp_path
):
    """Masked rows of a cache are multiplied by zero, which leaves NaN: in a cache of fixed length, in a growing one, in
    one that is in place."""
    model = deploy_cpp(make_bundle(architecture, cache=cache), tmp_path / "project") / "model"
    poison(model, 383, fault)
    alone = run(cpp_programs / "requests", model, 20)
    after = run(cpp_programs / "requests", model, 20, 383)
    engine = as_engine(model, 128 if cache == "in-place" else None)
    emulated = run(cpp_programs / "emulated_requests", engine, 20, 383)
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
    architecture, cache, cpp_programs, make_bundle, tmp_path
):
    """Python's text, which is PyTorch's: models that learn their positions see whether padding is counted."""
    bundle = make_bundle(architecture, cache=cache)
    model = deploy_cpp(bundle, tmp_path / "project") / "model"
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15]]
    expected = Model(bundle.folder).generate(prompts, 40)
    assert generate(cpp_programs / "deployed" / "runner", model, prompts, 40) == expected
    alone = run(cpp_programs / "requests", model, 100)
    engine = as_engine(model, 128 if cache == "in-place" else None)
    assert generate(cpp_programs / "emulated_runner", engine, prompts, 40) == expected
    done = run(cpp_programs / "emulated_requests", engine, 100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == alone.stdout.splitlines()[0]
    grows = cache == "growing" and architecture in ("mistral", "gemma2", "gemma3")
    assert (launches(done.stderr) == 0) == grows


@pytest.fixture(scope="module")
def made(make_bundle, tmp_path_factory) -> Path:
    """The folder of a bundle with an engine in float16."""
    folder = Path(shutil.copytree(make_bundle("llama").folder, tmp_path_factory.mktemp("made") / "bundle"))
    build_engine(read_bundle(folder), BuildOptions(dtype="fp16", runtime="rtx", capabilities=("8.9",)), None)
    return folder


@pytest.fixture
def bundle(made, tmp_path) -> Bundle:
    """A copy of it."""
    return read_bundle(shutil.copytree(made, tmp_path / "bundle"))


def test_the_tensorrt_project_is_compiled_linked_and_runs_up_to_the_missing_driver(bundle, plugin, tmp_path):
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
    unlisted = run(runner, "--ids", cwd=project, input="1\n")
    assert f"does not list plugins/{library.name}" in unlisted.stderr
    other = run(runner, "--ids", "--no-check", cwd=project, input="1\n")
    assert f"{library.name}: was built with the headers of TensorRT {plugin.tensorrt}, and this is 1." in other.stderr
    shutil.rmtree(library.parent)
    assert "there is no such engine" in run(runner, "--ids", "--engine", "other", cwd=project, input="1\n").stderr
    with (project / "model" / "engines" / "fp16-rtx.engine").open("r+b") as file:
        file.write(b"\1")
    refused = run(runner, "--ids", cwd=project, input="1\n")
    assert "fp16-rtx.engine: is not the file that belongs here" in refused.stderr
    for path in (project / "model").rglob("*"):
        if path.suffix == ".json":
            # Nor where the bundle lay when the engine was built.
            assert str(tmp_path.parent) not in path.read_text(), path
    with pytest.raises(ExportError, match="no engine of that name"):
        deploy_cpp(bundle, tmp_path / "other", engine="none")


def test_an_engine_and_a_plugin_that_do_not_belong_are_refused(bundle, plugin, tmp_path):
    engine = find_engine(bundle, "fp16-rtx")
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
