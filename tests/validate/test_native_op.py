"""Judges bundles as they run with the native op: good ones pass, and a fault of a weight or of the library itself is
located, though a node of the op shows nothing but its sum."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import transformers
from faults import assert_located, judged, plant
from get_libraries import get_libraries
from test_faults import EVERYWHERE, IN_WEIGHTS
from typer.testing import CliRunner

from teamlora_export.bundle import read_bundle
from teamlora_export.cli import app
from teamlora_export.engine import onnxruntime_library
from teamlora_export.engine.onnxruntime_library import OnnxRuntimeLibrary, build_library, find_include
from teamlora_export.engine.plugin import sources_folder
from teamlora_export.errors import ExportError
from teamlora_export.manifest import MANIFEST_NAME
from teamlora_export.validate import local
from teamlora_export.validate.cases import make_cases
from teamlora_export.validate.local import judge_columns
from teamlora_export.validate.stored import adapted_modules

DTYPES = ("fp32", "fp16")


@pytest.fixture(scope="module")
def library() -> OnnxRuntimeLibrary:
    """scripts/test builds it before the tests."""
    return build_library()


@pytest.fixture(scope="module")
def faulty_library(tmp_path_factory) -> Path:
    """A library that mixes the experts of every sibling by the first one's matrix."""
    folder = tmp_path_factory.mktemp("faulty")
    include = find_include() or get_libraries() / "include"
    shutil.copytree(sources_folder(), folder / "plugins")
    code = folder / "plugins" / "kernels" / "cpu" / "code.cpp"
    right, wrong = "job.mix + g * k * k;", "job.mix;"
    assert code.read_text().count(right) == 1
    code.write_text(code.read_text().replace(right, wrong))
    # Compiled in half the time.
    build = folder / "plugins" / "onnxruntime" / "CMakeLists.txt"
    assert build.read_text().count(" -O3 ") == 1
    build.write_text(build.read_text().replace(" -O3 ", " -O1 "))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime_library, "sources_folder", lambda: folder / "plugins")
        patch.setenv("TEAMLORA_EXPORT_CACHE", str(folder / "cache"))
        patch.setenv("ONNXRUNTIME_INCLUDE_DIR", str(include))
        return build_library().path


@pytest.mark.parametrize(
    "bundle",
    [
        ("llama", "fp16"),
        ("gemma2",),
        ("llama", "fp32", "function", "in-place"),
        ("albert", "fp16"),
    ],
    ids="-".join,
)
def test_a_good_bundle_passes_with_the_native_op(bundle, library, make_bundle):
    made = make_bundle(*bundle)
    verdict = judged(made, library=library.path)
    assert verdict.passed, verdict.departure
    assert (verdict.candidate, verdict.library) == ("ONNX Runtime with the native op", library.sha256)
    assert read_bundle(made.folder).manifest.validation["runtime"] == verdict.candidate
    assert verdict.weights == len(made.manifest.recipes) + len(made.manifest.refit["weights"])
    parts = {f"{path}/{part}" for path in adapted_modules(made.manifest) for part in ("input", "base", "experts")}
    for check in verdict.local:
        assert parts <= {judgement.name for judgement in check.judgements}
        assert check.case.startswith("batch of 8")
        # Tolerances have room, as with the body.
        assert check.worst.severity < 0.5, check.worst


def test_a_good_bundle_passes_layer_by_layer_with_the_native_op(library, make_bundle):
    verdict = judged(make_bundle("llama", "fp16"), library=library.path, layer_by_layer=True)
    assert verdict.passed, verdict.departure
    assert verdict.candidate == "ONNX Runtime with the native op"
    assert len(verdict.modules) > 30
    assert verdict.local[0].case.startswith("batch of 8")


