"""Attention takes the cache itself; parsers that cannot have that get it joined again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.attend_with_past import AttendWithPast, ExpandPast

INPUTS = (
    "float[b, 4, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v, bool[b, 1, s, t] m, "
    "float[b, 2, p, 8] past_k, float[b, 2, p, 8] past_v"
)
OUTPUTS = "float[b, 4, s, 8] y, float[b, 2, t, 8] all_k, float[b, 2, t, 8] all_v"
JOIN = "all_k = Concat <axis = 2> (past_k, k) all_v = Concat <axis = -2> (past_v, v)"
ATTEND = "y = Attention <scale = 0.3, softcap = 5.0> (q, all_k, all_v, m)"


def graph(inputs: str = INPUTS, outputs: str = OUTPUTS, join: str = JOIN, attend: str = ATTEND) -> ir.Model:
    return graph_of(f"({inputs}) => ({outputs})", f"{join} {attend}")


def feeds(past: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(past)
    sizes = {
        "q": (2, 4, 3, 8),
        "k": (2, 2, 3, 8),
        "v": (2, 2, 3, 8),
        "past_k": (2, 2, past, 8),
        "past_v": (2, 2, past, 8),
    }
    values = {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    return values | {"m": np.tril(np.ones((2, 1, 3, past + 3), bool), past)}


@pytest.mark.parametrize("past", [0, 5])
def test_the_cache_goes_through_attention_and_comes_back(past):
    model = graph()
    before = run(model, feeds(past))
    assert AttendWithPast()(model).modified
    assert op_types(model) == ["Attention"]
    assert [value.name for value in model.graph.outputs] == ["y", "all_k", "all_v"]
    within = run(model, feeds(past))
    assert ExpandPast()(model).modified
    assert op_types(model) == ["Concat", "Concat", "Attention"]
    for old, new, expanded in zip(before, within, run(model, feeds(past)), strict=True):
        assert np.array_equal(old, new)
        assert np.array_equal(old, expanded)


@pytest.mark.parametrize(
    "parts",
    [
        {"outputs": OUTPUTS.replace(", float[b, 2, t, 8] all_v", "")},
        {"attend": ATTEND + " z = Neg(all_k)", "outputs": OUTPUTS + ", float[b, 2, t, 8] z"},
        {"join": "new = Neg(k) " + JOIN.replace("(past_k, k)", "(new, past_k)")},
        {"join": JOIN.replace("(past_v, v)", "(past_v, v, v)")},
        {"join": "other = Neg(past_k) " + JOIN.replace("(past_k, k)", "(other, k)")},
        {"attend": ATTEND.replace("(q, all_k, all_v, m)", "(q, all_k, all_k, m)")},
        {"attend": ATTEND.replace("softcap = 5.0", "is_causal = 1")},
        {
            "attend": ATTEND.replace("y =", "y, again_k, again_v, scores ="),
            "outputs": OUTPUTS + ", float[b, 4, s, t] scores",
        },
    ],
    ids=["no output", "read twice", "new first", "three", "no input", "keys as values", "causal", "scores"],
)
def test_what_is_not_exactly_a_cache_stays(parts):
    assert_unchanged(graph(**parts), AttendWithPast)


def test_attention_without_a_past_is_not_expanded():
    assert_unchanged(graph(), ExpandPast)
