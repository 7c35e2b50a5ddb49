"""`attach` against a base's weights: what is the same, what only resembles it, and what cannot be told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from foreign_graphs import FORMS, IN, OUT, PATH, Graph, adapter_of, dynamic, matmul, nbits, save_base

from teamlora_export.attach.likeness import likeness
from teamlora_export.attach.numbers import weight_of
from teamlora_export.attach.products import find_products
from teamlora_export.attach.run import attach
from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.quantized import Scheme, quantised
from teamlora_export.graph.read import read_graph

ATTENTION = "model.layers.0.self_attn"


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def read_by_op(bundle: Bundle) -> str:
    """Name of what the one node of the op reads."""
    (node,) = (node for node in read_graph(bundle).graph if op.is_op(node))
    return str(node.inputs[0].name)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_compared(form, rng, tmp_path):
    graph, w = Graph(), normal(rng, IN, OUT)
    foreign = graph.save(tmp_path / "foreign", FORMS[form](graph, graph.embed(rng), w))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    base = save_base(tmp_path / "base", {PATH: w})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    assert bundle.manifest.attached["projections"] == {PATH: ["name", "weights"]}
    (product,) = find_products(ir.load(foreign).graph)
    whole = weight_of(product, np.float64)
    np.testing.assert_allclose(whole, w, atol=0.5)
    chosen = np.array([0, 3, OUT - 1])
    np.testing.assert_allclose(weight_of(product, np.float64, chosen), whole[:, chosen], rtol=1e-12)
    other = save_base(tmp_path / "other", {PATH: normal(rng, IN, OUT)})
    with pytest.raises(ExportError, match="has other weights in the base"):
        attach(foreign, tmp_path / "adapter", tmp_path / "again", base_source=str(other))


FACTORS = {
    "multiplied by 0.12": lambda rng: np.float32(0.125),
    "factor for each of the rows": lambda rng: np.exp(0.3 * normal(rng, IN, 1)),
    "factor for each of the columns": lambda rng: np.exp(0.3 * normal(rng, 1, OUT)),
}


@pytest.mark.parametrize("form", [matmul, nbits])
@pytest.mark.parametrize("said", FACTORS)
def test_a_factor_on_the_weights_is_no_rounding(said, form, rng, tmp_path):
    graph, w = Graph(), normal(rng, IN, OUT)
    foreign = graph.save(tmp_path / "foreign", form(graph, graph.embed(rng), w * FACTORS[said](rng)))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    base = save_base(tmp_path / "base", {PATH: w})
    with pytest.raises(ExportError, match=said):
        attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))


def test_a_factor_on_one_channel_of_many_is_seen(rng):
    w = normal(rng, 2048, 16)
    w[7] *= 1.6
    rounded = quantised(w, Scheme(4)).dequantised(2048, 4)
    w[7] /= 1.6
    found = likeness([w.T], rounded.T)
    assert not found.is_same
    assert "in one of the rows" in str(found.problem)


@pytest.mark.parametrize("inputs", [32, 576])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4), Scheme(4, True), Scheme(4, False, 128)], ids=str)
def test_rounding_is_no_factor(scheme, inputs):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # Channels of different sizes, as models have them.
        w = normal(rng, inputs, 16) * np.exp(0.4 * normal(rng, inputs, 1))
        rounded = quantised(w, scheme).dequantised(inputs, scheme.bits)
        found = likeness([w.T], rounded.T)
        assert found.is_same, found


def test_codes_packed_in_another_order_are_refused(rng, tmp_path):
    graph, ws = Graph(), {each: normal(rng, IN, 16) for each in "qkv"}
    packed = np.concatenate([ws["k"], ws["q"], ws["v"]], axis=1)
    whole = dynamic(graph, graph.embed(rng), packed, "/model/layers.0/attn/qkv_proj")
    graph.node("Split", [whole, graph.weight("sizes", np.array([16, 16, 16]))], ["k", "q", "v"], axis=-1)
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", ["k", "q", "v"], "read", axis=-1))
    adapter_of(rng, tmp_path / "adapter", {f"{ATTENTION}.{each}_proj": (IN, 16) for each in "qkv"})
    base = save_base(tmp_path / "base", {f"{ATTENTION}.{each}_proj": w for each, w in ws.items()})
    with pytest.raises(ExportError, match=r"q_proj: has other weights in the base"):
        attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))


def unread(graph: Graph, x: str, outputs: int, name: str) -> str:
    """A form whose weights are not read."""
    codes = graph.weight(f"{name}.codes", np.zeros(IN * outputs // 2, np.uint8))
    sizes = graph.weight(f"{name}.absmax", np.ones(IN * outputs // 32, np.float32))
    attributes = {"K": IN, "N": outputs, "block_size": 32, "quant_type": 7}
    return graph.node("MatMulBnb4", [x, codes, sizes], f"{name}/MatMul_output_0", domain="com.microsoft", **attributes)


def test_a_form_that_is_not_read_proves_nothing(rng, tmp_path, monkeypatch):
    monkeypatch.setattr("teamlora_export.attach.weigh.weight_of", lambda *_, **__: None)
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", unread(graph, graph.embed(rng), OUT, "/model/layers.0/attn/o_proj"))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    base = save_base(tmp_path / "base", {PATH: normal(rng, IN, OUT)})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    assert bundle.manifest.attached["projections"] == {PATH: ["name"]}

    graph = Graph()
    whole = unread(graph, graph.embed(rng), 48, "/model/layers.0/attn/qkv_proj")
    graph.node("Split", [whole, graph.weight("sizes", np.array([16, 16, 16]))], ["q", "k", "v"], axis=-1)
    packed = graph.save(tmp_path / "packed", graph.node("Concat", ["q", "k", "v"], "read", axis=-1))
    sizes = {f"{ATTENTION}.{each}_proj": (IN, 16) for each in "qkv"}
    adapter_of(rng, tmp_path / "on_packed", sizes)
    base = save_base(tmp_path / "base_of_packed", {path: normal(rng, *size) for path, size in sizes.items()})
    with pytest.raises(ExportError, match="whose order nothing proves: the form of its weights is not read"):
        attach(packed, tmp_path / "on_packed", tmp_path / "again", base_source=str(base))


def normed(graph: Graph, rng: np.random.Generator, norm: str, weight: np.ndarray, factor: str = "factor") -> str:
    """A norm with `weight`, and a factor for each channel behind it."""
    inputs = [graph.embed(rng), graph.weight("norm.weight", weight)]
    result = graph.node(norm, inputs, "normal", axis=-1)
    return graph.node("Mul", [result, graph.weight(factor, np.linspace(0.5, 2, IN, dtype=np.float32))], "scaled")


@pytest.mark.parametrize("norm", ["LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"])
def test_the_weight_behind_a_norm_of_ones_is_no_scale(norm, rng, tmp_path):
    graph = Graph(23 if norm == "RMSNormalization" else 20)
    read = normed(graph, rng, norm, np.ones(IN, np.float32))
    foreign = graph.save(tmp_path / "foreign", nbits(graph, read, normal(rng, IN, OUT)))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert read_by_op(attach(foreign, tmp_path / "adapter", tmp_path / "out")) == "scaled"


@pytest.mark.parametrize("is_scale", [True, False])
def test_weights_tell_a_scale_from_the_weight_of_a_norm(is_scale, rng, tmp_path):
    graph, w = Graph(), normal(rng, IN, OUT)
    # Likely a scale, but for what the weights say.
    read = normed(graph, rng, "LayerNormalization", np.full(IN, 1.5, np.float32))
    factor = np.linspace(0.5, 2, IN, dtype=np.float32)[:, None]
    foreign = graph.save(tmp_path / "foreign", nbits(graph, read, w / factor if is_scale else w))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    assert read_by_op(attach(foreign, tmp_path / "adapter", tmp_path / "alone")) == "normal"
    base = save_base(tmp_path / "base", {PATH: w})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    assert read_by_op(bundle) == ("normal" if is_scale else "scaled")


def test_a_scale_may_divide(rng, tmp_path):
    graph, w = Graph(), normal(rng, IN, OUT)
    scale = np.linspace(0.5, 2, IN, dtype=np.float32)
    read = graph.node("Div", [graph.embed(rng), graph.weight("awq_scales", scale)], "scaled")
    foreign = graph.save(tmp_path / "foreign", nbits(graph, read, w * scale[:, None]))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    base = save_base(tmp_path / "base", {PATH: w})
    bundle = attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(base))
    assert read_by_op(bundle) == "embedded"
    assert bundle.manifest.attached["projections"] == {PATH: ["name", "weights"]}


def test_a_weight_of_two_names_is_refused(rng, tmp_path):
    graph, w = Graph(), normal(rng, IN, OUT)
    foreign = graph.save(tmp_path / "foreign", matmul(graph, graph.embed(rng), w))
    adapter_of(rng, tmp_path / "adapter", {PATH: (IN, OUT)})
    names = {f"{tower}.{PATH}": w for tower in ("one", "two")}
    with pytest.raises(ExportError, match=r"may be one\.model\.layers\.0"):
        attach(foreign, tmp_path / "adapter", tmp_path / "out", base_source=str(save_base(tmp_path / "base", names)))


def test_columns_of_large_weights_are_read_alone(tmp_path, rng):
    """What is compared of a weight behind DequantizeLinear is little beside the whole."""
    import tracemalloc

    graph, inputs, outputs = Graph(21), 512, 4096
    stored = {
        "codes": rng.integers(-7, 8, (inputs, outputs)).astype(np.int8),
        "scales": np.full((inputs // 32, outputs), 0.01, np.float32),
    }
    names = [graph.weight(name, array) for name, array in stored.items()]
    made = graph.node("DequantizeLinear", names, "made", axis=0, block_size=32)
    x = graph.node("Gather", [graph.weight("table", normal(rng, 11, inputs)), "input_ids"], "embedded")
    foreign: Path = graph.save(tmp_path, graph.node("MatMul", [x, made], "y"), external="weights.bin")
    (product,) = find_products(ir.load(foreign).graph)
    tracemalloc.start()
    few = weight_of(product, columns=np.array([1, 4000]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(few, stored["codes"][:, [1, 4000]] * np.float32(0.01))
    assert peak < stored["codes"].nbytes / 4
    assert onnx.load(foreign, load_external_data=False).graph.node
