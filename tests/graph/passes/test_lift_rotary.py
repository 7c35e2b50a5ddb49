"""A rotary embedding becomes one node where its tables are proven to hold every angle twice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.lift_rotary import LiftRotary

SIGNATURE = "(float[3, 2, 5, 8] x, float[3, 5, 4] f, float[3, 5, 4] other) => (float[3, 2, 5, 8] y)"
CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] last = {3}, "
    "int64[1] end = {9223372036854775807}, int64[1] minus = {-1}, float scale = {1.2}, "
    "int64[4] twice = {1, 1, 1, 2}, int64[4] shape = {0, 2, -1, 8}, int64[3] flat = {0, 0, -1}"
)
ANGLES = "t = Concat <axis = -1> (f, f)"
TABLES = "c0 = Cos(t) s0 = Sin(t) c = Unsqueeze(c0, one) s = Unsqueeze(s0, one)"
HALVES = "x1 = Slice(x, zero, four, last, one) x2 = Slice(x, four, end, last, one)"
TURN = "n = Neg(x2) r = Concat <axis = -1> (n, x1)"
ADD = "a = Mul(x, c) d = Mul(r, s) y = Add(a, d)"
PAIRED_ANGLES = "g = Unsqueeze(f, minus) h = Tile(g, twice) t = Reshape(h, flat)"
PAIRS = "x1 = Slice(x, zero, end, last, two) x2 = Slice(x, one, end, last, two)"
STACK = (
    "n = Neg(x2) n1 = Unsqueeze(n, minus) x3 = Unsqueeze(x1, minus) z = Concat <axis = -1> (n1, x3) "
    "r = Reshape(z, shape)"
)
SCALED = "c0 = Cos(t) s0 = Sin(t) c1 = Mul(c0, scale) s1 = Mul(scale, s0) c = Unsqueeze(c1, one) s = Unsqueeze(s1, one)"


def rotary(signature: str = SIGNATURE, constants: str = CONSTANTS, **parts: str) -> ir.Model:
    given = {"angles": ANGLES, "tables": TABLES, "halves": HALVES, "turn": TURN, "add": ADD, **parts}
    return graph_of(signature, " ".join(given.values()), constants)


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {v.name: rng.standard_normal(v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}


def assert_lifted(model: ir.Model, **attributes: int) -> None:
    given = feeds(model)
    before = run(model, given)[0]
    assert LiftRotary()(model).modified
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert {name: node.attributes.get_int(name, 0) for name in attributes} == attributes
    assert not {"Neg", "Slice", "Tile"} & set(op_types(model))
    # One product may be fused with its sum.
    np.testing.assert_allclose(run(model, given)[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"add": "a = Mul(c, x) d = Mul(s, r) y = Add(d, a)"},
        {"halves": "x1, x2 = Split <axis = -1, num_outputs = 2> (x)"},
        {"tables": SCALED},
        {"tables": "u = Unsqueeze(t, one) c = Cos(u) s = Sin(u)"},
    ],
)
def test_halves_are_turned_by_one_node(parts):
    model = rotary(**parts)
    assert_lifted(model, interleaved=0, rotary_embedding_dim=0)
    assert all(str(node.outputs[0].shape[-1]) == "4" for node in model.graph if node.op_type in ("Cos", "Sin"))


def test_tables_in_float32_turn_a_float16_x_in_float32():
    signature = SIGNATURE.replace("(float[3, 2, 5, 8] x", "(float16[3, 2, 5, 8] x")
    add = "xf = Cast <to = 1> (x) rf = Cast <to = 1> (r) a = Mul(xf, c) d = Mul(rf, s) y = Add(a, d)"
    model = rotary(signature, add=add)
    given = feeds(model)
    given["x"] = given["x"].astype(np.float16)
    before = run(model, given)[0]
    LiftRotary()(model)
    assert not {"Neg", "Slice"} & set(op_types(model))
    assert model.graph[-1].op_type == "RotaryEmbedding"
    assert model.graph[-1].inputs[0].producer().op_type == "Cast"
    np.testing.assert_allclose(run(model, given)[0], before, rtol=0, atol=1e-6)


def test_pairs_are_turned_by_one_node():
    assert_lifted(rotary(angles=PAIRED_ANGLES, halves=PAIRS, turn=STACK), interleaved=1)


@pytest.mark.parametrize(
    "parts",
    [
        {"angles": "t = Concat <axis = -1> (f, other)"},
        {"angles": PAIRED_ANGLES},
        {"halves": PAIRS, "turn": STACK},
        {"turn": "n = Neg(x1) r = Concat <axis = -1> (n, x2)"},
        {"turn": "n = Neg(x2) r = Concat <axis = -1> (x1, n)"},
        {"turn": "r = Concat <axis = -1> (x2, x1)"},
        {
            "constants": CONSTANTS.replace("four = {4}", "four = {5}"),
            "halves": HALVES.replace("zero, four", "one, four"),
        },
        {"tables": TABLES.replace("Cos(t)", "Cos(t2)").replace("c0", "t2 = Concat <axis = -1> (f, other) c0", 1)},
        {"tables": "c0 = Cos(t) s0 = Sin(t) c1 = Mul(c0, t) c = Unsqueeze(c1, one) s = Unsqueeze(s0, one)"},
        {"add": "a = Mul(x, c) d = Mul(r, s) y = Sub(a, d)"},
    ],
)
def test_what_is_almost_a_rotation_stays(parts):
    assert_unchanged(rotary(**parts), LiftRotary)


PARTIAL = "(float[3, 2, 5, 12] w, float[3, 5, 4] f) => (float[3, 2, 5, 12] y)"
EIGHT = CONSTANTS + ", int64[1] eight = {8}"
CUT = "x = Slice(w, zero, eight, last, one) rest = Slice(w, eight, end, last, one) "
JOIN = "a = Mul(x, c) d = Mul(r, s) q = Add(a, d) y = Concat <axis = -1> (q, rest)"


def test_a_first_part_is_turned_and_the_rest_put_behind_it_by_one_node():
    assert_lifted(rotary(PARTIAL, EIGHT, halves=CUT + HALVES, add=JOIN), rotary_embedding_dim=8)


def test_another_rest_is_put_behind_it_as_it_was():
    cut = CUT.replace("rest = Slice(w, eight, end", "rest = Slice(w, four, eight")
    model = rotary(PARTIAL, EIGHT, halves=cut + HALVES, add=JOIN)
    given = feeds(model)
    before = run(model, given)[0]
    LiftRotary()(model)
    assert op_types(model)[-1] == "Concat"
    np.testing.assert_allclose(run(model, given)[0], before, rtol=0, atol=1e-6)


def test_heads_behind_the_sequence_are_turned_when_they_are_transposed_after():
    signature = "(float[3, 5, 2, 8] x, float[3, 5, 4] f) => (float[3, 2, 5, 8] y)"
    tables = TABLES.replace("(c0, one)", "(c0, two)").replace("(s0, one)", "(s0, two)")
    add = ADD.replace("y =", "z =") + " y = Transpose <perm = [0, 2, 1, 3]> (z)"
    assert_lifted(rotary(signature, tables=tables, add=add))


def test_tables_of_one_row_are_expanded_to_the_batch_once():
    signature = "(float[3, 2, 5, 8] x, float[1, 5, 4] f) => (float[3, 2, 5, 8] y, float[3, 2, 5, 8] y2)"
    second = (
        "v = Neg(x) v1 = Slice(v, zero, four, last, one) v2 = Slice(v, four, end, last, one) m = Neg(v2) "
        "k = Concat <axis = -1> (m, v1) a2 = Mul(v, c) d2 = Mul(k, s) y2 = Add(a2, d2)"
    )
    model = rotary(signature, add=f"{ADD} {second}")
    given = feeds(model)
    before = run(model, given)
    LiftRotary()(model)
    assert op_types(model).count("RotaryEmbedding") == 2
    assert op_types(model).count("Expand") == 2, "one for each table"
    for old, new in zip(before, run(model, given), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-6)
