"""The graph that a parser gets: with the op for the plugin, or with its bodies inlined."""

from __future__ import annotations

import onnx_ir as ir
import pytest

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
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert sum(op.is_op(node) for node in ir.load(path).graph) == 16
    with pytest.raises(ExportError, match="exists"):
        write_graph(bundle, "fp16", tmp_path / "graph", for_plugin=True, reporter=QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]


def test_an_inlined_bundle_has_nothing_for_the_plugin(make_bundle, tmp_path):
    inlined = make_bundle("llama", op_form="standard")
    with (
        pytest.raises(ExportError, match="--op standard"),
        prepared_model(inlined, "fp16", tmp_path, for_plugin=True, reporter=QUIET),
    ):
        pass
    assert not list(tmp_path.iterdir())