@pytest.mark.parametrize("brief", [False, True])
@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_modules_are_judged_on_tokens_enough_for_the_native_ops_way_for_many(task, brief):
    """A prompt of fewer goes another way on a processor of many cores."""
    kernels = sources_folder() / "kernels" / "cpu"
    rows = re.findall(r"kTileRows = (\d+)", (kernels / "vector.h").read_text())
    (tiles,) = re.findall(r"kMostFewTiles = (\d+)", (kernels / "projection.cpp").read_text())
    cases = make_cases(transformers.LlamaConfig(), task, brief=brief, many=True)
    assert max(cases, key=lambda case: len(case.mask)).mask.size >= max(map(int, rows)) * int(tiles)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_in_a_weight_is_located_with_the_native_op(dtype, library, make_bundle, tmp_path):
    verdict = judged(plant(make_bundle("amplifying", dtype), tmp_path / "bundle", IN_WEIGHTS), library=library.path)
    assert_located(verdict, IN_WEIGHTS)
    for check in ("weights", "modules"):
        assert_located(verdict, IN_WEIGHTS, check)


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fault_of_the_library_is_located_and_not_held_against_the_body(
    dtype, layer_by_layer, faulty_library, make_bundle
):
    bundle = make_bundle("llama", dtype)
    verdict = judged(bundle, library=faulty_library, layer_by_layer=layer_by_layer)
    named = {departure.module for departure in verdict.departures}
    expected = {path for path in adapted_modules(bundle.manifest) if path.endswith(("k_proj", "v_proj", "up_proj"))}
    assert not verdict.passed
    assert named == expected
    for check in verdict.local:
        wrong = {judgement.name for judgement in check.judgements if not judgement.passed}
        assert wrong >= {f"{path}/experts" for path in expected}, "in its own arithmetic, and in float32's"
        assert not [name for name in wrong if name.endswith("/base")]
    assert judged(bundle, layer_by_layer=layer_by_layer).passed


def test_a_fault_of_the_body_is_none_of_the_native_op(library, make_bundle, tmp_path):
    """The bodies are left out: with a library, nothing runs by them."""
    faults = {name: EVERYWHERE[name] for name in ("router not normalised", "M transposed in the body")}
    bundle = plant(make_bundle("llama"), tmp_path / "bundle", faults)
    assert_located(judged(bundle), faults)
    assert judged(bundle, library=library.path).passed


@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_a_small_difference_is_allowed_the_rounding_of_its_sum_and_no_more(error, rng):
    base = rng.normal(size=(200, 8)).astype(np.float32)
    added = 1e-4 * rng.normal(size=base.shape)
    found = (base + added * (1 + error) + error * base).astype(np.float32).astype(np.float64) - base
    rounding = local.FLOOR_OF_SUM * 2.0**-24 * np.sqrt(np.mean(np.square(base), axis=0))
    floor = local.FLOOR["fp32"] * 2.0**-24
    assert not judge_columns("experts", found, added, None, floor).passed, "its own size allows less than the rounding"
    assert judge_columns("experts", found, added, None, floor, rounding).passed == (error == 0)


def test_the_command_says_what_it_judged(library, make_bundle, tmp_path):
    page, figures = tmp_path / "report.html", tmp_path / "figures.json"
    bundle = make_bundle("llama")
    arguments = ["validate", str(bundle.folder), "--library", str(library.path)]
    result = CliRunner().invoke(app, [*arguments, "--report", str(page), "--json", str(figures)])
    assert result.exit_code == 0, result.output
    assert "ONNX Runtime with the native op against PyTorch" in result.output
    assert "Run by ONNX Runtime with the native op." in page.read_text()
    written = json.loads(figures.read_text())
    assert (written["candidate"], written["library"]) == ("ONNX Runtime with the native op", library.sha256)
    assert "ONNX Runtime with the native op" in CliRunner().invoke(app, ["inspect", str(bundle.folder)]).output


def test_what_cannot_run_with_a_library_is_refused_in_a_sentence(library, make_bundle, tmp_path, monkeypatch):
    def refused(*bundle: str, file: Path = library.path, **options: str) -> str:
        made = make_bundle(*bundle)
        before = (made.folder / MANIFEST_NAME).read_text()
        with pytest.raises(ExportError) as caught:
            judged(made, library=file, **options)
        assert (made.folder / MANIFEST_NAME).read_text() == before, "nothing is written"
        return str(caught.value)

    assert "was exported with --op standard, so there is no op" in refused("llama", "fp32", "standard")
    assert "is bf16, which ONNX Runtime has no products in on a CPU" in refused("llama", "bf16")
    assert "--library and --engine" in refused("llama", engine_name="any")
    assert "not a library of teamlora-export's op" in refused("llama", file=Path(__file__))
    assert "Build the native op with" in refused("llama", file=tmp_path / "none.so")
    monkeypatch.setattr(onnxruntime_library.op, "ADAPTERS_VERSION", 7)
    assert "the model needs teamlora::MixedExpertProjection version 7" in refused("llama")


def test_onnxruntime_still_has_no_bf16_products_on_a_cpu(library, make_bundle):
    """In 1.32. Once this fails, bf16 bundles can be judged with a library."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library.path))
    with pytest.raises(Exception, match=r"Could not find an implementation for MatMul"):
        ort.InferenceSession(make_bundle("llama", "bf16").model, options, providers=["CPUExecutionProvider"])
