"""The graph that a parser gets: with the op for the plugin, or with its bodies inlined."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from teamlora_export.bundle import read_bundle
from teamlora_export.engine.prepare import prepared_model, write_graph
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.progress import Reporter

QUIET = Reporter(quiet=True)


def test_the_plugins_graph_has_the_op_without_its_bodies(make_bundle, tmp_path):
    """A parser prefers a function to a plugin, and looks a plugin up by the op's name alone."""
    with prepared_model(make_bundle("llama"), "fp16", tmp_path, for_plugin=True, reporter=QUIET) as path:
        model = ir.load(path)
        nodes = [node for node in model.graph if op.is_op(node)]
        assert len(nodes) == 16
        assert not model.functions
        assert {node.overload for node in nodes} == {""}
        assert all(set(node.attributes) == set(op.ATTRIBUTES) for node in nodes)
        assert len({node.name for node in nodes}) == 16, "errors name the node"
        weights = {value.name: value.dtype for node in nodes for value in node.inputs[2:]}
        assert weights == {n: ir.DataType.FLOAT if n.endswith("mix") else ir.DataType.FLOAT16 for n in weights}
    assert not list(tmp_path.iterdir())


def test_the_other_graph_has_no_op_and_links_the_weights_it_does_not_change(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    with prepared_model(bundle, "fp32", tmp_path, for_plugin=False, reporter=QUIET) as path:
        model = ir.load(path)
        assert not [node for node in model.graph if node.domain]
        assert (path.parent / bundle.data.name).stat().st_ino == bundle.data.stat().st_ino
    assert bundle.data.is_file()
    assert not list(tmp_path.iterdir())


def test_the_graph_alone_is_written_for_other_builders(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    path = write_graph(bundle, "fp16", tmp_path / "graph", for_plugin=True, reporter=QUIET)
    assert sorted(p.name for p in path.parent.iterdir()) == ["graph.json", "model.onnx", "model.onnx.data"]
    assert sum(op.is_op(node) for node in ir.load(path).graph) == 16
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]


def test_an_earlier_graph_is_replaced_and_nothing_else_is(make_bundle, tmp_path):
    bundle, out = make_bundle("llama"), tmp_path / "graph"

    def write(place: Path, dtype: str = "fp32") -> None:
        write_graph(bundle, dtype, place, for_plugin=False, reporter=QUIET)

    write(out, "fp16")
    write(out)
    assert not any(op.is_op(node) for node in ir.load(out / "model.onnx").graph)
    shutil.copytree(bundle.folder, tmp_path / "other")
    for place, reason in ((tmp_path / "other", "is not a graph that"), (bundle.folder / "sub", "which is read")):
        with pytest.raises(ExportError, match=reason):
            write(place)
    (out / "engine.plan").write_text("mine")
    with pytest.raises(ExportError, match=r"engine\.plan: is not a file that teamlora-export wrote"):
        write(out)
    (out / "engine.plan").unlink()
    with (out / "model.onnx").open("ab") as file:
        file.write(b"mine")
    with pytest.raises(ExportError, match=r"model\.onnx: is not as it was written"):
        write(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph", "other"]


def test_a_cache_in_place_has_a_capacity_in_numbers_and_is_kept_in_the_wanted_type(make_bundle, tmp_path):
    """TensorRT updates buffers of a known size alone, whose type is their rows'."""
    bundle = make_bundle("llama", cache="in-place")
    path = write_graph(bundle, "fp16", tmp_path / "graph", for_plugin=True, reporter=QUIET, capacity=40)
    graph = ir.load(path).graph
    caches = [value for value in (*graph.inputs, *graph.outputs) if "key" in value.name or "value" in value.name]
    assert len(caches) == 16
    assert all(list(value.shape)[1:] == [2, 40, 8] and value.dtype == ir.DataType.FLOAT16 for value in caches)
    for node in graph:
        if node.op_type in ("TensorScatter", "Attention"):
            kinds = {value.dtype for value in (*node.inputs, *node.outputs)}
            assert kinds <= {ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.BOOL}, node.name
    assert "capacity" not in str([value.shape for node in graph for value in node.outputs])
    growing = make_bundle("llama")
    with pytest.raises(ExportError, match=r"--capacity 40: .* keeps no cache in place"):
        write_graph(growing, "fp16", tmp_path / "other", for_plugin=True, reporter=QUIET, capacity=40)
    assert not (tmp_path / "other").exists()


def test_of_a_fixed_capacity_a_ring_is_a_buffer_like_any_other(make_bundle, tmp_path):
    """TensorRT may know no circular update; a ring that is as long as the text never wraps."""
    bundle = make_bundle("gemma3", cache="in-place")
    path = write_graph(bundle, "fp32", tmp_path / "graph", for_plugin=False, reporter=QUIET, capacity=40)
    graph = ir.load(path).graph
    assert {node.attributes["mode"].as_string() for node in graph if node.op_type == "TensorScatter"} == {"linear"}
    ports = [port for port in bundle.manifest.inputs if port.name.startswith("past_")]
    feeds = {port.name: np.zeros((2, port.shape[1], 40, port.shape[3]), np.float32) for port in ports}
    feeds["input_ids"] = np.arange(3, 83).reshape(2, 40)
    feeds["attention_mask"] = np.ones((2, 40), np.int64)
    feeds["attention_mask"][1, :7] = 0
    feeds["position_ids"] = np.tile(np.arange(40), (2, 1))
    expected, found = (ort.InferenceSession(model).run(["logits"], feeds)[0] for model in (bundle.model, path))
    assert np.array_equal(found, expected)


def test_the_graph_alone_has_weights_of_its_own_and_leaves_its_bundle_readable(make_bundle, tmp_path):
    """A second name for the bundle's file lets a change to one reach the other, and onnx refuses to load either."""
    bundle = make_bundle("llama")
    path = write_graph(bundle, "fp32", tmp_path / "graph", for_plugin=True, reporter=QUIET)
    assert path.with_name(bundle.data.name).stat().st_nlink == bundle.data.stat().st_nlink == 1
    onnx.load(path)


def test_a_bundle_whose_weights_have_a_second_name_is_read(make_bundle, tmp_path):
    """As in a snapshot that shares its files with the one before."""
    folder = tmp_path / "bundle"
    shutil.copytree(make_bundle("llama").folder, folder)
    os.link(folder / "model.onnx.data", tmp_path / "snapshot")
    with prepared_model(read_bundle(folder), "fp16", tmp_path, for_plugin=True, reporter=QUIET) as path:
        assert ir.load(path).graph.initializers


def test_an_inlined_bundle_has_nothing_for_the_plugin(make_bundle, tmp_path):
    inlined = make_bundle("llama", op_form="standard")
    with (
        pytest.raises(ExportError, match="--op standard"),
        prepared_model(inlined, "fp16", tmp_path, for_plugin=True, reporter=QUIET),
    ):
        pass
    assert not list(tmp_path.iterdir())
