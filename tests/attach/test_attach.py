"""`attach` on small foreign graphs: every form of a product, and everything that is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from foreign_graphs import FORMS, IDS, IN, NAME, OUT, PATH, Graph, adapter_of, biased, matmul, nbits, run, save_base
from formula import by_formula

from teamlora_export.attach.exact import DequantizeProducts
from teamlora_export.attach.products import find_products
from teamlora_export.attach.run import attach
from teamlora_export.errors import ExportError
from teamlora_export.graph.quantized import dequantised
from teamlora_export.validate.run import validate_bundle


def weight(rng: np.random.Generator, width: int = OUT) -> np.ndarray:
    return rng.normal(size=(IN, width)).astype(np.float32)


def nodes_of(path: Path) -> dict[str, bytes]:
    """Each node's bytes, by its name."""
    return {node.name: node.SerializeToString() for node in onnx.load(path, load_external_data=False).graph.node}


def assert_adds_experts(spec, foreign: Path, bundle: Path, x: str = "embedded") -> None:
    """The attached graph gives what the foreign one does and, column by column, what the experts add."""
    x, base = run(foreign, x, "last_hidden_state")
    (found,) = run(bundle / "model.onnx", "last_hidden_state")
    x = x.reshape(*base.shape[:-1], -1).astype(np.float64)
    expected, start = [], 0
    for projection in spec.projections.values():
        end = start + projection.out_features
        expected.append(by_formula(projection, x, base[..., start:end].astype(np.float64)))
        start = end
    assert start == base.shape[-1]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=-1), atol=2e-5, rtol=1e-5)
    assert np.abs(found - base).max() > 0.1


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("form", FORMS)
def test_the_op_stands_behind_every_form_of_a_product(form, opset, rng, tmp_path):
    graph = Graph(opset)
    foreign = graph.save(tmp_path / "foreign", FORMS[form](graph, graph.embed(rng), weight(rng)))
    spec = adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out")
    assert_adds_experts(spec, foreign, bundle.folder)
    assert validate_bundle(bundle).passed


@pytest.mark.parametrize("form", [name for name in FORMS if "Integer" in name or "Dynamic" in name])
def test_products_of_integers_are_judged_as_what_they_mean(form, rng, tmp_path):
    graph, w = Graph(), weight(rng)
    foreign = graph.save(tmp_path / "foreign", FORMS[form](graph, graph.embed(rng), w))
    x, rounded = run(foreign, "embedded", "last_hidden_state")
    model = ir.load(foreign)
    assert DequantizeProducts()(model).modified
    (product,) = find_products(model.graph)
    meant = dequantised(product.node, np.float64)
    np.testing.assert_allclose(meant, w, atol=np.ptp(w) / 255)
    ir.save(model, tmp_path / "exact.onnx")
    (found,) = run(tmp_path / "exact.onnx", "last_hidden_state")
    bias = np.linspace(-1, 1, OUT) if product.node.outputs[0] is not product.output else 0.0
    np.testing.assert_allclose(found, x.astype(np.float64) @ meant + bias, atol=2e-5)
    assert np.abs(rounded - found).max() > 1e-3


@pytest.mark.parametrize(("opset", "dtype"), [(13, "fp16"), (21, "bf16")])
def test_an_adapter_is_attached_in_16_bits(opset, dtype, rng, tmp_path):
    graph = Graph(opset)
    foreign = graph.save(tmp_path / "foreign", nbits(graph, graph.embed(rng), weight(rng)))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", adapter_dtype=dtype)
    assert bundle.manifest.op["adapter_dtype"] == dtype
    assert (bundle.folder / "adapter.onnx.data").stat().st_size < 4 * (8 * IN + 6 * OUT)
    assert validate_bundle(bundle).passed


@pytest.mark.parametrize("form", [name for name in FORMS if "Bnb4" in name])
def test_codes_of_bitsandbytes_are_read_and_prove_a_module(form, rng, tmp_path):
    graph, w = Graph(), weight(rng)
    foreign = graph.save(tmp_path / "foreign", FORMS[form](graph, graph.embed(rng), w))
    x, found = run(foreign, "embedded", "last_hidden_state")
    (product,) = find_products(ir.load(foreign).graph)
    meant = dequantised(product.node, np.float64)
    np.testing.assert_allclose(x.astype(np.float64) @ meant, found, atol=2e-5)
    spec = adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attach(
        foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(save_base(tmp_path / "base", {PATH: w}))
    )
    assert "weights" in bundle.manifest.attached["projections"][PATH]
    assert_adds_experts(spec, foreign, bundle.folder)


def test_other_nodes_stay_byte_for_byte(rng, tmp_path):
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", biased(graph, graph.embed(rng), weight(rng)))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out")
    before, after = nodes_of(foreign), nodes_of(bundle.model)
    changed = [name for name, data in before.items() if after[name] != data]
    assert changed == [f"{NAME}/Add_output_0/Add"]
    node = onnx.NodeProto.FromString(after[changed[0]])
    node.output[0] = node.output[0].removesuffix("/base")
    assert node.SerializeToString() == before[changed[0]]


