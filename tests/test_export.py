"""Weights from every kind of checkpoint, templates in the cache, and what must be said when files are wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import ARCHITECTURES, random_adapter
from safetensors.numpy import load_file, save_file

from teamlora_export import export
from teamlora_export.adapter import read_adapter, write_adapter
from teamlora_export.bundle import DATA_NAME, MODEL_NAME
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.files import sha256_of
from teamlora_export.graph import template
from teamlora_export.model.source import find_base
from teamlora_export.progress import Reporter

QUIET = Reporter(quiet=True)


@pytest.fixture
def base(tmp_path, make_base) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(make_base("llama").folder, tmp_path / "base"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of templates."""
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "templates"


def shard(base: Path) -> list[Path]:
    """Split the checkpoint into two files with an index."""
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, base / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "model.safetensors").unlink()
    return [base / file for file in halves]


def export_to(out: Path, base: Path, adapter: Path, **options: object):  # type: ignore[no-untyped-def]
    return export_onnx(str(base), adapter, out, reporter=QUIET, **options)  # type: ignore[arg-type]


def test_shards_and_bin_files_give_the_bytes_that_one_file_gives(tmp_path, base, make_adapter, make_bundle, cache):
    expected = make_bundle("llama").manifest.sha256[DATA_NAME]
    state = {n: torch.tensor(v) for n, v in load_file(base / "model.safetensors").items()}
    shard(base)
    assert export_to(tmp_path / "a", base, make_adapter("llama")).manifest.sha256[DATA_NAME] == expected
    for path in base.glob("model*safetensors*"):
        path.unlink()
    torch.save(state, base / "pytorch_model.bin")
    assert export_to(tmp_path / "b", base, make_adapter("llama")).manifest.sha256[DATA_NAME] == expected


def test_a_half_precision_checkpoint_is_widened_or_kept(tmp_path, base, make_adapter, cache):
    tensors = load_file(base / "model.safetensors")
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, base / "model.safetensors")
    for dtype, kind in (("fp32", np.float32), ("fp16", np.float16)):
        bundle = export_to(tmp_path / dtype, base, make_adapter("llama"), dtype=dtype)
        weight = ir.load(bundle.model).graph.initializers["model.layers.0.mlp.down_proj.weight.T"].const_value.numpy()
        expected = tensors["model.layers.0.mlp.down_proj.weight"].astype(np.float16).T
        assert weight.dtype == kind
        assert np.array_equal(weight, expected.astype(kind))


BREAKS = {
    "a missing shard": (lambda shards: shards[1].unlink(), "which is missing"),
    "a truncated shard": (
        lambda shards: os.truncate(shards[1], shards[1].stat().st_size - 7),
        "not a readable safetensors",
    ),
    "a shard without its tensor": (
        lambda shards: save_file({"x": np.zeros(3, np.float32)}, shards[1]),
        "which its index says it holds",
    ),
    "a tensor named twice": (
        lambda shards: (shards[0].parent / "model.safetensors.index.json").write_text(
            f'{{"weight_map": {{"lm_head.weight": "{shards[0].name}", "lm_head.weight": "{shards[1].name}"}}}}'
        ),
        "names lm_head.weight twice",
    ),
    "a path out of the folder": (
        lambda shards: (shards[0].parent / "model.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "../secret.safetensors"}}'
        ),
        "not a file of this folder",
    ),
    "another model's weights": (
        lambda shards: save_file({n: v[..., :8] for n, v in load_file(shards[0]).items()}, shards[0]),
        "Does config.json belong to these weights",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_shards_are_named_and_nothing_is_left(name, tmp_path, base, make_adapter, make_bundle):
    breaks, message = BREAKS[name]
    breaks(shard(base))
    with pytest.raises(ExportError, match=message):
        export_to(tmp_path / "deep" / "out", base, make_adapter("llama"))
    assert not (tmp_path / "deep" / "out").exists()
    assert not list(tmp_path.glob("**/*.partial"))


def test_weights_that_change_while_they_are_read_are_noticed(tmp_path, base, make_adapter, monkeypatch):
    original = export.weights.write_external_data

    def write_then_touch(*arguments: object) -> str:
        digest = original(*arguments)  # type: ignore[arg-type]
        os.utime(base / "model.safetensors", (1, 1))
        return digest

    monkeypatch.setattr(export.weights, "write_external_data", write_then_touch)
    with pytest.raises(ExportError, match="changed while they were read"):
        export_to(tmp_path / "out", base, make_adapter("llama"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_message_and_leaves_the_old_bundle(tmp_path, base, make_adapter):
    bundle = export_to(tmp_path / "out", base, make_adapter("llama"))
    before = sha256_of(bundle.data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(ExportError, match="nothing was written"):
            export_to(tmp_path / "out", base, make_adapter("llama"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sha256_of(bundle.data) == before
    assert not list(tmp_path.glob(".out*"))


_WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from teamlora_export.export import export_onnx
export_onnx(*sys.argv[1:])
"""


def test_a_kept_template_serves_the_next_adapter_without_torch(tmp_path, base, make_base, make_adapter, cache):
    export_to(tmp_path / "first", base, make_adapter("llama"))
    (kept,) = cache.iterdir()
    other = tmp_path / "other"
    write_adapter(random_adapter(make_base("llama"), ARCHITECTURES["llama"].targets, seed=5), other)
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(base), str(other), str(tmp_path / "second")]
    subprocess.run(command, check=True, capture_output=True)
    traced = export_to(tmp_path / "third", base, other, use_cache=False)
    for name in (MODEL_NAME, DATA_NAME):
        assert sha256_of(tmp_path / "second" / name) == sha256_of(traced.folder / name)
    assert list(cache.iterdir()) == [kept]


@pytest.mark.parametrize("file", ["graph.onnx", "template.json"])
def test_a_damaged_template_is_thrown_away(file, tmp_path, base, make_adapter, cache):
    first = export_to(tmp_path / "out", base, make_adapter("llama"))
    (kept,) = cache.iterdir()
    with (kept / file).open("r+b") as opened:
        opened.seek(40)
        opened.write(b"\xff\xff\xff\xff")
    assert template.load_template(kept.name) is None
    assert not kept.exists()
    assert export_to(tmp_path / "out", base, make_adapter("llama")).manifest.sha256 == first.manifest.sha256


def test_a_template_is_never_used_for_anything_else(base, make_adapter):
    adapter = read_adapter(make_adapter("llama"))
    source = find_base(str(base))
    key = template.template_key(source, adapter, "auto", "fp32")
    assert key == template.template_key(source, adapter, "auto", "fp32")
    fewer = dataclasses.replace(adapter, projections=dict(list(adapter.projections.items())[:-1]))
    others = {
        template.template_key(source, adapter, "auto", "fp16"),
        template.template_key(source, adapter, "text-generation", "fp32"),
        template.template_key(source, fewer, "auto", "fp32"),
    }
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    others.add(template.template_key(source, adapter, "auto", "fp32"))
    assert len(others | {key}) == 5
