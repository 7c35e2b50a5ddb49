"""The op for ONNX Runtime's CUDA provider, without a GPU.

What a node does at each call - sizes, workspace, the order of arguments, the launch - runs in ONNX Runtime itself, on
its CPU provider, with the emulated kernels behind it. What is left for a GPU is the provider's stream, and memory that
is bound to it. The library that a GPU would load is compiled for one, and has the op for a CPU too.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from build_native import ONE_ARCHITECTURE
from formula import make_projection
from graph.test_op import feeds_of, one_node_model
from plugins.test_onnxruntime_op import (
    TOLERANCE,
    assert_computes_the_formula,
    assert_refuses_sizes_in_words,
    open_model,
)
from typer.testing import CliRunner

from teamlora_export.cli import app
from teamlora_export.engine.onnxruntime_library import OnnxRuntimeLibrary, build_cuda_library, build_library
from teamlora_export.errors import ExportError
from teamlora_export.inspect import inspect_plugin


@pytest.fixture(scope="module")
def emulated(programs) -> Path:
    return programs / "onnxruntime" / "libteamlora_onnxruntime_emulated.so"


@pytest.fixture(scope="module")
def library(programs) -> OnnxRuntimeLibrary:
    return build_cuda_library(ONE_ARCHITECTURE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["teamlora", "hydralora"])
def test_a_node_of_the_cuda_provider_computes_the_formula(emulated, family, dtype, rng, tmp_path):
    """By both paths of the kernels: twice as many tokens as named here are in a call."""
    assert_computes_the_formula(emulated, family, dtype, (1, 0, 3, 20), rng, tmp_path)


def test_sizes_that_do_not_fit_are_refused_in_words(emulated, rng):
    assert_refuses_sizes_in_words(emulated, rng)


@pytest.mark.parametrize(
    ("widths", "experts", "chunk", "words"),
    [
        ([2] * 5, 2, 1, "up to 4 siblings, 32 experts"),
        ([2], 33, 1, "up to 4 siblings, 32 experts"),
        ([2], 2, 2049, "the rank is beyond 4096"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_in_words(emulated, widths, experts, chunk, words, rng):
    projections = [make_projection(rng, experts, chunk, False, 7, width) for width in widths]
    session = open_model(one_node_model(widths, experts, False, ir.DataType.FLOAT), emulated)
    feeds = feeds_of(projections, np.zeros((1, 2, 7)), np.zeros((1, 2, sum(widths))), ir.DataType.FLOAT)
    with pytest.raises(Exception, match=words):
        session.run(None, feeds)


def test_the_library_for_cuda_runs_on_a_cpu_as_the_other_does(library, rng, tmp_path):
    """A node that no CUDA provider takes, since there is none, is a CPU's."""
    assert_computes_the_formula(library.path, "teamlora", ir.DataType.FLOAT, (1, 40), rng, tmp_path)


def test_a_session_takes_the_op_from_one_library_alone(library):
    """In 1.32, which is why the library for CUDA has the op for a CPU too. Once this fails, it need not."""
    options = ort.SessionOptions()
    for each in (library, build_library()):
        options.register_custom_ops_library(str(each.path))
    model = ir.to_proto(one_node_model([6], 4, False, ir.DataType.FLOAT)).SerializeToString()
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(model, options, ["CPUExecutionProvider"])


def test_it_says_which_gpus_it_is_for(library, emulated):
    assert library.architectures == ONE_ARCHITECTURE
    rows = dict(inspect_plugin(library.path).rows)
    assert (rows["GPUs"], rows["CUDA"]) == ("sm_80", library.cuda)
    assert "GPUs" not in dict(inspect_plugin(build_library().path).rows)
    with pytest.raises(ExportError, match="not a compute capability"):
        build_cuda_library(("sm_80",))


def test_only_what_is_looked_up_leaves_it_and_it_needs_no_cuda_to_load(library):
    listed = subprocess.run(["nm", "-D", "--defined-only", library.path], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == {"RegisterCustomOps", "teamlora_library_info"}
    needed = subprocess.run(["readelf", "-d", library.path], capture_output=True, text=True, check=True).stdout
    names = {line.split("[")[1].rstrip("]") for line in needed.splitlines() if "NEEDED" in line}
    assert not [name for name in names if "cuda" in name or "stdc++" in name]


@pytest.mark.parametrize(
    ("options", "words"), [(["--cuda"], "add --onnxruntime"), (["--onnxruntime", "--arch", "80"], "add --cuda")]
)
def test_options_that_do_not_belong_together_are_refused(options, words):
    assert words in str(CliRunner().invoke(app, ["plugins", "build", *options]).exception)
