"""Engines of tiny models, built by TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from conftest import list_again

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.cli import _WrongUsage as WRONG_USAGE
from teamlora_export.cli import app
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.engine.build import BuildOptions, build_engine
from teamlora_export.engine.facts import EngineFacts, facts_path, find_engine, read_facts, write_engine
from teamlora_export.engine.prepare import slot_inputs, write_graph
from teamlora_export.engine.profiles import make_profiles
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import make_cases
from teamlora_export.validate.engine_runner import cases_within

RTX = BuildOptions(runtime="rtx", capabilities=("8.9",))


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teamlora_export.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture
def bundle(make_bundle, tmp_path) -> Bundle:
    """A copy of the tiny Llama's bundle."""
    return read_bundle(shutil.copytree(make_bundle("llama").folder, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def made(make_bundle, tmp_path_factory) -> Path:
    """The folder of the tiny Llama's bundle with its engine."""
    folder = tmp_path_factory.mktemp("made") / "bundle"
    build_engine(read_bundle(shutil.copytree(make_bundle("llama").folder, folder)), RTX)
    return folder


@pytest.fixture
def built(made, tmp_path) -> tuple[Bundle, Path]:
    """A copy of that bundle, and its engine."""
    bundle = read_bundle(shutil.copytree(made, tmp_path / "bundle"))
    return bundle, find_engine(bundle, "fp32-rtx")


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "phi3", "glm", "bert", "modernbert"])
def test_architectures_of_every_kind_become_float16_engines(name, make_bundle, tmp_path):
    options = BuildOptions(dtype="fp16", runtime="rtx", capabilities=("8.9",))
    path, facts = build_engine(make_bundle(name), options, tmp_path / "tiny.engine")
    assert read_facts(path) == facts
    assert facts.dtype == "fp16"
    assert facts.targets == ("compute capability 8.9",)
    assert facts.plugin is None, "TensorRT-RTX takes no plugins"
    names = [profile.name for profile in facts.profiles]
    assert names == (["prefill", "decode"] if facts.task == "text-generation" else ["all"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.engine", "tiny.json"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["function", "standard"])
def test_other_dtypes_and_inlined_bundles_too(dtype, form, make_bundle, tmp_path):
    options = BuildOptions(dtype=dtype, runtime="rtx")
    _, facts = build_engine(make_bundle("llama", op_form=form), options, tmp_path / "tiny.engine")
    assert facts.dtype == dtype
    assert "compute capability 8.9" in facts.targets, "with no GPU, an engine is for all that RTX knows"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_cache_in_place_becomes_an_engine_of_one_capacity_that_takes_prompts_in_parts(
    dtype, make_bundle, make_base, tmp_path
):
    bundle = make_bundle("llama", cache="in-place")
    options = dataclasses.replace(RTX, dtype=dtype, shapes="1x1,1x16,4x64")
    path, facts = build_engine(bundle, options, tmp_path / "tiny.engine")
    assert (facts.capacity, read_facts(path).capacity) == (64, 64)
    prefill, decode = facts.profiles
    assert prefill.inputs["past_key_values.0.key"] == ((1, 2, 64, 8), (1, 2, 64, 8), (4, 2, 64, 8))
    part = {"input_ids": (2, 5), "attention_mask": (2, 40), "position_ids": (2, 5)}
    caches = {name: (2, 2, 64, 8) for name in prefill.inputs if name.startswith("past_key_values.")}
    assert prefill.accepts(part | caches)
    assert not decode.accepts(part | caches)
    assert not prefill.accepts({**part, "attention_mask": (2, 65), **caches})
    cases = make_cases(make_base("llama").config, "text-generation")
    assert cases_within(cases, facts.profiles) == cases, "prompts that are read in parts as well"
    readme = (deploy_cpp(bundle, tmp_path / "out", engine=str(path)) / "README.md").read_text()
    assert "Its cache is in place: buffers of 64 tokens" in readme


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_rings_become_buffers_of_the_whole_capacity_in_an_engine(name, make_bundle, tmp_path):
    options = dataclasses.replace(RTX, dtype="fp16", shapes="1x1,1x16,4x64")
    path, facts = build_engine(make_bundle(name, cache="in-place"), options, tmp_path / "tiny.engine")
    assert (facts.capacity, read_facts(path).capacity) == (64, 64)
    caches = {most for profile in facts.profiles for key, (*_, most) in profile.inputs.items() if key[:4] == "past"}
    assert caches == {(4, 2, 64, 8)}


def test_without_a_cache_in_place_an_engine_has_no_capacity(make_bundle, tmp_path):
    assert as_facts(make_bundle("llama"), tmp_path / "a.engine").capacity is None
    assert as_facts(make_bundle("bert"), tmp_path / "b.engine").capacity is None


def test_the_command_line_builds_into_the_bundle_and_inspect_tells_of_it(bundle):
    built = run("trt", bundle.folder, "--fp16", "--compute-capability", "8.9,12.0", "--shapes", "1x1,1x16,2x64")
    assert built.returncode == 0, built.stderr
    engine = find_engine(bundle, "fp16-rtx")
    assert f"{engine}: fp16" in built.stdout
    assert "Re-typing fp32 to fp16" in built.stderr
    told = run("inspect", engine).stdout
    assert "[1, 1] / [1, 16] / [2, 64]" in told
    assert "compute capability 12.0" in told
    assert sorted(path.name for path in engine.parent.iterdir()) == ["fp16-rtx.engine", "fp16-rtx.json"]


def test_an_engine_is_judged_on_a_gpu_only(built):
    bundle, path = built
    result = run("validate", bundle.folder, "--engine", path.stem)
    assert result.returncode == 2
    assert "runs on a GPU, and there is none here" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fp16", "--bf16"], "--fp16 and --bf16 exclude each other"),
        (["--runtime", "cuda"], "--runtime cuda: unknown"),
        (["--runtime", "tensorrt"], "tensorrt is not installed: pip install"),
        (["--runtime", "rtx", "--compute-capability", "1.0"], "does not build for it. It knows 8.0"),
        (["--runtime", "rtx", "--compute-capability", "8.9,8.9"], "names one twice"),
        (["--shapes", "1x1,1x8"], "give BATCHxTOKENS three times"),
        (["--shapes", "1x9,1x8,1x16"], "ordered: at least, best, at most"),
        (["--shapes", "1x1,1x8,1x4096"], "4096 tokens, but the model has 128 positions"),
        (["-o", "engine.plan"], "ends in .engine"),
        (["--runtime", "rtx", "--arch", "89"], "--arch: this engine has no plugin"),
        (["--plugin", "some.so"], "--plugin: this engine has no plugin"),
        (["--plugin", "some.so", "--arch", "89"], "exclude each other"),
        (["--runtime", "rtx", "--plugin", "auto"], "--plugin: this engine has no plugin"),
        (["--plugin", "auto", "--no-plugin"], "exclude each other"),
        (["--plugin", "auto", "--strip-weights"], "leaves none that runs"),
        (["--refit"], "builds such engines on a GPU"),
        (["--strip-weights"], "builds such engines on a GPU"),
    ],
)
def test_wrong_options_are_refused_and_write_nothing(arguments, message, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ExportError, WRONG_USAGE)) as refusal:
        app(["trt", str(bundle.folder), *arguments], standalone_mode=False)
    assert message in str(refusal.value)
    assert not (bundle.folder / "engines").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_graph_that_tensorrt_refuses_is_its_message_and_no_file(bundle):
    import onnx_ir as ir

    model = ir.load(bundle.model)
    node = next(node for node in model.graph if node.op_type == "MatMul")
    node.op_type = "NoSuchOperator"
    ir.save(model, bundle.model)
    list_again(bundle.folder)
    result = run("trt", bundle.folder, "--runtime", "rtx")
    assert result.returncode == 2
    assert "cannot take the graph" in result.stderr
    assert f"{node.name.rpartition('/')[0]}/NoSuchOperator (NoSuchOperator)" in result.stderr
    assert not (bundle.folder / "engines").exists()


