"""Nodes of the op that are not where `attach` put them; each fault is planted with a manifest that vouches for it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from faults import Fault, judged, plant

sys.path.append(str(Path(__file__).parents[1] / "attach"))
from foreign_graphs import IN, Graph, adapter_of, matmul, nbits, save_base

from teamlora_export.attach.insert import detach
from teamlora_export.attach.run import attach
from teamlora_export.bundle import Bundle
from teamlora_export.graph import op
from teamlora_export.graph.read import read_graph
from teamlora_export.manifest import write_manifest

LAYERS = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)]
PACKED = {f"model.layers.0.self_attn.{name}_proj": (IN, width) for name, width in (("q", 16), ("v", 8))}


@pytest.fixture
def layers(rng, tmp_path) -> Bundle:
    """Two products of one size, one behind the other."""
    graph = Graph()
    first = matmul(graph, graph.embed(rng), rng.normal(size=(IN, IN)).astype(np.float32), "/model/layers.0/attn/o_proj")
    x = graph.node("Tanh", [first], "tanh")
    last = matmul(graph, x, rng.normal(size=(IN, IN)).astype(np.float32), "/model/layers.1/attn/o_proj")
    foreign = graph.save(tmp_path / "foreign", last)
    adapter_of(rng, tmp_path / "adapter", dict.fromkeys(LAYERS, (IN, IN)))
    return attach(foreign, tmp_path / "adapter", tmp_path / "out")


@pytest.fixture
def packed(rng, tmp_path) -> Bundle:
    """q, k and v in one product, q and v adapted; q has two readers. The graph has a Concat and a Split of its own."""
    tmp_path = tmp_path / "packed"
    tmp_path.mkdir()
    graph, w = Graph(), rng.normal(size=(IN, 32)).astype(np.float32)
    whole = nbits(graph, graph.embed(rng), w, "/model/layers.0/attn/qkv_proj")
    sizes = graph.weight("sizes", np.array([16, 8, 8]))
    graph.node("Split", [whole, sizes], ["q", "k", "v"], axis=-1)
    joined = graph.node("Concat", ["q", graph.node("Neg", ["q"], "turned"), "k", "v"], "joined", axis=-1)
    graph.node("Split", [joined, graph.weight("others", np.array([16, 16, 16]))], ["a", "b", "c"], axis=-1)
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", ["a", "b", "c"], "read", axis=-1))
    adapter_of(rng, tmp_path / "adapter", PACKED)
    parts = zip("qkv", np.split(w, [16, 24], axis=1), strict=True)
    base = save_base(tmp_path / "base", {f"model.layers.0.self_attn.{name}_proj": part for name, part in parts})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    base.rename(tmp_path / "gone")
    return bundle


def nodes_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if op.is_op(node)]


def exchange(model: ir.Model) -> None:
    """The experts of two layers, with all that is called after them."""
    first, second = nodes_of(model)
    for index in (2, 3, 4):
        ours, theirs = first.inputs[index], second.inputs[index]
        first.replace_input_with(index, theirs)
        second.replace_input_with(index, ours)
    ours, theirs = dict(first.outputs[0].metadata_props), dict(second.outputs[0].metadata_props)
    first.outputs[0].metadata_props.update(theirs)
    second.outputs[0].metadata_props.update(ours)
    first.name, second.name = second.name, first.name


def leave_out(model: ir.Model) -> None:
    """The experts of the second layer, with their weights."""
    node = nodes_of(model)[1]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[1], replace_graph_outputs=True)
    names = [str(value.name) for value in node.inputs[2:] if value is not None]
    model.graph.remove(node, safe=True)
    for name in names:
        del model.graph.initializers[name]


def test_what_was_attached_is_in_its_place(layers, packed):
    for bundle in (layers, packed):
        verdict = judged(bundle)
        assert verdict.passed, verdict.departures


def test_experts_of_another_layer_are_found(layers, tmp_path):
    verdict = judged(plant(layers, tmp_path / "planted", {"": Fault(exchange, "")}))
    assert {departure.module for departure in verdict.departures} >= set(LAYERS)
    assert "is another projection" in verdict.departures[0].reason


def test_a_module_that_graph_and_manifest_leave_out_is_found(layers, tmp_path):
    planted = plant(layers, tmp_path / "planted", {"": Fault(leave_out, "")})
    weights = {name: recipe for name, recipe in planted.manifest.refit["weights"].items() if LAYERS[1] not in name}
    refit = {**planted.manifest.refit, "weights": weights}
    manifest = dataclasses.replace(planted.manifest, refit=refit)
    write_manifest(planted.folder, manifest)
    verdict = judged(Bundle(planted.folder, manifest))
    assert [departure.module for departure in verdict.departures] == [LAYERS[1]]


def test_a_reader_that_passes_the_op_by_is_found(packed, tmp_path):
    def pass_by(model: ir.Model) -> None:
        reader = next(node for node in model.graph if node.op_type == "Neg")
        reader.replace_input_with(0, nodes_of(model)[0].inputs[1])
        model.graph.sort()

    (departure, *_) = judged(plant(packed, tmp_path / "planted", {"": Fault(pass_by, "")})).departures
    assert departure.module == "model.layers.0.self_attn.q_proj"
    assert "without what the experts add" in departure.reason


def test_the_graph_without_the_op_is_what_it_was(layers, packed):
    for bundle in (layers, packed):
        model, foreign = read_graph(bundle), ir.load(Path(bundle.manifest.attached["source"]))
        detach(model)
        ours, theirs = (
            [(node.op_type, [v.name for v in node.inputs if v], [v.name for v in node.outputs]) for node in each.graph]
            for each in (model, foreign)
        )
        assert ours == theirs
