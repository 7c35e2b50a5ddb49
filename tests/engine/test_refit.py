"""Exchanging an engine's adapter, as far as a machine without a GPU goes: which weights, their values, refusals."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from conftest import ARCHITECTURES, random_adapter
from workers import graphs_kept_in

from teamlora_export.adapter import write_adapter
from teamlora_export.bundle import Bundle
from teamlora_export.engine.facts import EngineFacts, bundle_of, write_facts
from teamlora_export.engine.profiles import make_profiles
from teamlora_export.engine.refit import refit_engine, refit_weights
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.files import sha256_of
from teamlora_export.graph.precision import IR_DTYPES, ChangePrecision


def refittable(bundle: Bundle, dtype: str, engine: Path, **changes: object) -> EngineFacts:
    """The facts of an engine that was built with --refit. (The engine itself takes a GPU: its bytes are not read.)"""
    engine.write_bytes(b"engine")
    facts = EngineFacts(
        runtime="rtx",
        runtime_version="1.7.1.116",
        targets=("compute capability 8.9",),
        task=bundle.manifest.task,
        dtype=dtype,
        profiles=make_profiles(bundle, None),
        plugin=None,
        model_sha256=dict(bundle.manifest.sha256),
        adapter_sha256=bundle.manifest.adapter["sha256"],
        refit_weights=dict(bundle.manifest.refit["weights"]),
        stripped=False,
        size=6,
        sha256=sha256_of(engine),
        tool_version="0.1.0",
    )
    facts = dataclasses.replace(facts, **changes)  # type: ignore[arg-type]
    write_facts(facts, engine)
    return facts


@pytest.fixture
def other_adapter(make_base, tmp_path):
    """Another random adapter for an architecture's tiny model."""

    def make(name: str, **options: int) -> Path:
        folder = tmp_path / "other"
        write_adapter(random_adapter(make_base(name), ARCHITECTURES[name].targets, seed=5, **options), folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "dtype", "cache"),
    [
        ("llama", "fp32", "growing"),
        ("llama", "bf16", "in-place"),
        ("gpt2", "fp16", "growing"),
        ("bert", "fp32", "growing"),
    ],
)
def test_the_weights_are_those_of_an_export_with_the_other_adapter(
    name, dtype, cache, make_base, make_bundle, other_adapter, run_folder, tmp_path
):
    bundle, adapter = make_bundle(name, cache=cache), other_adapter(name)
    engine = tmp_path / "tiny.engine"
    found = refit_weights(engine, refittable(bundle, dtype, engine), bundle, adapter)
    base = make_base(name)
    with graphs_kept_in(run_folder / "traced"):
        exported = export_onnx(base.name, adapter, tmp_path / "exported", task=base.task, cache=cache)
    model = ir.load(exported.model)
    ChangePrecision("fp32", dtype)(model)
    for weight, array in found.items():
        value = model.graph.initializers[weight]
        assert value.dtype == (ir.DataType.FLOAT if weight.endswith("mix") else IR_DTYPES[dtype])
        assert np.array_equal(array, value.const_value.numpy()), weight
    changed = {n for n, v in ir.load(bundle.model).graph.initializers.items() if _differs(v, exported)}
    assert changed == set(found), "these, and no others, differ between the two exports"


def _differs(value: ir.Value, exported: Bundle) -> bool:
    other = ir.load(exported.model).graph.initializers[value.name]  # type: ignore[index]
    return not np.array_equal(value.const_value.numpy(), other.const_value.numpy())  # type: ignore[union-attr]


def test_the_bundle_is_the_one_that_the_engine_lies_in_or_the_one_that_is_named(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    with pytest.raises(ExportError, match="no such file"):
        bundle_of(Path("/nowhere.engine"), None)
    engine = tmp_path / "tiny.engine"
    engine.touch()
    with pytest.raises(ExportError, match=r"lies in no bundle.*--bundle"):
        bundle_of(engine, None)
    assert bundle_of(engine, bundle.folder).folder == bundle.folder
    copy = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    (copy / "engines").mkdir(exist_ok=True)
    (copy / "engines" / "tiny.engine").touch()
    assert bundle_of(copy / "engines" / "tiny.engine", None).folder == copy


def test_what_does_not_fit_is_refused_before_a_gpu_is_looked_for(make_bundle, other_adapter, make_adapter, tmp_path):
    bundle, engine = make_bundle("llama"), tmp_path / "tiny.engine"
    refittable(bundle, "fp16", engine, refit_weights=None)
    with pytest.raises(ExportError, match="built without --refit"):
        refit_engine(engine, bundle, other_adapter("llama"))
    refittable(bundle, "fp16", engine)
    with pytest.raises(ExportError, match=r"q_proj: has 2 experts of rank 4, the engine 4 of rank 2"):
        refit_engine(engine, bundle, other_adapter("llama", k=2))
    with pytest.raises(ExportError, match="does not fit"):
        refit_engine(engine, bundle, make_adapter("gpt2"))
    with pytest.raises(ExportError, match=r"is not the bundle that tiny\.engine was built from"):
        refit_engine(engine, make_bundle("mistral"), other_adapter("llama"))
    with pytest.raises(ExportError, match="runs on a GPU, and there is none here"):
        refit_engine(engine, bundle, other_adapter("llama"))
    refittable(bundle, "fp16", engine, runtime_version="1.0")
    with pytest.raises(ExportError, match=r"was built by rtx 1.0, installed is"):
        refit_engine(engine, bundle, other_adapter("llama"))
    assert engine.read_bytes() == b"engine"
