"""Products of the base become products with codes, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from teamlora_export.adapter import AdapterConfig, AdapterSpec
from teamlora_export.graph.external_data import write_external_data
from teamlora_export.graph.passes.quantize_base import QuantizeBase
from teamlora_export.graph.quantized import Scheme, dequantised, is_quantised
from teamlora_export.graph.weights import Part, Recipe, new_weight

FLOAT = ir.DataType.FLOAT
SIZE = 40


class _Random:
    """A base with any weight that is asked for, [out, in]."""

    def read(self, name: str) -> np.ndarray:
        rng = np.random.default_rng(sum(map(ord, name)))
        return rng.standard_normal((SIZE,) if "bias" in name else (SIZE, SIZE)).astype(np.float32)


def _weight(key: str, *more: str) -> ir.Value:
    parts = tuple(Part("base", name, transposed=True) for name in (key, *more))
    return new_weight(key, FLOAT, (SIZE, SIZE * len(parts)), Recipe(parts, axis=1))


def _model() -> ir.Model:
    """x -> q and k side by side, cut to q -> a router's choice beside a product with a bias -> head, which is tied to
    the embedding `x` is taken from."""
    table = new_weight("embedding", FLOAT, (SIZE, SIZE), Recipe((Part("base", "embedding"),)))
    joint, router, dense = _weight("q", "k"), _weight("router"), _weight("dense")
    bias = new_weight("bias", FLOAT, (SIZE,), Recipe((Part("base", "bias"),)))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["tokens"]))
    constants = {"cut": np.array([SIZE, SIZE]), "best": np.array([2])}
    held = {name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in constants.items()}
    x = ir.node("Gather", [table, ids])
    both = ir.node("MatMul", [x.outputs[0], joint])
    cut = ir.node("Split", [both.outputs[0], held["cut"]], {"axis": -1}, num_outputs=2)
    scores = ir.node("MatMul", [cut.outputs[1], router])
    choice = ir.node("TopK", [scores.outputs[0], held["best"]], num_outputs=2)
    gemm = ir.node("Gemm", [cut.outputs[0], dense, bias])
    turned = ir.node("Transpose", [table], {"perm": [1, 0]})
    head = ir.node("MatMul", [gemm.outputs[0], turned.outputs[0]])
    names = {"both": both, "scores": scores, "dense": gemm, "logits": head}
    for name, node in names.items():
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(FLOAT)
    choice.outputs[1].name, choice.outputs[1].type = "choice", ir.TensorType(ir.DataType.INT64)
    graph = ir.Graph(
        [ids],
        [head.outputs[0], choice.outputs[1], gemm.outputs[0]],
        nodes=[x, both, cut, scores, choice, gemm, turned, head],
        initializers=[table, joint, router, dense, bias, *held.values()],
        opset_imports={"": 20},
    )
    return ir.Model(graph, ir_version=10)


def _written(model: ir.Model, folder: Path) -> ort.InferenceSession:
    nothing = AdapterSpec("LoRA", AdapterConfig(r=4, lora_alpha=4.0, lora_nums=2, target_modules=()), {}, {}, "", "")
    write_external_data(model.graph.initializers.values(), _Random(), nothing, folder / "data", lambda _: None)
    ir.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])


def _quantised(model: ir.Model) -> set[str]:
    return {str(node.outputs[0].name) for node in model.graph if is_quantised(node)}


@pytest.mark.parametrize(("head", "expected"), [(None, {"both", "dense"}), (Scheme(8), {"both", "dense", "logits"})])
def test_routers_and_the_head_stay_as_they_are_unless_asked(head, expected) -> None:
    model = _model()
    quantise = QuantizeBase(Scheme(4), head)
    assert quantise(model).modified
    assert quantise.heads == (head is not None)
    assert _quantised(model) == expected
    # The embedding is stored as it was.
    assert model.graph.initializers["embedding"].dtype == FLOAT
    assert "q" not in model.graph.initializers


def test_it_says_that_there_was_no_head() -> None:
    model = _model()
    next(value for value in model.graph.outputs if value.name == "logits").name = "last_hidden_state"
    quantise = QuantizeBase(Scheme(8), Scheme(4))
    assert quantise(model).modified
    assert quantise.heads == 0


def test_a_graph_computes_with_what_its_codes_mean(tmp_path) -> None:
    model = _model()
    QuantizeBase(Scheme(4, zero_points=True), Scheme(8))(model)
    for node in filter(is_quantised, model.graph):
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    session = _written(model, tmp_path)
    weights = {str(node.outputs[0].name): dequantised(node) for node in model.graph if is_quantised(node)}
    ids = np.arange(5)
    table, bias = _Random().read("embedding"), _Random().read("bias")
    dense = (table[ids] @ weights["both"])[:, :SIZE] @ weights["dense"] + bias
    found = session.run(["dense", "logits"], {"ids": ids})
    np.testing.assert_allclose(found[0], dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], dense @ weights["logits"], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(weights["logits"], table.T, atol=0.05)
    # Siblings are quantised each by itself, and stored side by side.
    np.testing.assert_allclose(weights["both"][:, SIZE:], _Random().read("k").T, atol=0.5)
