"""The native op in ONNX Runtime: that it is what runs, that it computes the definition, and what is refused.

The sweep tries the kernels themselves over many shapes, with each instruction set that this processor has, against
bounds that follow from the definition; here they run inside ONNX Runtime.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import ROOT
from formula import FAMILIES, by_definition, by_formula, make_projection, random_projection
from get_libraries import get_libraries
from graph.test_op import feeds_of, one_node_model
from typer.testing import CliRunner

from teamlora_export.cli import app
from teamlora_export.deploy.runner import Model
from teamlora_export.engine import onnxruntime_library
from teamlora_export.engine.onnxruntime_library import (
    LIBRARY_NAME,
    OnnxRuntimeLibrary,
    build_library,
    check_library,
    find_include,
    kept_library,
    library_here,
    read_library,
)
from teamlora_export.engine.toolchain import find_toolchain
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.inspect import inspect_plugin

# One rounding of y, and of z and v before it; sums of some ten products.
TOLERANCE = {ir.DataType.FLOAT: 8 * 2.0**-24, ir.DataType.FLOAT16: 3 * 2.0**-11, ir.DataType.BFLOAT16: 3 * 2.0**-8}


@pytest.fixture(scope="module")
def library() -> OnnxRuntimeLibrary:
    """scripts/test builds it before the tests."""
    return build_library()


def open_model(model: ir.Model | Path, library: Path | None, profile: Path | None = None):  # type: ignore[no-untyped-def]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    if library is not None:
        options.register_custom_ops_library(str(library))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    content = model if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, ["CPUExecutionProvider"])


def kernels_run(session: ort.InferenceSession) -> Counter[str]:
    """How often each kernel ran, from the session's profile."""
    events = json.loads(Path(session.end_profiling()).read_text())
    return Counter(e["args"]["op_name"] for e in events if e["cat"] == "Node" and "op_name" in e["args"])


def run_one(session: ort.InferenceSession, feeds: dict[str, np.ndarray], dtype: ir.DataType) -> np.ndarray:
    """y in float64. NumPy has no bfloat16, so values of it are handed over and taken back by their bits."""
    binding = session.io_binding()
    held = []
    for name, array in feeds.items():
        kind = 1 if name == "mix" else dtype.value
        plain = array if array.dtype == np.float32 else array.view(np.uint16)
        held.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(plain), kind))
        binding.bind_ortvalue_input(name, held[-1])
    y = np.zeros(feeds["base"].shape, feeds["base"].dtype)
    plain = y if y.dtype == np.float32 else y.view(np.uint16)
    out = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(plain, dtype.value)
    binding.bind_ortvalue_output("y", out)
    session.run_with_iobinding(binding)
    return y.astype(np.float64)


