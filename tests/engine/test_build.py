"""Engines of tiny models, built by TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ARCHITECTURES

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.engine.build import BuildOptions, build_engine
from teamlora_export.engine.facts import facts_path, find_engine, read_facts
from teamlora_export.engine.profiles import make_profiles
from teamlora_export.errors import ExportError
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_becomes_a_float16_engine(name, make_bundle, tmp_path):
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


def test_an_engine_is_judged_on_a_gpu_only(bundle):
    path, _ = build_engine(bundle, RTX)
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
        (["--refit"], "builds such engines on a GPU"),
        (["--strip-weights"], "builds such engines on a GPU"),
    ],
)
def test_wrong_options_are_one_message_and_write_nothing(arguments, message, bundle, tmp_path):
    result = run("trt", bundle.folder, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (bundle.folder / "engines").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_graph_that_tensorrt_refuses_is_its_message_and_no_file(bundle):
    import onnx_ir as ir

    from teamlora_export.bundle import write_manifest
    from teamlora_export.files import sha256_of

    model = ir.load(bundle.model)
    node = next(node for node in model.graph if node.op_type == "MatMul")
    node.op_type = "NoSuchOperator"
    ir.save(model, bundle.model)
    bundle.manifest.sha256["model.onnx"] = sha256_of(bundle.model)  # type: ignore[index]
    write_manifest(bundle.folder, bundle.manifest)
    result = run("trt", bundle.folder, "--runtime", "rtx")
    assert result.returncode == 2
    assert "cannot take the graph" in result.stderr
    assert "NoSuchOperator" in result.stderr
    assert not (bundle.folder / "engines").exists()


def test_changed_files_are_refused(bundle):
    path, _ = build_engine(bundle, RTX)
    with pytest.raises(ExportError, match=r"no engine of that name.*There are: fp32-rtx"):
        find_engine(bundle, "other")
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        read_facts(path)
    fields = json.loads(facts_path(path).read_text())
    facts_path(path).write_text(json.dumps({**fields, "format_version": 99}))
    with pytest.raises(ExportError, match="newer teamlora-export"):
        read_facts(path)
    facts_path(path).unlink()
    with pytest.raises(ExportError, match="pair of files"):
        read_facts(path)
    with bundle.data.open("r+b") as file:
        file.write(b"1234")
    with pytest.raises(ExportError, match="SHA-256 differs"):
        build_engine(bundle, RTX)


def test_an_interrupted_build_leaves_the_old_engine(bundle):
    path, _ = build_engine(bundle, RTX)
    before = path.read_bytes()
    command = [sys.executable, "-m", "teamlora_export.cli", "trt", str(bundle.folder), "--runtime", "rtx"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    for line in process.stderr:  # type: ignore[union-attr]
        if line.startswith("Parsing"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "Interrupted; nothing was written." in errors
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["fp32-rtx.engine", "fp32-rtx.json"]


def test_profiles_take_what_a_validation_runs_and_say_what_they_refuse(make_bundle, make_base):
    bundle = make_bundle("llama")
    prefill, decode = make_profiles(bundle, None)
    cases = make_cases(make_base("llama").config, "text-generation")
    assert cases_within(cases, (prefill, decode)) == cases
    small = make_profiles(bundle, "1x1,1x8,1x16")
    assert [case.name for case in cases_within(cases, small)] == ["one token"]
    shapes = {name: points[1] for name, points in decode.inputs.items()}
    assert decode.accepts(shapes)
    too_long = decode.refusal({**shapes, "past_key_values.0.key": (1, 2, 500, 8)})
    assert too_long == (
        "past_key_values.0.key is [1, 2, 500, 8], the profile 'decode' takes [1, 2, 0, 8] to [4, 2, 127, 8]"
    )