@pytest.mark.parametrize("adapted", ["qkv", "qv"])
def test_packed_projections_share_a_node(adapted, rng, tmp_path):
    graph, widths = Graph(), {"q": 16, "k": 8, "v": 8}
    w = weight(rng, 32)
    whole = nbits(graph, graph.embed(rng), w, "/model/layers.0/attn/qkv_proj")
    graph.node("Split", [whole, graph.weight("sizes", np.array([16, 8, 8]))], ["q", "k", "v"], axis=-1)
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", list(adapted), "read", axis=-1))
    sizes = {f"model.layers.0.self_attn.{each}_proj": (IN, widths[each]) for each in adapted}
    spec = adapter_of(rng, tmp_path / "adapter", sizes)
    with pytest.raises(ExportError, match="parts of one size"):
        attach(foreign, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    parts = dict(zip("qkv", np.split(w, [16, 24], axis=1), strict=True))
    names = {f"model.layers.0.self_attn.{each}_proj": part for each, part in parts.items()}
    base = save_base(tmp_path / "base", names)
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    assert_adds_experts(spec, foreign, bundle.folder)
    assert bundle.manifest.op["nodes"] == (1 if adapted == "qkv" else 2)
    base.rename(tmp_path / "moved")
    assert validate_bundle(bundle).passed
    # What the base calls keys is behind the queries here.
    exchanged = {**names, "model.layers.0.self_attn.q_proj": np.flip(parts["q"], axis=1)}
    other = save_base(tmp_path / "other", exchanged)
    with pytest.raises(ExportError, match="has other weights in the base"):
        attach(foreign, tmp_path / "adapter", tmp_path / "again", base_source=str(other))


@pytest.mark.parametrize(("block", "modules", "nodes"), [("mlp", ("up", "gate"), 2), ("self_attn", ("q", "k", "v"), 1)])
@pytest.mark.parametrize("form", [matmul, nbits])
def test_three_products_that_read_one_value_share_a_node(form, block, modules, nodes, rng, tmp_path):
    """Two do not: putting them side by side costs more than another node."""
    graph = Graph()
    x = graph.embed(rng)
    made = [form(graph, x, weight(rng), f"/model/layers.0/{block}/{name}_proj") for name in modules]
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", made, "read", axis=-1))
    sizes = {f"model.layers.0.{block}.{name}_proj": (IN, OUT) for name in modules}
    spec = adapter_of(rng, tmp_path / "adapter", sizes)
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out")
    assert_adds_experts(spec, foreign, bundle.folder)
    assert bundle.manifest.op["nodes"] == nodes
    assert validate_bundle(bundle).passed


def test_a_module_that_the_graph_has_in_pieces(rng, tmp_path):
    graph = Graph()
    x = graph.embed(rng)
    made = [matmul(graph, x, weight(rng), f"/model/layers.0/mlp/{name}_proj") for name in ("up", "gate")]
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", made[::-1], "read", axis=-1))
    spec = adapter_of(rng, tmp_path / "adapter", {"model.layers.0.mlp.gate_up_proj": (IN, 2 * OUT)})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out")
    assert_adds_experts(spec, foreign, bundle.folder)
    assert validate_bundle(bundle).passed


def refusal(foreign: Path, folder: Path, **options: object) -> str:
    """What `attach` says of a graph that it does not take; nothing may be written."""
    with pytest.raises(ExportError) as caught:
        attach(foreign, folder / "adapter", folder / "out", **options)
    assert not (folder / "out").exists()
    assert not list(folder.glob(".*"))
    return str(caught.value)


def test_a_missing_projection_is_told_beside_what_was_found(rng, tmp_path):
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", matmul(graph, graph.embed(rng), weight(rng)))
    missing = "model.layers.1.self_attn.o_proj"
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT), missing: (IN, OUT)})
    said = refusal(foreign, tmp_path)
    assert f"{missing}: is missing" in said
    assert "found: 1 of 2 modules (1 by name)" in said


@pytest.mark.parametrize("shared", [True, False])
def test_a_doubled_projection_is_refused(shared, rng, tmp_path):
    graph = Graph()
    x, w = graph.embed(rng), weight(rng)
    first = matmul(graph, x, w)
    if shared:
        second = graph.node("MatMul", [x, graph.weights[-1].name], "again")
    else:
        second = matmul(graph, x, w, NAME.replace("attn", "self_attn"))
    foreign = graph.save(tmp_path / "foreign", graph.node("Add", [first, second], "both"))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert f"{PATH}: is doubled" in refusal(foreign, tmp_path)


def test_a_projection_of_another_size_is_refused(rng, tmp_path):
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", matmul(graph, graph.embed(rng), weight(rng)))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT + 8)})
    assert "maps 32 to 24 features" in refusal(foreign, tmp_path)


def test_names_that_contradict_each_other_are_refused(rng, tmp_path):
    graph = Graph()
    x = graph.embed(rng)
    w = graph.weight("model.layers.0.self_attn.k_proj.weight", weight(rng))
    foreign = graph.save(tmp_path / "foreign", graph.node("MatMul", [x, w], f"{NAME}/MatMul_output_0"))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert "is contradicted by" in refusal(foreign, tmp_path)