@pytest.mark.parametrize(("build", "cases"), [("plain", 500), ("sanitized", 120), ("threads", 120)])
def test_kernels_of_every_instruction_set_compute_the_definition(programs, build, cases):
    command = [programs / "onnxruntime" / f"cpu_sweep_{build}", "--cases", str(cases)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


@pytest.mark.skipif(
    platform.machine() == "aarch64" or None in (ARM_COMPILER, QEMU),
    reason="needs apt-get install g++-aarch64-linux-gnu qemu-user-static",
)
def test_kernels_for_arm_compute_the_definition_in_an_emulator(tmp_path):
    """The library is linked as well, and refused on this processor."""
    configure = [
        *("cmake", "-S", ROOT / "plugins" / "onnxruntime", "-B", tmp_path, f"-DCMAKE_CXX_COMPILER={ARM_COMPILER}"),
        *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"),
        *("-DTEAMLORA_TESTS=ON", f"-DCUDA_INCLUDE_DIR={find_toolchain().cuda_include}"),
        f"-DONNXRUNTIME_INCLUDE_DIR={find_include() or get_libraries() / 'include' / 'onnxruntime'}",
    ]
    build = ["cmake", "--build", tmp_path, "--target", "teamlora_onnxruntime", "cpu_sweep_plain"]
    for command in (configure, build, [QEMU, tmp_path / "cpu_sweep_plain", "--cases", "60"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    assert "60 cases, 0 failures; neon portable" in result.stdout
    with pytest.raises(ExportError, match=r"is built for aarch64, this machine is \w+"):
        read_library(tmp_path / LIBRARY_NAME)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_native_op_runs_in_place_of_the_body_and_computes_the_formula(library, family, dtype, rng, tmp_path):
    assert_computes_the_formula(library.path, family, dtype, (1, 0, 9, 200), rng, tmp_path)


def assert_computes_the_formula(
    library: Path, family: str, dtype: ir.DataType, calls: tuple[int, ...], rng: np.random.Generator, folder: Path
) -> None:
    """The op of `library`, and no body, in calls of so many tokens."""
    widths = [33, 5, 7]
    projections = [random_projection(rng, family, d_out=width) for width in widths]
    model = one_node_model(widths, projections[0].num_experts, projections[0].shared_down, dtype)
    session = open_model(model, library, folder / "profile")
    for tokens in calls:
        x, base = rng.normal(size=(2, tokens, 7)), rng.normal(size=(2, tokens, sum(widths)))
        feeds = feeds_of(projections, x, base, dtype)
        kept = feeds["base"].copy()
        found = run_one(session, feeds, dtype)
        parts = np.split(kept.astype(np.float64), np.cumsum(widths)[:-1], axis=-1)
        exact = feeds["x"].astype(np.float64)
        expected = np.concatenate([by_formula(*each) for each in zip(projections, [exact] * 3, parts, strict=True)], -1)
        assert found.shape == expected.shape
        limit = TOLERANCE[dtype] * 8 / min(p.normalizer_floor for p in projections)
        assert (np.abs(found - expected) <= limit * np.abs(expected).max(initial=1)).all()
        assert (feeds["base"] == kept).all(), "y took the place of a base that is the caller's"
    assert kernels_run(session) == {op.NAME: len(calls)}


@pytest.mark.parametrize("weights", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_weights_of_16_bits_beside_float32_are_read_as_they_are(library, weights, shared, rng, tmp_path):
    projections = [make_projection(rng, 4, 3, shared, 70, width) for width in (33, 5)]
    model = one_node_model([33, 5], 4, shared, ir.DataType.FLOAT, weights)
    feeds = feeds_of(projections, rng.normal(size=(1, 1, 70)), rng.normal(size=(1, 1, 38)), ir.DataType.FLOAT)
    for value in list(model.graph.inputs)[2:]:
        array = feeds[value.name].astype(value.dtype.numpy())
        feeds[value.name] = array
        model.graph.inputs.remove(value)
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    session = open_model(model, library.path, tmp_path / "profile")
    for tokens in (1, 7, 130):
        feeds |= {
            "x": rng.normal(size=(1, tokens, 70)).astype(np.float32),
            "base": rng.normal(size=(1, tokens, 38)).astype(np.float32),
        }
        found = session.run(None, {name: feeds[name] for name in ("x", "base")})[0]
        low, high = by_definition(feeds, 4, shared, [33, 5], rounds_product=False)
        assert ((found >= low) & (found <= high)).all()
    assert kernels_run(session) == {op.NAME: 3}


def test_weights_inside_the_model_are_packed_once_and_give_the_same(library, rng):
    projections = [random_projection(rng, "teamlora", d_out=width) for width in (20, 3)]
    model = one_node_model([20, 3], 4, False, ir.DataType.FLOAT)
    feeds = feeds_of(projections, rng.normal(size=(1, 5, 7)), rng.normal(size=(1, 5, 23)), ir.DataType.FLOAT)
    given = open_model(model, library.path).run(None, feeds)[0]
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(feeds[value.name], name=value.name)
        value.shape = ir.Shape(feeds[value.name].shape)
        model.graph.register_initializer(value)
    inside = open_model(model, library.path).run(None, {name: feeds[name] for name in ("x", "base")})[0]
    assert (inside == given).all()


def test_nan_and_infinity_stay_with_their_token_as_in_the_body(library, rng):
    projection = random_projection(rng, "teamlora", d_out=40)
    model = one_node_model([40], 4, False, ir.DataType.FLOAT)
    x, base = rng.normal(size=(1, 60, 7)), rng.normal(size=(1, 60, 40))
    x[0, 3, 2], x[0, 17, 0], base[0, 30, 5] = np.nan, np.inf, np.inf
    feeds = feeds_of([projection], x, base, ir.DataType.FLOAT)
    native, body = (open_model(model, which).run(None, feeds)[0] for which in (library.path, None))
    assert (np.isfinite(native) == np.isfinite(body)).all()
    others = np.isfinite(body).all(axis=-1)
    assert others.sum() == 57
    assert np.abs(native[others] - body[others]).max() <= 2.0**-16 * np.abs(body[others]).max()


def test_a_model_gives_the_same_with_and_without_it(library, make_bundle, tmp_path, rng):
    bundle = make_bundle("llama")
    native = open_model(bundle.folder / "model.onnx", library.path, tmp_path / "profile")
    body = open_model(bundle.folder / "model.onnx", None)
    for tokens in (1, 40):
        feeds = {
            "input_ids": rng.integers(0, 384, (2, tokens)),
            "attention_mask": np.ones((2, tokens), np.int64),
            "position_ids": np.tile(np.arange(tokens), (2, 1)),
        }
        for value in native.get_inputs():
            if value.name.startswith("past"):
                feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        expected = body.run(["logits"], feeds)[0]
        found = native.run(["logits"], feeds)[0]
        # Four layers of float32, each of a few hundred sums.
        assert np.abs(found - expected).max() <= 2.0**-16 * np.abs(expected).max()
    assert kernels_run(native)[op.NAME] == 2 * bundle.manifest.op["nodes"]


def test_a_bare_name_is_a_file_of_this_folder(library, make_bundle, monkeypatch):
    """The loader would look for it in the system's folders."""
    monkeypatch.chdir(library.path.parent)
    bundle = make_bundle("llama")
    native = Model(bundle.folder, Path(library.path.name))
    assert native.generate([[5, 6, 7]], 4) == Model(bundle.folder).generate([[5, 6, 7]], 4)


def test_eight_threads_in_two_sessions_do_not_disturb_each_other(library, rng):
    """Calls of about a millisecond, so that they do meet."""
    projections = [make_projection(rng, 4, 8, False, 512, width) for width in (512, 128)]
    sessions = [open_model(one_node_model([512, 128], 4, False, ir.DataType.FLOAT), library.path) for _ in range(2)]
    requests = [
        feeds_of(projections, rng.normal(size=(1, tokens, 512)), rng.normal(size=(1, tokens, 640)), ir.DataType.FLOAT)
        for tokens in range(8, 136, 16)
    ]
    alone = [sessions[0].run(None, feeds)[0] for feeds in requests]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            together = pool.map(lambda i: sessions[i % 2].run(None, requests[i])[0], range(8))
            assert all((found == expected).all() for found, expected in zip(together, alone, strict=True))


def test_sizes_that_do_not_fit_are_refused_in_words(library, rng):
    assert_refuses_sizes_in_words(library.path, rng)


def test_widths_whose_sum_is_no_number_any_more_are_refused(library):
    """Four of them are 64 in 64 bits."""
    model = one_node_model([16] * 4, 4, False, ir.DataType.FLOAT)
    for node in model.graph:
        node.attributes["out_splits"] = ir.AttrInt64s("out_splits", [(1 << 62) + 16] * 4)
    with pytest.raises(Exception, match=r"out_splits \[4611686018427387920, "):
        open_model(model, library.path)


def assert_refuses_sizes_in_words(library: Path, rng: np.random.Generator) -> None:
    session = open_model(one_node_model([6], 4, False, ir.DataType.FLOAT), library)
    good = feeds_of(
        [random_projection(rng, "teamlora")], rng.normal(size=(1, 2, 7)), np.zeros((1, 2, 6)), ir.DataType.FLOAT
    )
    for name, shape, words in (
        ("x", (1, 2, 8), r"x is \[1, 2, 8\], expected a last dimension of 7"),
        ("base", (1, 3, 6), r"base is \[1, 3, 6\], expected \[1, 2, 6\]"),
        ("down", (13, 7), r"down is \[13, 7\], expected \[12, 7\]"),
        ("up", (7, 6), r"up is \[7, 6\], expected two dimensions, the first a multiple of num_experts 4"),
        ("mix", (1, 4, 3), r"mix is \[1, 4, 3\], expected \[1, 4, 4\]"),
    ):
        with pytest.raises(Exception, match=words):
            session.run(None, {**good, name: np.zeros(shape, np.float32)})


def test_the_library_says_what_it_is_and_what_does_not_fit_is_refused(library, tmp_path, monkeypatch):
    check_library(library)
    assert library.op == f"{op.DOMAIN}::{op.NAME}"
    assert library.instructions[-1] == "portable"
    other = tmp_path / "other.so"
    shutil.copyfile(library.path, other)
    with other.open("r+b") as file:
        file.seek(18)
        file.write((243).to_bytes(2, "little"))
    with pytest.raises(ExportError, match=r"is built for another processor, this machine is \w+"):
        read_library(other)
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ExportError, match="not a library of teamlora-export's op"):
        read_library(tmp_path / "text.so")
    with pytest.raises(ExportError, match="no such file"):
        read_library(tmp_path / "none.so")
    monkeypatch.setattr(onnxruntime_library, "_onnxruntime_version", lambda: (1, 20))
    with pytest.raises(ExportError, match=r"needs ONNX Runtime 1\.21 or newer, 1\.20 is installed"):
        check_library(library)


def test_the_library_that_commands_take_is_described_without_being_named(library, tmp_path, monkeypatch):
    assert inspect_plugin(None, onnxruntime=True).fields["path"] == str(library.path)
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    done = CliRunner().invoke(app, ["plugins", "info", "--onnxruntime"])
    assert str(done.exception).endswith("plugins build --onnxruntime")
    # A carried one that does not fit is the reason, and `bench` gives it.
    carried = tmp_path / "carried.so"
    shutil.copyfile(library.path, carried)
    monkeypatch.setattr(onnxruntime_library, "carried_path", lambda: carried)
    monkeypatch.setattr(onnxruntime_library, "library_sources_sha256", lambda: "0" * 16)
    with pytest.raises(ExportError, match="was built from other sources"):
        library_here()


def test_a_kept_library_that_cannot_be_loaded_is_built_again(library, tmp_path, monkeypatch):
    """One for a newer C library, or a damaged one, would otherwise stand in the way of every build."""
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    kept = tmp_path / "plugins" / library.path.parent.name / library.path.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(library.path.read_bytes()[:4096])
    assert kept_library() is None

    def compile_nothing(folder: Path, *_: object) -> None:
        shutil.copyfile(library.path, folder / library.path.name)

    tools = onnxruntime_library._Tools("cmake", tmp_path, library.onnxruntime_api, None)
    monkeypatch.setattr(onnxruntime_library, "_find_tools", lambda cuda: tools)
    monkeypatch.setattr(onnxruntime_library, "_compile", compile_nothing)
    assert build_library().path == kept
    assert kept_library() == build_library() == replace(library, path=kept)


def test_what_is_missing_for_a_build_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(tmp_path))
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    with pytest.raises(ExportError, match=r"onnxruntime_cxx_api\.h: set ONNXRUNTIME_INCLUDE_DIR"):
        build_library()
