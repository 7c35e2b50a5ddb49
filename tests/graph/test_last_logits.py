"""Logits of the last token are what they were, and no others are computed; presents stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from teamlora_export.graph import op
from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.passes.last_logits import LastLogits

_SIZES = {
    "w": (4, 6),
    "e": (6, 4),
    "bias": (6,),
    "cap": (),
    "down": (6, 4),
    "mix": (1, 2, 2),
    "up": (4, 6),
    "m": (3, 3),
}
_FORMS = {
    "a product": "logits = MatMul(h, w)",
    "tied to the embedding": "t = Transpose <perm = [1, 0]> (e) logits = MatMul(h, t)",
    "with a bias": "p = MatMul(h, w) logits = Add(p, bias)",
    "softcapped": "p = MatMul(h, w) q = Div(p, cap) r = Tanh(q) logits = Mul(r, cap)",
    "after the norm's weight, cast": "n = Mul(cap, h) p = MatMul(n, w) logits = Cast <to = 1> (p)",
    "adapted": "p = MatMul(h, w) logits = teamlora.MixedExpertProjection <num_experts: int = 2, shared_down: int = 0, "
    "out_splits: ints = [6]> (h, p, down, mix, up)",
}
_LEFT = {
    "no product": "logits = Add(h, h)",
    "a product of what is computed": "k = Transpose <perm = [0, 2, 1]> (h) logits = MatMul(h, k)",
    "a product that mixes tokens": "logits = MatMul(m, h)",
    "another reader": "p = MatMul(h, w) also = Relu(p) logits = Add(p, bias)",
}


def graph_of(body: str, rng: np.random.Generator, tokens: str = "s") -> ir.Model:
    """A model from x [b, s, 4] to logits and a present, with `h` computed in between."""
    shaped = {name: f"float[b, {tokens}, 6] {name}" for name in ("p", "q", "r", "also")}
    shaped |= {name: f"float[b, {tokens}, 4] {name}" for name in ("h", "n")}
    values = ", ".join(text for name, text in shaped.items() if f"{name} =" in f"h = {body}")
    outputs = f"float[b, {tokens}, v] logits, float[b, {tokens}, 4] present" + (
        f", float[b, {tokens}, 6] also" if "also" in body else ""
    )
    text = (
        f'<ir_version: 10, opset_import: ["" : 20, "{op.DOMAIN}" : 1]> '
        f"g (float[b, {tokens}, 4] x) => ({outputs}) <{values}> {{ h = Sigmoid(x) present = Relu(h) {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    for name, size in _SIZES.items():
        if any(name in node.input for node in proto.graph.node):
            array = rng.normal(size=size).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    AttachFunctions()(model)
    return model


def run(model: ir.Model, x: np.ndarray) -> dict[str, np.ndarray]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.mark.parametrize("form", _FORMS)
def test_the_last_token_goes_into_the_product_alone(form, rng):
    model = graph_of(_FORMS[form], rng)
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    before = run(model, x)
    count = len(model.graph)
    assert LastLogits()(model).modified
    after = run(model, x)
    assert after["logits"].shape == (2, 1, 6)
    assert np.allclose(after["logits"], before["logits"][:, -1:], rtol=1e-6, atol=1e-6)
    assert np.array_equal(after["present"], before["present"])
    assert len(model.graph) == count + 1
    products = [node for node in model.graph if node.op_type in ("MatMul", op.NAME)]
    assert all(node.inputs[0].shape[1] == 1 for node in products)


def test_a_graph_may_be_deep(rng):
    deep = " ".join(f"d{index + 1} = Sigmoid(d{index})" for index in range(3000))
    model = graph_of(f"d0 = Sigmoid(h) {deep} e0 = Add(d3000, h) logits = MatMul(h, w)", rng)
    assert LastLogits()(model).modified


@pytest.mark.parametrize("form", _LEFT)
def test_a_graph_that_does_not_show_where_stays_as_it_is(form, rng):
    model = graph_of(_LEFT[form], rng, tokens="3")
    before = ir.to_proto(model).SerializeToString()
    assert not LastLogits()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
