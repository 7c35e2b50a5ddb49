"""Reading a bundle's graph: only what its manifest, its opset and its data file allow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from teamlora_export.bundle import read_bundle
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import read_graph


@pytest.fixture
def folder(make_bundle, tmp_path) -> Path:
    """A bundle of its own."""
    return Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "bundle"))


def change_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    change(graph)
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def set_last_weight(field: str, value: str) -> Callable[[onnx.ModelProto], None]:
    """Of where the last weight is."""

    def change(graph: onnx.ModelProto) -> None:
        for entry in graph.graph.initializer[-1].external_data:
            entry.value = value if entry.key == field else entry.value

    return change


def test_a_graph_whose_weights_are_in_another_file_is_refused(folder):
    change_graph(folder, set_last_weight("location", "../secret"))
    with pytest.raises(ExportError, match=r"has a weight in '../secret'"):
        read_graph(read_bundle(folder))


def test_a_giant_is_refused_before_it_is_read(folder):
    os.truncate(folder / "model.onnx", 3 << 30)
    with pytest.raises(ExportError, match=r"model\.onnx: has 3,221,225,472 bytes; such a file has 536,870,912 at most"):
        read_graph(read_bundle(folder))


@pytest.mark.parametrize("ports", ["input", "output"])
def test_a_graph_with_other_ports_than_its_manifest_lists_is_refused(ports, folder):
    """Every runtime goes by the manifest's."""
    change_graph(folder, lambda graph: getattr(graph.graph, ports).pop())
    with pytest.raises(ExportError, match="has not the inputs and outputs that its manifest lists"):
        read_graph(read_bundle(folder))


@pytest.mark.parametrize(
    ("field", "value"), [("length", "1"), ("offset", "1000000000"), ("offset", "-64"), ("length", "9" * 18)]
)
def test_a_weight_that_its_file_does_not_hold_is_refused(field, value, folder):
    """Whoever maps the file reads beyond its end, which ends the process with a signal."""
    change_graph(folder, set_last_weight(field, value))
    with pytest.raises(ExportError, match=r"model\.onnx.*Export the model again"):
        read_graph(read_bundle(folder))


def test_a_data_file_that_ends_early_is_refused(folder):
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ExportError, match=r"model\.onnx\.data: has 1,000 bytes, which do not hold"):
        read_graph(read_bundle(folder))


def test_a_function_of_another_opset_is_refused(folder):
    """It would be inlined beside nodes of another version, under one number."""

    def change(graph: onnx.ModelProto) -> None:
        for opset in graph.functions[0].opset_import:
            opset.version -= not opset.domain

    change_graph(folder, change)
    with pytest.raises(ExportError, match="has functions of another opset than its own"):
        read_graph(read_bundle(folder))


def test_a_graph_that_can_be_read_but_not_written_is_refused(folder):
    """One changed byte can leave an attribute without a kind, which is only seen as the graph is written."""

    def change(graph: onnx.ModelProto) -> None:
        attribute = next(attribute for node in graph.graph.node for attribute in node.attribute if attribute.type == 2)
        attribute.type = onnx.AttributeProto.UNDEFINED

    change_graph(folder, change)
    with pytest.raises(ExportError, match="is no graph that can be read"):
        read_graph(read_bundle(folder))
