"""Foreign graphs that are damaged, made to do harm, or of a form that `attach` has to leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_graphs import IN, NAME, OUT, PATH, Graph, adapter_of, matmul, nbits
from onnx import TensorProto, helper

from teamlora_export.attach.run import attach
from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.validate.run import validate_bundle

FORM = {"matmul": matmul, "nbits": nbits}
OUTPUT = f"{NAME}/MatMul_output_0"


def edited(folder: Path, edit: Callable[[onnx.ModelProto], object], form: str = "matmul", external: str = "") -> Path:
    """A graph of one product, changed by `edit`; and an adapter on it."""
    rng, graph = np.random.default_rng(1), Graph()
    w = rng.normal(size=(IN, OUT)).astype(np.float32)
    foreign = graph.save(folder / "foreign", FORM[form](graph, graph.embed(rng), w), external=external or None)
    adapter_of(rng, folder / "adapter", {PATH: (IN, OUT)})
    model = onnx.load(foreign, load_external_data=False)
    edit(model)
    foreign.write_bytes(model.SerializeToString())
    return foreign


def attached(foreign: Path) -> Bundle:
    return attach(foreign, foreign.parents[1] / "adapter", foreign.parents[1] / "out")


def refused(foreign: Path) -> str:
    """What is said; nothing may be written."""
    with pytest.raises(ExportError) as caught:
        attached(foreign)
    assert not (foreign.parents[1] / "out").exists()
    return str(caught.value)


def product_of(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type.startswith("MatMul"))


def without_attribute(name: str) -> Callable[[onnx.ModelProto], object]:
    def edit(model: onnx.ModelProto) -> None:
        node = product_of(model)
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)

    return edit


DAMAGED: dict[str, tuple[str, Callable[[onnx.ModelProto], object]]] = {
    "is a MatMul without its input 1": ("matmul", lambda model: product_of(model).input.pop()),
    "is a MatMulNBits without its input 2": ("nbits", lambda model: product_of(model).input.pop()),
    "whose K is no size": ("nbits", without_attribute("K")),
    "whose N is no size": ("nbits", without_attribute("N")),
    "has not as many numbers": ("matmul", lambda model: model.graph.initializer[0].ClearField("raw_data")),
    "its own result": ("matmul", lambda model: product_of(model).input.__setitem__(0, "last_hidden_state")),
}


@pytest.mark.parametrize("said", DAMAGED)
def test_a_damaged_graph_is_refused_in_a_sentence(said, tmp_path):
    form, edit = DAMAGED[said]
    assert said in refused(edited(tmp_path, edit, form))


@pytest.mark.parametrize(("key", "value"), [("offset", "-5"), ("offset", "abc"), ("length", "-1")])
def test_a_wrong_place_in_a_file_is_told(key, value, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        next(each for each in model.graph.initializer[1].external_data if each.key == key).value = value

    said = refused(edited(tmp_path, edit, external="weights.bin"))
    assert f"the {key} of '{NAME[1:].replace('/', '.')}.weight' is '{value}'" in said


def test_a_functions_constant_in_another_file_is_refused(tmp_path):
    held = TensorProto(name="c", data_type=1, dims=[OUT], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "64")):
        held.external_data.add(key=key, value=value)

    def edit(model: onnx.ModelProto) -> None:
        nodes = [helper.make_node("Constant", [], ["c"], value=held), helper.make_node("Add", ["a", "c"], ["b"])]
        model.functions.append(helper.make_function("own", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 20)]))
        model.opset_import.append(helper.make_opsetid("own", 1))
        last = model.graph.node[-1]
        made = helper.make_node("F", [last.input[0]], ["made"], domain="own", name="f")
        last.input[0] = "made"
        model.graph.node.insert(len(model.graph.node) - 1, made)

    foreign = edited(tmp_path, edit)
    (tmp_path / "secret").write_bytes(bytes(1 << 10))
    assert "holds a constant in another file" in refused(foreign)


def test_names_that_are_taken_are_not_taken_again(tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        taken = [f"{OUTPUT}/base", PATH, f"{PATH}/MixedExpertProjection"]
        for index, name in enumerate(taken):
            model.graph.node.append(helper.make_node("Identity", ["embedded"], [name], name=f"taken {index}"))
            model.graph.output.append(helper.make_tensor_value_info(name, 1, ["b", "s", None]))

    bundle = attached(edited(tmp_path, edit))
    onnx.checker.check_model(onnx.load(bundle.model))
    assert validate_bundle(bundle).passed


def test_a_graph_inside_of_a_branch_is_named(tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        graph, branches = model.graph, {}
        for kind in ("then", "else"):
            nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
            nodes[-1].output[0] = f"of {kind}"
            result = helper.make_tensor_value_info(f"of {kind}", 1, None)
            branches[f"{kind}_branch"] = helper.make_graph(nodes, kind, [], [result])
        del graph.node[:]
        graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
        graph.node.append(
            helper.make_node("If", ["use_cache_branch"], ["last_hidden_state"], name="merged", **branches)
        )

    said = refused(edited(tmp_path, edit))
    assert "If holds 2 projections in graphs inside of it (merged)" in said
    assert "--no-post-process" in said


def test_weights_that_share_bytes_are_written_once(rng, tmp_path):
    folder, rows = tmp_path / "foreign", 4096
    folder.mkdir()
    rng.normal(size=(rows, IN)).astype(np.float32).tofile(folder / "w.bin")
    rng.normal(size=(IN, OUT)).astype(np.float32).tofile(folder / "v.bin")
    held = []
    for name, shape, location in (("a", [rows, IN], "w.bin"), ("b", [rows, IN], "w.bin"), ("w", [IN, OUT], "v.bin")):
        held.append(TensorProto(name=name, data_type=1, dims=shape, data_location=TensorProto.EXTERNAL))
        held[-1].external_data.add(key="location", value=location)
    graph = Graph(weights=held)
    read = [graph.node("Gather", [name, "input_ids"], f"of {name}") for name in "ab"]
    foreign = graph.save(folder, graph.node("MatMul", [graph.node("Add", read, "x"), "w"], OUTPUT))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attached(foreign)
    assert bundle.data.stat().st_size == sum((folder / name).stat().st_size for name in ("w.bin", "v.bin"))
    assert validate_bundle(bundle).passed


@pytest.mark.parametrize("below", ["", "cpu_and_mobile/int4"])
def test_folders_of_the_hubs_cache_are_read(below, rng, tmp_path):
    repository = tmp_path / "models--org--name"
    folder, blobs = repository / "snapshots" / ("a" * 40) / below, repository / "blobs"
    for each in (folder, blobs):
        each.mkdir(parents=True)
    edited(tmp_path, lambda model: None, external="model.onnx.data")
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / "foreign" / name).rename(blobs / name)
        (folder / name).symlink_to(blobs / name)
    attach(folder, tmp_path / "adapter", tmp_path / "out")
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to(tmp_path / "out" / "manifest.json")
    with pytest.raises(ExportError, match="is a link to a file outside"):
        attach(folder, tmp_path / "adapter", tmp_path / "again")


def test_products_of_several_types_are_judged_in_that_of_the_adapted(rng, tmp_path):
    graph = Graph()
    first = matmul(graph, graph.embed(rng), rng.normal(size=(IN, IN)).astype(np.float32) / 8, NAME.replace("o_", "v_"))
    low = graph.node("Cast", [first], "low", to=TensorProto.FLOAT16)
    result = matmul(graph, low, (rng.normal(size=(IN, OUT)) / 8).astype(np.float16))
    foreign = graph.save(tmp_path / "foreign", graph.node("Cast", [result], "high", to=TensorProto.FLOAT))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attached(foreign)
    assert bundle.manifest.dtype == "fp16"
    assert validate_bundle(bundle).passed


def test_dequantize_linear_may_say_its_type(rng, tmp_path):
    graph = Graph(23)
    low = graph.node("Cast", [graph.embed(rng)], "low", to=TensorProto.FLOAT16)
    codes = graph.weight(f"{NAME}.qweight", rng.integers(-7, 8, (IN, OUT)).astype(np.int8))
    scales = graph.weight(f"{NAME}.scales", np.full(OUT, 0.02, np.float16))
    made = graph.node("DequantizeLinear", [codes, scales], "made", axis=1, output_dtype=TensorProto.FLOAT16)
    result = graph.node("MatMul", [low, made], OUTPUT)
    foreign = graph.save(tmp_path / "foreign", graph.node("Cast", [result], "high", to=TensorProto.FLOAT))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert validate_bundle(attached(foreign)).passed