def test_changed_files_are_refused(built):
    bundle, path = built
    with pytest.raises(ExportError, match=r"no engine of that name.*There are: fp32-rtx"):
        find_engine(bundle, "other")
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        read_facts(path)
    fields = json.loads(facts_path(path).read_text())
    facts_path(path).write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(ExportError, match=r"format version 99, this tool reads up to \d+\."):
        read_facts(path)
    facts_path(path).unlink()
    with pytest.raises(ExportError, match="pair of files"):
        read_facts(path)
    with bundle.data.open("r+b") as file:
        file.write(b"1234")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        build_engine(bundle, RTX)


# The command, which gets a signal while TensorRT builds; TensorRT does not go on before the process ends.
INTERRUPTED = """
import os, signal, time
from teamlora_export import cli
from teamlora_export.engine.progress import BuildProgress

def interrupted(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)

BuildProgress.start = interrupted
cli.main()
"""


def test_an_interrupted_build_leaves_the_old_engine(built):
    bundle, path = built
    before = path.read_bytes()
    command = [sys.executable, "-c", INTERRUPTED, "trt", str(bundle.folder), "--runtime", "rtx"]
    # Were TensorRT waited for, it would not end.
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Parsing the graph: " in done.stderr
    assert "Interrupted; nothing was written." in done.stderr
    assert "Building for" not in done.stderr
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["fp32-rtx.engine", "fp32-rtx.json"]


