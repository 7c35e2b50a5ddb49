"""A Gelu that is written out becomes one node, where its constants are the definition's."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.lift_gelu import LiftGelu

CONSTANTS = (
    "float half = {0.5}, float one = {1.0}, float three = {3.0}, float k = {0.044715}, "
    f"float s = {{{math.sqrt(2 / math.pi)!r}}}, float root = {{{math.sqrt(2)!r}}}, "
    f"float inverse = {{{math.sqrt(0.5)!r}}}"
)
TANH = "p = Pow(x, three) q = Mul(p, k) a = Add(x, q) b = Mul(a, s) t = Tanh(b) g = Add(t, one)"
ERF = "b = Div(x, root) t = Erf(b) g = Add(one, t)"
END = "h = Mul(x, half) y = Mul(h, g)"
X = np.linspace(-6, 6, 48, dtype=np.float32).reshape(4, 12)


def gelu(body: str, constants: str = CONSTANTS) -> ir.Model:
    return graph_of("(float[n, 12] x) => (float[n, 12] y)", body, constants)


@pytest.mark.parametrize("end", [END, "h = Mul(half, x) y = Mul(g, h)", "h = Mul(x, g) y = Mul(half, h)"])
@pytest.mark.parametrize(
    ("curve", "name"), [(TANH, "tanh"), (ERF, "none"), (ERF.replace("Div(x, root)", "Mul(x, inverse)"), "none")]
)
def test_every_way_to_write_a_gelu_becomes_one_node(curve, name, end):
    model = gelu(f"{curve} {end}")
    before = run(model, {"x": X})[0]
    assert LiftGelu()(model).modified
    assert op_types(model) == ["Gelu"]
    assert model.graph[0].attributes["approximate"].as_string() == name
    # The last bits of Tanh and Erf, which differ between kernels.
    np.testing.assert_allclose(run(model, {"x": X})[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ("{0.5}", "{0.500001}"),
        ("0.044715", "0.044716"),
        ("{3.0}", "{3.000001}"),
        ("0.79788", "0.79789"),
        ("{1.0}", "{1.000001}"),
    ],
)
def test_next_to_its_constants_is_another_function(given, other):
    assert given in CONSTANTS
    assert_unchanged(gelu(f"{TANH} {END}", CONSTANTS.replace(given, other)), LiftGelu)


def test_the_curve_of_another_value_is_no_gelu():
    assert_unchanged(gelu(f"{ERF.replace('Div(x', 'Div(z')} {END}".replace("b =", "z = Neg(x) b =", 1)), LiftGelu)
