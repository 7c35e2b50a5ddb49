"""A norm that is written out becomes one node, where it is exactly that norm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.lift_layer_norms import LiftLayerNorms
from teamlora_export.graph.passes.lift_rms_norms import LiftRMSNorms
from teamlora_export.graph.passes.module_outputs import MODULES_KEY

SIGNATURE = "(float[n, 4] x) => (float[n, 4] y)"
CONSTANTS = (
    "float[4] w = {0.5, 1.0, -2.0, 3.0}, float two = {2.0}, float e = {1e-5}, float one = {1.0}, int64[1] axis = {-1}"
)
SQUARE = "p = Pow(x, two)"
MEAN = "m = ReduceMean(p, axis)"
ROOT = "a = Add(m, e) s = Sqrt(a)"
SCALE = "r = Reciprocal(s) n = Mul(x, r)"
WEIGH = "y = Mul(n, w)"
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def norm(*, constants: str = CONSTANTS, signature: str = SIGNATURE, **parts: str) -> ir.Model:
    given = {"square": SQUARE, "mean": MEAN, "root": ROOT, "scale": SCALE, "weigh": WEIGH, **parts}
    return graph_of(signature, " ".join(given.values()), constants)


def rms(x: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"square": "p = Mul(x, x)"},
        {"root": "a = Add(e, m) s = Sqrt(a)"},
        {"scale": "r = Div(one, s) n = Mul(r, x)"},
        {"scale": "n = Div(x, s)"},
        {"weigh": "y = Mul(w, n)"},
        {"weigh": "v = Add(w, one) u = Sub(v, one) y = Mul(n, u)"},
    ],
)
def test_every_way_to_write_an_rms_norm_becomes_one_node(parts):
    model = norm(**parts)
    before = run(model, {"x": X})[0]
    assert LiftRMSNorms()(model).modified
    assert op_types(model)[-1] == "RMSNormalization"
    assert not {"Pow", "ReduceMean", "Sqrt"} & set(op_types(model))
    after = run(model, {"x": X})[0]
    # Both are within float32's rounding of four operations.
    expected = rms(X) * [0.5, 1.0, -2.0, 3.0]
    assert np.abs(after - expected).max() <= max(np.abs(before - expected).max(), 4 * 2**-24 * np.abs(expected).max())
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("epsilon", [1e-5, 9.999999e-06, 1e-12, 0.5])
def test_its_epsilon_is_the_graphs_own(epsilon):
    model = norm(constants=CONSTANTS.replace("1e-5", repr(epsilon)))
    LiftRMSNorms()(model)
    assert np.float32(model.graph[-1].attributes["epsilon"].as_float()) == np.float32(epsilon)
    small = X * np.float32(1e-4)
    expected = rms(small, float(np.float32(epsilon))) * [0.5, 1.0, -2.0, 3.0]
    np.testing.assert_allclose(run(model, {"x": small})[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        {"constants": CONSTANTS.replace("two = {2.0}", "two = {2.000001}")},
        {"constants": CONSTANTS.replace("one = {1.0}", "one = {1.000001}"), "scale": "r = Div(one, s) n = Mul(x, r)"},
        {"constants": CONSTANTS.replace("axis = {-1}", "axis = {0}"), "weigh": "y = Mul(n, w)"},
        {"constants": CONSTANTS.replace("float[4] w = {0.5, 1.0, -2.0, 3.0}", "float w = {0.5}")},
        {"constants": CONSTANTS.replace("float[4] w", "float[1, 4] w")},
        {"square": "z = Neg(x) p = Pow(z, two)"},
        {"root": "a = Mul(m, e) s = Sqrt(a)"},
        {"signature": "(float[n, 4] x) => (float[n, 4] y, float[n, 4] n)"},
    ],
)
def test_what_is_almost_an_rms_norm_stays(parts):
    assert_unchanged(norm(**parts), LiftRMSNorms)


def test_a_module_inside_of_a_norm_keeps_it_as_it_is():
    model = norm()
    normalized = next(node for node in model.graph if node.op_type == "Mul").outputs[0]
    normalized.metadata_props[MODULES_KEY] = "model.normalize"
    assert_unchanged(model, LiftRMSNorms)


HALF = "(float16[n, 4] h) => (float16[n, 4] y)"
WIDE = "x = Cast <to = 1> (h) "
# The same weights; the text form gives float16 by its bits.
HALF_CONSTANTS = CONSTANTS.replace("float[4] w = {0.5, 1.0, -2.0, 3.0}", "float16[4] w = {14336, 15360, 49152, 16896}")


def test_a_norm_between_casts_is_the_operators_own_float32():
    model = norm(
        signature=HALF,
        constants=HALF_CONSTANTS,
        square=WIDE + SQUARE,
        scale="r = Reciprocal(s) q = Mul(x, r) n = Cast <to = 10> (q)",
    )
    h = (100 * X).astype(np.float16)
    before = run(model, {"h": h})[0]
    LiftRMSNorms()(model)
    assert op_types(model) == ["RMSNormalization"]
    assert model.graph[0].attributes["stash_type"].as_int() == ir.DataType.FLOAT
    assert np.array_equal(run(model, {"h": h})[0], before)


def test_a_norm_that_is_weighed_in_float32_keeps_its_casts():
    model = norm(signature=HALF, square=WIDE + SQUARE, weigh="z = Mul(n, w) y = Cast <to = 10> (z)")
    LiftRMSNorms()(model)
    assert op_types(model) == ["Cast", "RMSNormalization", "Cast"]


def test_a_norm_in_float16_throughout_stays():
    constants = HALF_CONSTANTS.replace("float two = {2.0}", "float16 two = {16384}")
    constants = constants.replace("float e = {1e-5}", "float16 e = {168}")
    assert_unchanged(norm(signature=HALF.replace("] h", "] x"), constants=constants), LiftRMSNorms)


CENTER = "c = ReduceMean(z, axis) x = Sub(z, c) "
CENTERED = "(float[n, 4] z) => (float[n, 4] y)"


def test_a_norm_of_the_difference_from_the_mean_is_a_layer_norm():
    model = norm(signature=CENTERED, square=CENTER + SQUARE)
    LiftRMSNorms()(model)
    LiftLayerNorms()(model)
    assert op_types(model) == ["LayerNormalization"]
    z = X + 10
    centered = z.astype(np.float64) - z.astype(np.float64).mean(-1, keepdims=True)
    np.testing.assert_allclose(run(model, {"z": z})[0], rms(centered) * [0.5, 1.0, -2.0, 3.0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("center", ["c = ReduceMax(z, axis) x = Sub(z, c) ", "c = ReduceMean(z, axis) x = Sub(c, z) "])
def test_a_norm_of_another_difference_stays_an_rms_norm(center):
    model = norm(signature=CENTERED, square=center + SQUARE)
    LiftRMSNorms()(model)
    assert_unchanged(model, LiftLayerNorms)
    assert op_types(model)[-1] == "RMSNormalization"