def test_profiles_take_what_a_validation_runs_and_say_what_they_refuse(make_bundle, make_base):
    bundle = make_bundle("llama")
    prefill, decode = make_profiles(bundle, None)
    cases = make_cases(make_base("llama").config, "text-generation")
    whole = [case for case in cases if not case.part]
    assert cases_within(cases, (prefill, decode)) == whole, "a prompt in parts needs a prefill against a cache"
    small = make_profiles(bundle, "1x1,1x8,1x16")
    assert [case.name for case in cases_within(cases, small)] == ["one token"]
    shapes = {name: points[1] for name, points in decode.inputs.items()}
    assert decode.accepts(shapes)
    too_long = decode.refusal({**shapes, "past_key_values.0.key": (1, 2, 500, 8)})
    assert too_long == (
        "past_key_values.0.key is [1, 2, 500, 8], the profile 'decode' takes [1, 2, 0, 8] to [4, 2, 127, 8]"
    )


def test_only_engines_that_we_wrote_are_replaced_and_leftovers_go(built, tmp_path):
    bundle, path = built
    facts = read_facts(path)
    (path.parent / ".fp32-rtx.engine.00000000.teamlora-partial").mkdir()
    (path.parent / ".fp32-rtx.engine.00000001.teamlora-partial").write_bytes(b"killed")
    write_engine(b"another", dataclasses.replace(facts, sha256=hashlib.sha256(b"another").hexdigest()), path)
    assert read_facts(path).sha256 != facts.sha256
    assert sorted(file.name for file in path.parent.iterdir()) == ["fp32-rtx.engine", "fp32-rtx.json"]
    for name, content in (("x.engine", b"theirs"), ("y.json", b'{"mine": 1}'), ("y.engine", b"theirs")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match=rf"{name}: exists and is not an engine that teamlora-export wrote"):
            build_engine(bundle, RTX, (tmp_path / name).with_suffix(".engine"))
        assert (tmp_path / name).read_bytes() == content
        (tmp_path / name).unlink()
    path.write_bytes(b"put here by its owner")
    with pytest.raises(ExportError, match="exists and is not an engine"):
        build_engine(bundle, RTX)
    assert path.read_bytes() == b"put here by its owner"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"profiles": [{"name": "a", "inputs": {"input_ids": [[1], [2]]}}]}, "length 3"),
        ({"profiles": 3}, "Expected `array`, got `int`"),
        ({"targets": [1]}, "Expected `str`, got `int`"),
        ({"plugin": {"op": 1}}, "Expected `str`, got `int`"),
        ({"size": "big"}, "Expected `int`, got `str`"),
        ({"sha256": None}, "Expected `str`, got `null`"),
        ({"runtime": "cuda"}, "matching regex"),
        ({"refit_weights": {"a": []}}, "Expected `str`, got `array`"),
    ],
)
def test_facts_with_a_field_of_another_type_are_refused(fields, reason, make_bundle, tmp_path):
    engine = tmp_path / "tiny.engine"
    facts = dataclasses.asdict(as_facts(make_bundle("llama"), engine))
    facts_path(engine).write_text(json.dumps({**facts, **fields}))
    with pytest.raises(ExportError, match=reason) as refusal:
        read_facts(engine)
    assert str(facts_path(engine)) in str(refusal.value)


