"""Weights from every kind of checkpoint, traced graphs in the cache, and what must be said when files are wrong."""

from __future__ import annotations

import dataclasses
import importlib.metadata
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
from google.protobuf.message import EncodeError
from safetensors.numpy import load_file, save_file

from teamlora_export import export
from teamlora_export.adapter import AdapterSpec, read_adapter, write_adapter
from teamlora_export.bundle import DATA_NAME, MODEL_NAME
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.files import sha256_of
from teamlora_export.graph import build, traced
from teamlora_export.model.checkpoint import lacking_names
from teamlora_export.model.source import find_base
from teamlora_export.progress import Reporter

QUIET = Reporter(quiet=True)


@pytest.fixture
def base(tmp_path, make_base) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return Path(shutil.copytree(make_base("llama").folder, tmp_path / "base"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of traced graphs."""
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def kept(base, cache, run_folder, make_bundle, make_adapter) -> Path:
    """The graph of the tiny Llama in that cache, as this run has traced it."""
    make_bundle("llama")
    source, adapter = find_base(str(base)), read_adapter(make_adapter("llama"))
    made, entry = (traced.graph_key(source, adapter, task, "fp32", False) for task in ("text-generation", "auto"))
    cache.mkdir(parents=True)
    return Path(shutil.copyfile(run_folder / "traced" / "graphs" / made, cache / entry))


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


def test_shards_and_bin_files_give_the_bytes_that_one_file_gives(tmp_path, base, make_adapter, make_bundle, kept):
    expected = make_bundle("llama").manifest.sha256[DATA_NAME]
    state = {n: torch.tensor(v) for n, v in load_file(base / "model.safetensors").items()}
    shard(base)
    assert export_to(tmp_path / "a", base, make_adapter("llama")).manifest.sha256[DATA_NAME] == expected
    for path in base.glob("model*safetensors*"):
        path.unlink()
    torch.save(state, base / "pytorch_model.bin")
    assert export_to(tmp_path / "b", base, make_adapter("llama")).manifest.sha256[DATA_NAME] == expected


def test_a_half_precision_checkpoint_is_widened_or_kept(tmp_path, base, make_adapter, kept):
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
        "names 'lm_head.weight' twice",
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
    assert not (tmp_path / "deep").exists()
    assert not list(tmp_path.glob("**/.*"))


def test_a_weight_that_the_checkpoint_lacks_is_told_before_anything_is_traced(
    tmp_path, make_base, make_adapter, monkeypatch
):
    """But one that nobody reads, such as a pooler, is no reason to refuse."""
    base = Path(shutil.copytree(make_base("mistral").folder, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    names = ("lm_head.weight", "model.layers.1.self_attn.q_proj.weight")
    save_file({name: value for name, value in tensors.items() if name not in names}, base / "model.safetensors")
    monkeypatch.setattr(build, "traceable", None)
    with pytest.raises(ExportError, match=r"2 problems\n  - lm_head.weight is missing.*\n.*q_proj.weight is missing"):
        export_to(tmp_path / "out", base, make_adapter("mistral"), retrace=True)
    encoder = make_base("roberta")
    tensors = load_file(encoder.folder / "model.safetensors")
    base = Path(shutil.copytree(encoder.folder, tmp_path / "encoder"))
    save_file({n: v for n, v in tensors.items() if "pooler" not in n}, base / "model.safetensors")
    assert lacking_names(find_base(str(base)), encoder.aliases(), encoder.signature) == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    encoder = dataclasses.replace(encoder, source=find_base(str(base)))
    build._refuse_missing(encoder, read_adapter(make_adapter("roberta")))


def test_weights_that_change_while_they_are_read_are_noticed(tmp_path, base, make_adapter, monkeypatch):
    original = export.external_data.write_external_data

    def write_then_touch(*arguments: object) -> str:
        digest = original(*arguments)  # type: ignore[arg-type]
        os.utime(base / "model.safetensors", (1, 1))
        return digest

    monkeypatch.setattr(export.external_data, "write_external_data", write_then_touch)
    with pytest.raises(ExportError, match="changed while they were read"):
        export_to(tmp_path / "out", base, make_adapter("llama"))
    assert list(tmp_path.iterdir()) == [base]


def test_a_full_disk_is_one_message_and_leaves_the_old_bundle(tmp_path, base, make_adapter):
    bundle = export_to(tmp_path / "out", base, make_adapter("llama"))
    before = sha256_of(bundle.data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"/out: File too large; nothing was written\. Free space"):
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


def test_a_kept_graph_serves_the_next_adapter_without_torch(tmp_path, base, make_base, cache, kept):
    other = tmp_path / "other"
    write_adapter(random_adapter(make_base("llama"), ARCHITECTURES["llama"].targets, seed=5), other)
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(base), str(other), str(tmp_path / "second")]
    subprocess.run(command, check=True, capture_output=True)
    traced = export_to(tmp_path / "third", base, other, retrace=True)
    for name in (MODEL_NAME, DATA_NAME):
        assert sha256_of(tmp_path / "second" / name) == sha256_of(traced.folder / name)
    assert list(cache.iterdir()) == [kept]


def test_a_kept_graph_that_was_changed_is_thrown_away(tmp_path, base, make_adapter, cache):
    first = export_to(tmp_path / "out", base, make_adapter("llama"))
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    recipe = whole.index(b'"recipes"')
    changes = {
        "a recipe": whole[:recipe] + whole[recipe:].replace(b"layers.0", b"layers.1", 1),
        "the graph": whole[:-9] + b"x" + whole[-8:],
        "cut short": whole[:1000],
        "empty": b"",
        "its hash": b"0" * 64 + whole[64:],
        "no text": b"\xff" * 64 + whole[64:],
    }
    for name, content in changes.items():
        kept.write_bytes(content)
        assert traced.load_graph(kept.name) is None, name
        assert not kept.exists(), name
    assert export_to(tmp_path / "out", base, make_adapter("llama")).manifest.sha256 == first.manifest.sha256
    assert kept.read_bytes() == whole


def test_a_graph_that_is_too_large_to_keep_is_no_reason_to_fail(cache, kept, monkeypatch):
    """Protobuf says so when it is asked for the bytes of more than 2 GB, for which there is no room here."""
    loaded = traced.load_graph(kept.name)
    kept.unlink()

    def refuse(_: ir.Model) -> None:
        raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr(traced.ir, "to_proto", refuse)
    traced.keep_graph(kept.name, loaded)
    assert not list(cache.iterdir())


def test_something_else_in_the_place_of_a_kept_graph_or_of_the_cache_costs_a_trace_and_leaves_nothing(
    tmp_path, base, make_bundle, make_adapter, cache, kept
):
    expected = make_bundle("llama").manifest.sha256
    content = kept.read_bytes()
    loaded = traced.load_graph(kept.name)
    kept.unlink()
    kept.mkdir()
    (kept / "mine.txt").touch()
    for _ in range(3):
        assert traced.load_graph(kept.name) is None
        traced.keep_graph(kept.name, loaded)
    assert [path.name for path in cache.rglob("*")] == [kept.name, "mine.txt"]
    shutil.rmtree(cache)
    cache.write_text("mine")
    assert traced.load_graph(kept.name) is None
    traced.keep_graph(kept.name, loaded)
    assert cache.read_text() == "mine"
    assert list(cache.parent.iterdir()) == [cache]
    cache.unlink()
    traced.keep_graph(kept.name, loaded)
    assert kept.read_bytes() == content
    assert export_to(tmp_path / "out", base, make_adapter("llama")).manifest.sha256 == expected


def notes(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def foreign_engine(out: Path) -> None:
    (out / "engines").mkdir()
    (out / "engines" / "mine.engine").write_bytes(b"mine")
    (out / "engines" / "mine.json").write_text('{"format_version": 1}')


def web_project(out: Path) -> None:
    shutil.rmtree(out)
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "A web project"}')
    (out / "index.html").write_text("mine")


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (notes, r"notes\.txt: is not a file that teamlora-export wrote"),
        (foreign_engine, r"mine\.\w+: is not a file that teamlora-export wrote"),
        (web_project, "exists and is not a bundle; it is left as it is"),
    ],
)
def test_an_export_replaces_nothing_that_it_did_not_write(put, message, tmp_path, make_bundle, make_base, make_adapter):
    out = Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "out"))
    put(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match=message):
        export_to(out, Path(make_base("llama").name), make_adapter("llama"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_neither_base_nor_adapter_may_be_what_is_replaced_or_lie_in_it(tmp_path, make_bundle, make_base, make_adapter):
    out = Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "b3"))
    base = Path(shutil.copytree(make_base("llama").folder, out / "base"))
    adapter = Path(shutil.copytree(make_adapter("llama"), tmp_path / "adapter"))
    (tmp_path / "link").symlink_to(out / "base")
    for place, given in ((out, base), (out, tmp_path / "link"), (base, base), (adapter, base), (base / "..", base)):
        with pytest.raises(ExportError, match="which is read"):
            export_to(place, given, adapter)
    assert (base / "model.safetensors").is_file()
    assert (adapter / "adapter_config.json").is_file()


def test_a_kept_graph_is_never_used_for_anything_else(base, make_adapter, monkeypatch):
    adapter = read_adapter(make_adapter("llama"))
    source = find_base(str(base))

    def key(adapter: AdapterSpec = adapter, task: str = "auto", dtype: str = "fp32", in_place: bool = False) -> str:
        return traced.graph_key(source, adapter, task, dtype, in_place)

    assert key() == key()
    (path, projection), *rest = adapter.projections.items()
    fewer = dataclasses.replace(adapter, projections=dict(rest))
    shared = {path: dataclasses.replace(projection, shared_down=True), **dict(rest)}
    keys = [key(), key(dtype="fp16"), key(task="text-generation"), key(in_place=True), key(fewer)]
    keys.append(key(dataclasses.replace(adapter, projections=shared)))
    for place, name, other in (
        (traced, "_FORMAT", 0),
        (traced, "__version__", "0"),
        (traced, "_code_sha256", lambda: "another"),
        (importlib.metadata, "version", lambda _: "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            keys.append(key())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    keys.append(key())
    (base / "modules.json").write_text("[]")
    keys.append(key())
    assert len(set(keys)) == len(keys)