def test_a_name_that_the_weights_contradict_is_refused(rng, tmp_path):
    graph = Graph()
    x, names = graph.embed(rng), ("up", "gate")
    ws = {name: weight(rng) for name in names}
    made = [matmul(graph, x, ws[name], f"/model/layers.0/mlp/{name}_proj") for name in names]
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", made, "read", axis=-1))
    adapter_of(rng, tmp_path / "adapter", {f"model.layers.0.mlp.{name}_proj": (IN, OUT) for name in names})
    exchanged = dict(zip((f"model.layers.0.mlp.{name}_proj" for name in names), [ws["gate"], ws["up"]], strict=True))
    said = refusal(foreign, tmp_path, base_source=str(save_base(tmp_path / "base", exchanged)))
    assert "has other weights in the base" in said
    assert "gate_proj/MatMul_output_0/MatMul has its weights" in said


def test_a_projection_without_a_name_is_found_by_its_weights(rng, tmp_path):
    graph = Graph()
    x, w = graph.embed(rng), weight(rng)
    made = [nbits(graph, x, each, name) for name, each in (("a", weight(rng)), ("b", w))]
    foreign = graph.save(tmp_path / "foreign", made[1])
    spec = adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert "is missing" in refusal(foreign, tmp_path)
    base = save_base(tmp_path / "base", {PATH: w})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    assert_adds_experts(spec, foreign, bundle.folder)
    assert bundle.manifest.attached["projections"] == {PATH: ["weights"]}


def test_operators_that_hold_projections_are_named(rng, tmp_path):
    graph = Graph()
    x = graph.embed(rng)
    inputs = [x, graph.weight("qkv", weight(rng, 96)), graph.weight("bias", np.zeros(96, np.float32))]
    result = graph.node("Attention", inputs, "attended", domain="com.microsoft", num_heads=4)
    foreign = graph.save(tmp_path / "foreign", result)
    adapter_of(rng, tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": (IN, 32)})
    said = refusal(foreign, tmp_path)
    assert "com.microsoft.Attention holds projections inside" in said
    assert "--disable_attention" in said


def test_a_scaled_product_is_no_projection(rng, tmp_path):
    graph = Graph()
    inputs = [graph.embed(rng), graph.weight(f"{NAME}.weight", weight(rng))]
    result = graph.node("FusedMatMul", inputs, "scaled", domain="com.microsoft", alpha=0.125)
    foreign = graph.save(tmp_path / "foreign", result)
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert "is missing" in refusal(foreign, tmp_path)


@pytest.mark.parametrize("inverse", ["Reciprocal", "Div"])
def test_the_weight_of_a_norm_is_no_scale(inverse, rng, tmp_path):
    """It has AWQ's form where the norm is written out in pieces; the op reads what comes after it."""
    graph = Graph()
    x = graph.embed(rng)
    size = graph.node("Sqrt", [graph.node("ReduceL2", [x, graph.weight("axes", np.array([-1]))], "l2")], "size")
    one = [graph.weight("one", np.float32(1))] if inverse == "Div" else []
    normal = graph.node("Mul", [x, graph.node(inverse, [*one, size], "inverse")], "normal")
    read = graph.node("Mul", [normal, graph.weight("norm", np.linspace(0.5, 2, IN, dtype=np.float32))], "normed")
    foreign = graph.save(tmp_path / "foreign", nbits(graph, read, weight(rng)))
    spec = adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out")
    assert_adds_experts(spec, foreign, bundle.folder, "normed")


def test_weights_in_files_go_into_one(rng, tmp_path):
    graph = Graph()
    result = nbits(graph, graph.embed(rng), weight(rng))
    foreign = graph.save(tmp_path / "foreign", result, external="weights.bin")
    spec = adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    bundle = attach(foreign.parent, tmp_path / "adapter", tmp_path / "out")
    assert bundle.data.read_bytes() == (foreign.parent / "weights.bin").read_bytes()
    onnx.load(foreign)
    session = ort.InferenceSession(bundle.model)
    (found,) = session.run(None, {"input_ids": IDS})
    x, base = run(foreign, "embedded", "last_hidden_state")
    np.testing.assert_allclose(
        found, by_formula(spec.projections[PATH], x.astype(float), base.astype(float)), atol=2e-5
    )


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "link", "missing"])
def test_weights_elsewhere_are_refused(location, rng, tmp_path):
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", matmul(graph, graph.embed(rng), weight(rng)), external="weights.bin")
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    (foreign.parent / "link").symlink_to(tmp_path / "secret")
    model = onnx.load(foreign, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location
    foreign.write_bytes(model.SerializeToString())
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    said = refusal(foreign, tmp_path)
    assert any(words in said for words in ("not in its folder", "is a link to a file outside", "is missing, and"))


def test_weights_beyond_the_end_of_their_file_are_refused(rng, tmp_path):
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", matmul(graph, graph.embed(rng), weight(rng)), external="weights.bin")
    (foreign.parent / "weights.bin").write_bytes(bytes(100))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert "do not hold" in refusal(foreign, tmp_path)