def test_the_times_that_decided_on_the_plugin_are_kept_and_told(make_bundle, tmp_path):
    engine = tmp_path / "tiny.engine"
    times = {"plugin": 1e-3, "inlined": 2e-3}
    write_engine(b"engine", dataclasses.replace(as_facts(make_bundle("llama"), engine), plugin_times=times), engine)
    assert read_facts(engine).plugin_times == times
    assert "1,000 us with the plugin, 2,000 us with the op's body" in run("inspect", engine).stdout


def as_facts(bundle: Bundle, engine: Path) -> EngineFacts:
    """Facts of a file that is written as if it were an engine."""
    write_engine(
        b"engine",
        facts := EngineFacts(
            runtime="rtx",
            runtime_version="1.7",
            targets=("compute capability 8.9",),
            task=bundle.manifest.task,
            dtype="fp32",
            profiles=make_profiles(bundle, None),
            plugin=None,
            model_sha256=bundle.manifest.sha256,
            adapter_sha256=bundle.manifest.adapter["sha256"],
            refit_weights=None,
            stripped=False,
            size=6,
            sha256=hashlib.sha256(b"engine").hexdigest(),
            tool_version="0.1.0",
        ),
        engine,
    )
    return facts


def test_adapters_of_a_shelf_are_inputs_of_the_engine(make_shelf, tmp_path):
    """Slots of one size and an index for each row, of which nothing is in the engine: no rebuild and no refit for a
    swap. Its body is what TensorRT-RTX takes, and our programs bind them."""
    bundle = make_shelf()
    path, facts = build_engine(bundle, dataclasses.replace(RTX, shapes="1x1,2x16,4x64"), tmp_path / "tiny.engine")
    assert (facts.slots, facts.format_version) == (3, 2)
    assert read_facts(path) == facts
    slots = {port.name: port.shape for port in slot_inputs(bundle)}
    assert set(slots) == {"adapter", *bundle.manifest.refit["weights"]}
    for profile in facts.profiles:
        assert profile.inputs["adapter"] == ((1,), (2,), (4,))
        assert all(profile.inputs[name] == (shape,) * 3 for name, shape in slots.items() if name != "adapter")
        assert {shape[0] for name, shape in slots.items() if name != "adapter"} == {3}
    for options, words in (
        ({"dtype": "fp16"}, "the adapters of its shelf are in fp32.*Export it with --dtype fp16"),
        ({"refit": True}, "--refit: the adapters of .* are inputs of the engine"),
    ):
        with pytest.raises(ExportError, match=words):
            build_engine(bundle, dataclasses.replace(RTX, **options), tmp_path / "other.engine")
    out = deploy_cpp(bundle, tmp_path / "out", engine=str(path))
    described = json.loads((out / "model" / "deploy.json").read_text())
    shelf = bundle.manifest.shelf["adapters"]
    files = {adapter["file"] for adapter in shelf.values()}
    assert {"engines/tiny.engine", "engines/tiny.json"} | files <= described["files"].keys()
    assert not {"model.onnx", "model.onnx.data"} & described["files"].keys()
    assert (described["format_version"], described["shelf"]["slots"]) == (2, 3)
    readme = (out / "README.md").read_text()
    assert "build/runner --adapter NAME" in readme
    assert "slots are in the GPU's memory" in readme
    gone = out / "model" / sorted(files)[0]
    gone.unlink()
    assert set(publish_shelf(bundle, out)) == shelf.keys()
    assert sha256_of(gone) == described["files"][sorted(files)[0]]
    write_engine(path.read_bytes(), dataclasses.replace(facts, slots=4), path)
    with pytest.raises(ExportError, match=r"is an engine with 4 slots of adapters, and .* has 3. Build it again"):
        deploy_cpp(bundle, out, engine=str(path))


def test_a_graph_of_a_shelf_leaves_slots_to_its_caller(make_shelf, tmp_path):
    """For trtexec: the op's nodes have six inputs and no body, and no input has a default."""
    bundle = make_shelf()
    model = onnx.load(
        write_graph(bundle, "fp32", tmp_path / "graph", for_plugin=True, reporter=Reporter(quiet=True)),
        load_external_data=False,
    )
    nodes = [node for node in model.graph.node if node.op_type == op.NAME]
    inputs = {value.name for value in model.graph.input}
    assert nodes
    assert not model.functions
    assert all(len(node.input) == 6 and set(node.input[2:]) <= inputs for node in nodes)
    assert not inputs & {tensor.name for tensor in model.graph.initializer}
