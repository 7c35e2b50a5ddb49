"""Packed queries, keys and values are cut into heads by one Reshape and one Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.merge_heads import MergeHeads
from teamlora_export.graph.passes.module_outputs import COLUMNS_KEY, MODULES_KEY
from teamlora_export.validate.taps import find_taps

SIGNATURE = "(float[b, s, 16] x) => (float[b, 4, s, 2] q, float[b, 2, s, 2] k, float[b, 2, s, 2] v)"
CONSTANTS = (
    "int64[3] sizes = {8, 4, 4}, int64[4] four = {0, 0, 4, 2}, int64[4] two = {0, 0, 2, 2}, "
    "int64[4] wide = {0, 0, 1, 4}"
)
PACK = "p = Neg(x) q0, k0, v0 = Split <axis = -1> (p, sizes)"
CUT = "q1 = Reshape(q0, four) k1 = Reshape(k0, two) v1 = Reshape(v0, two)"
TURN = " ".join(f"{name} = Transpose <perm = [0, 2, 1, 3]> ({name}1)" for name in "qkv")
X = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 3, 16)


def heads(signature: str = SIGNATURE, pack: str = PACK, cut: str = CUT, turn: str = TURN) -> ir.Model:
    return graph_of(signature, f"{pack} {cut} {turn}", CONSTANTS)


def assert_merged(model: ir.Model, expected: list[str]) -> None:
    before = run(model, {"x": X})
    assert MergeHeads()(model).modified
    assert op_types(model) == expected
    for old, new in zip(before, run(model, {"x": X}), strict=True):
        assert np.array_equal(old, new)


def test_heads_are_cut_and_transposed_together():
    assert_merged(heads(), ["Neg", "Reshape", "Transpose", "Split"])


def test_heads_that_are_read_before_they_are_transposed_are_cut_together():
    turn = TURN.replace("(q1)", "(q2)").replace("q =", "q2 = Abs(q1) q =")
    expected = ["Neg", "Reshape", "Split", "Abs", "Transpose", "Transpose", "Transpose"]
    assert_merged(heads(turn=turn), expected)


@pytest.mark.parametrize(
    "parts",
    [
        {
            "signature": SIGNATURE.replace("float[b, 2, s, 2] v", "float[b, 1, s, 4] v"),
            "cut": CUT.replace("(v0, two)", "(v0, wide)"),
        },
        {"cut": CUT.replace("(k0, two)", "(k2, two)").replace("k1", "k2 = Abs(k0) k1")},
        {"signature": SIGNATURE.replace("float[b, 2, s, 2] v", "float[b, 2, s, 2] v, float[b, s, 4] v0")},
    ],
)
def test_heads_of_two_sizes_and_parts_that_are_read_otherwise_stay(parts):
    assert_unchanged(heads(**parts), MergeHeads)


def test_modules_whose_values_went_are_still_seen_in_their_columns():
    model = heads()
    for value in next(node for node in model.graph if node.op_type == "Split").outputs:
        value.metadata_props[MODULES_KEY] = f"attention.{value.name[0]}_proj"
    MergeHeads()(model)
    packed = model.graph[0].outputs[0]
    assert packed.metadata_props[COLUMNS_KEY] == "0:8,8:12,12:16"
    taps = find_taps(model, (), {})
    assert list(taps) == ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
    assert np.array_equal(taps["attention.k_proj"].of({packed.name: -X}), -X[..., 8:12])
