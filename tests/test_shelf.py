"""Bundles with a shelf of adapters: what an export is asked for, writes and tells."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import _ALL, random_adapter
from safetensors.numpy import load_file, save_file
from shelves import COUNT, SHELF
from typer.testing import CliRunner

from teamlora_export.adapter import write_adapter
from teamlora_export.bundle import check_files, read_bundle
from teamlora_export.cli import app
from teamlora_export.cli_adapters import adapters_given
from teamlora_export.deploy.runner import Model
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.graph import op
from teamlora_export.inspect import inspect_path
from teamlora_export.shelf import add_adapter, slot_sizes

pytest_plugins = ["shelf_fixtures"]


def test_the_base_is_written_once_and_each_adapter_is_a_file_beside_it(make_shelf, make_bundle):
    bundle, plain = make_shelf(), make_bundle("llama")
    check_files(bundle)
    manifest = bundle.manifest
    assert list(manifest.shelf["adapters"]) == list(SHELF)
    assert (manifest.op["version"], manifest.shelf["slots"], manifest.format_version) == (2, 3, 3)
    assert (plain.manifest.op["version"], plain.manifest.shelf, plain.manifest.format_version) == (1, None, 2)
    assert manifest.inputs == plain.manifest.inputs, "what a caller must give is what it was"
    sizes = {(bundle.folder / adapter["file"]).stat().st_size for adapter in manifest.shelf["adapters"].values()}
    assert len(sizes) == 1, "all have the form of a slot"
    # The default of all slots is one run of zeros, as long as the longest of them.
    model = onnx.load(bundle.model, load_external_data=False)
    inputs, weights = {value.name for value in model.graph.input}, {t.name: t for t in model.graph.initializer}
    slots = [weights[name] for name in inputs & weights.keys() if name != "adapter"]
    offsets = {entry.value for t in slots for entry in t.external_data if entry.key == "offset"}
    assert len(slots) == 48 and len(offsets) == 1
    assert bundle.data.stat().st_size < plain.data.stat().st_size
    stored = load_file(bundle.folder / manifest.shelf["adapters"]["team"]["file"])
    assert stored.keys() == {tensor.name for tensor in slots}


def test_the_graph_by_itself_is_the_base_and_onnx_runtimes_own_adapters_fit_it(make_shelf, make_base, tmp_path):
    """Without our programs: `adapter` is left out, or set by a file of ONNX Runtime's own kind."""
    bundle, base = make_shelf(), make_base("llama")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(bundle.model, options, providers=["CPUExecutionProvider"])
    ids = np.array([[5, 6, 7, 8]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(4)[None]}
    feeds |= {v.name: np.zeros((1, 2, 0, 8), np.float32) for v in session.get_inputs() if v.name.startswith("past")}
    expected = base.load(torch.float32)(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(session.run(["logits"], feeds)[0] - expected).max() < 1e-4
    stored = load_file(bundle.folder / bundle.manifest.shelf["adapters"]["team"]["file"])
    parameters = {name: ort.OrtValue.ortvalue_from_numpy(array[None]) for name, array in stored.items()}
    parameters["adapter"] = ort.OrtValue.ortvalue_from_numpy(np.int32([0]))
    file = ort.AdapterFormat()
    file.set_parameters(parameters)
    file.export_adapter(str(tmp_path / "team.onnx_adapter"))
    loaded, run = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(tmp_path / "team.onnx_adapter"))
    run.add_active_adapter(loaded)
    found = session.run(["logits"], feeds, run)[0][0, -1].argmax()
    assert [found] == Model(bundle.folder).generate([[5, 6, 7, 8]], 1, adapters=["team"])[0]
    assert found != expected[0, -1].argmax()


def test_room_that_is_asked_for_at_the_export_takes_later_adapters_that_are_larger(
    make_base, make_shelf, shelf_adapters, shelf_answers, tmp_path
):
    """It makes the graph that the larger ones make."""
    out, targets = tmp_path / "out", ",".join(SHELF["team"][1])
    options = ["--slot-rank", "8", "--slot-experts", "4", "--slot-targets", targets]
    given = ["onnx", make_base("llama").name, "-a", f"small={shelf_adapters['small']}", "-o", str(out), *options]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert read_bundle(out).model.read_bytes() == make_shelf().model.read_bytes()
    add_adapter(out, "team", shelf_adapters["team"])
    found = Model(out).generate([[5, 6, 7]] * 3, COUNT, adapters=["team", "small", None])
    assert found[0] == shelf_answers["team", (5, 6, 7)] != found[1] != found[2]


def test_adapters_that_were_trained_with_the_head_and_on_the_body_share_an_export(
    make_base, make_shelf, shelf_adapters, tmp_path
):
    body = shutil.copytree(shelf_adapters["small"], tmp_path / "body")
    tensors = load_file(body / "adapter_model.safetensors")
    renamed = {name.replace("model.model.layers", "model.layers"): array for name, array in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, body / "adapter_model.safetensors")
    given = {"team": shelf_adapters["team"], "small": body}
    made = export_onnx(make_base("llama").name, given, tmp_path / "out")
    assert made.manifest.refit == make_shelf().manifest.refit
    ours, theirs = (
        load_file(bundle.folder / bundle.manifest.shelf["adapters"]["small"]["file"]) for bundle in (made, make_shelf())
    )
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
    # Which of them does not fit is said.
    write_adapter(random_adapter(make_base("gpt2"), _ALL["gpt2"].targets), tmp_path / "strange")
    with pytest.raises(ExportError, match=rf"The adapter {tmp_path}/strange does not fit the base"):
        export_onnx(make_base("llama").name, {"team": given["team"], "odd": tmp_path / "strange"}, tmp_path / "no")


def test_an_export_that_leaves_out_what_is_on_the_shelf_says_so(bundle, make_base, shelf_adapters, capsys):
    export_onnx(make_base("llama").name, {"lora": shelf_adapters["lora"]}, bundle.folder)
    said = " ".join(capsys.readouterr().err.split())
    assert "hydra, moe, small, team on the shelf that is replaced: not given here, and removed with it" in said


def test_options_name_adapters_or_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "a=b", "my own"):
        Path(name).mkdir()
    assert adapters_given(["one"], False) == Path("one")
    assert adapters_given(["one"], True) == {"one": Path("one")}
    assert adapters_given(["x=one"], False) == {"x": Path("one")}
    assert adapters_given(["one", "x=two"], False) == {"one": Path("one"), "x": Path("two")}
    assert adapters_given(["a=b"], False) == Path("a=b"), "a folder of that name"
    with pytest.raises(ExportError, match=r"--adapter my own: 'my own' cannot name an adapter\. Give NAME=FOLDER"):
        adapters_given(["one", "my own"], False)
    with pytest.raises(ExportError, match="two are called one"):
        adapters_given(["one", "one=two"], False)


