"""`validate` of what was attached to a graph, beside the base that it was made of: that one, another, part of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import random_adapter, save_tokenizer
from faults import judged
from onnx import numpy_helper
from test_scripted_graphs import SIZES, export

from teamlora_export.adapter import write_adapter
from teamlora_export.attach.run import attach
from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.model.base import open_base
from teamlora_export.validate.verdict import Thresholds


@dataclass(frozen=True)
class Made:
    """Folders of a base and of adapters on it, by their targets, and graphs of it."""

    folder: Path
    base: Path
    graphs: dict[str, Path]

    def attached(self, graph: str, targets: str, out: Path, base: Path | str | None = None) -> Bundle:
        source = str(base) if base is not None else None
        return attach(self.graphs[graph], self.folder / targets, out, base_source=source)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("against")
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
    torch.manual_seed(5)
    # Without an activation, whose place would tell the block's projections.
    config = transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, hidden_act="linear")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    for name, targets in {"block": ("up_proj", "down_proj"), "attention": ("q_proj", "v_proj")}.items():
        write_adapter(random_adapter(open_base(str(folder / "base")), targets), folder / name)
    graphs = {kind: folder / kind / "model.onnx" for kind in ("exported", "folded", "unnamed", "fused")}
    for path in graphs.values():
        path.parent.mkdir()
    export(model, graphs["exported"])
    for kind, edit in {"folded": fold, "unnamed": unname, "fused": fuse}.items():
        proto = onnx.load(graphs["exported"])
        edit(proto)
        onnx.save(proto, graphs[kind])
    return Made(folder, folder / "base", graphs)


def fold(model: onnx.ModelProto) -> None:
    """A scale for each channel between up and down, as AWQ leaves it: the model computes what it did."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = np.exp(0.4 * np.random.default_rng(3).normal(size=48)).astype(np.float32)
    for node in model.graph.node:
        for name, factor in {"up_proj": 1 / scale, "down_proj": scale[:, None]}.items():
            if node.op_type == "MatMul" and name in node.name:
                array = numpy_helper.to_array(weights[node.input[1]]) * factor
                weights[node.input[1]].CopyFrom(numpy_helper.from_array(array, node.input[1]))


def unname(model: onnx.ModelProto) -> None:
    """No name says what a projection is."""
    names: dict[str, str] = {}
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
        for values in (node.input, node.output):
            for index, value in enumerate(values):
                if "proj" in value:
                    values[index] = names.setdefault(value, f"value{len(names)}")
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def fuse(model: onnx.ModelProto) -> None:
    """Products as ONNX Runtime's own operator, which a saved optimised model has."""
    for node in model.graph.node:
        if node.op_type == "MatMul" and "proj" in node.name:
            node.op_type, node.domain = "FusedMatMul", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize("graph", ["unnamed", "fused"])
def test_what_weights_show_is_judged_as_a_whole(graph, made, tmp_path):
    bundle = made.attached(graph, "block", tmp_path / "out", made.base)
    found = {tuple(each) for each in bundle.manifest.attached["projections"].values()}
    assert found == {("weights",) if graph == "unnamed" else ("name", "weights")}
    verdict = judged(bundle)
    assert verdict.passed, verdict.departures[:3]
    assert not verdict.candidate.endswith("by themselves")


def test_a_scale_that_was_folded_away_is_found_by_the_base(made, tmp_path):
    with pytest.raises(ExportError, match="factor for each of the"):
        made.attached("folded", "block", tmp_path / "refused", made.base)
    bundle = made.attached("folded", "block", tmp_path / "out")
    verdict = judged(bundle, base_source=str(made.base))
    assert {departure.module for departure in verdict.departures} == {
        f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("up", "down")
    }


def test_the_rest_of_the_base_need_not_be_found(made, tmp_path, capsys):
    bundle = made.attached("folded", "attention", tmp_path / "out", made.base)
    verdict = judged(bundle)
    assert verdict.passed
    assert verdict.candidate.endswith("experts by themselves")


def test_another_base_than_that_of_attaching_is_refused(made, tmp_path):
    bundle = made.attached("exported", "block", tmp_path / "out", made.base)
    other = tmp_path / "other"
    shutil.copytree(made.base, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-64:] = bytes(64)
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ExportError, match="is not the base that"):
        judged(bundle, base_source=str(other))


def test_a_base_of_the_hub_is_found_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(made.base))
    bundle = made.attached("exported", "block", tmp_path / "out", "org/tiny")
    assert bundle.manifest.base["source"] == "org/tiny"
    assert not judged(bundle).candidate.endswith("by themselves")

    def is_gone(name: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", is_gone)
    verdict = judged(bundle)
    assert verdict.passed
    assert verdict.candidate.endswith("by themselves")


def test_thresholds_ask_for_what_they_judge(made, tmp_path):
    thresholds = Thresholds(agreement=0.9)
    alone = made.attached("exported", "block", tmp_path / "alone")
    with pytest.raises(ExportError, match=r"its thresholds: is measured beside a base"):
        judged(alone, thresholds=thresholds)
    bundle = made.attached("exported", "block", tmp_path / "out", made.base)
    with pytest.raises(ExportError, match="what is not measured has no threshold"):
        judged(bundle, thresholds=thresholds, quality=False)
    verdict = judged(bundle, thresholds=thresholds)
    assert verdict.quality is not None
    assert verdict.quality.thresholds == thresholds
    assert json.loads((bundle.folder / "manifest.json").read_text())["validation"]["quality"] is not None