def test_exports_that_cannot_be_are_refused_before_anything_is_traced(make_base, shelf_adapters, tmp_path):
    base = make_base("llama").name
    team = {"team": shelf_adapters["team"]}
    for adapters, options, words in (
        (team, {"slots": 0}, "--slots 0: give 1 to 4096"),
        (team, {"slot_rank": 0}, "--slot-rank 0: give 1 to 4096"),
        (team, {"slot_experts": 5000}, "--slot-experts 5000: give 1 to 1024"),
        (team, {"slot_targets": ["c_attn"]}, "--slot-targets 'c_attn': ends no linear layer of .* It has down_proj, g"),
        ({}, {}, "There is no adapter"),
        ({"no name": shelf_adapters["team"]}, {}, "'no name': cannot name an adapter"),
        (shelf_adapters["team"], {"slots": 3}, "--slots: is for adapters that have names"),
        (shelf_adapters["team"], {"slot_targets": ["up_proj"]}, "--slot-targets: is for adapters that have names"),
    ):
        with pytest.raises(ExportError, match=words):
            export_onnx(base, adapters, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["deploy", target, "BUNDLE", "-o", "OUT", "--batching", "sequence"] for target in ("triton", "kubernetes")],
)
def test_what_knows_no_shelf_refuses_one_in_a_sentence(words, make_shelf, tmp_path):
    known = {"BUNDLE": str(make_shelf().folder), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [known.get(word, word) for word in words])
    assert isinstance(done.exception, ExportError)
    assert "has a shelf of adapters, and Triton's own back ends know none. Leave out" in str(done.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("limit", "most", "words"), [("EXPERTS", 3, "is 3 experts and"), ("RANK", 7, "rank of 7 of")])
def test_what_the_cuda_kernels_do_not_take_is_told_at_the_export(
    limit, most, words, make_base, shelf_adapters, tmp_path, capsys, monkeypatch
):
    given = {"team": shelf_adapters["team"]}
    export_onnx(make_base("llama").name, given, tmp_path / "out")
    assert "CUDA" not in capsys.readouterr().err
    monkeypatch.setattr(op, f"MOST_{limit}_ON_GPU", most)
    export_onnx(make_base("llama").name, given, tmp_path / "out")
    said = capsys.readouterr().err
    assert words in said and re.search(r"28 modules are larger .*the first is .*_proj \(4 experts of rank 2\)", said)


def test_inspect_tells_what_is_on_the_shelf(make_shelf):
    rows = dict(inspect_path(make_shelf().folder).rows)
    assert rows["slots"] == "3 of 0.08 MB each, with room for 4 experts of rank 2"
    sizes = {
        "a.q_proj": (4, 4, 8, 4, 2),
        "b.q_proj": (4, 4, 8, 4, 2),
        "a.up": (4, 4, 3, 2, 3),
        "a.down": (4, 4, 5, 1, 5),
    }
    text = slot_sizes({"weights": {}, "projections": sizes, "overrides": {}, "body_prefix": ""})
    assert text == "4 experts of rank 2 (q_proj), 2 experts of rank 3 that share A (up), 1 expert of rank 5 (down)"
    assert rows["adapter hydra"].startswith("hydralora, r=2, k=3, 12 modules")
    assert rows["adapter hydra"].endswith("not validated")
