"""Shape arithmetic that says nothing new is taken out."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.module_outputs import MODULES_KEY
from teamlora_export.graph.passes.simplify_shapes import SimplifyShapes

CONSTANTS = "int64[1] one = {1}, int64[1] six = {6}, int64[1] rest = {-1}"
SIZES = "b = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x)"


@pytest.mark.parametrize("rows", [2, 0])
def test_a_target_of_the_inputs_own_sizes_becomes_a_constant(rows):
    body = f"{SIZES} h = Neg(x) target = Concat <axis = 0> (b, s, rest) y = Reshape(h, target)"
    model = graph_of("(float[b, s, 3, 2] x) => (float[b, s, 6] y)", body, CONSTANTS)
    x = np.arange(rows * 30, dtype=np.float32).reshape(rows, 5, 3, 2)
    before = run(model, {"x": x}) if rows else [x.reshape(0, 5, 6)]
    assert SimplifyShapes()(model).modified
    assert op_types(model) == ["Neg", "Reshape"]
    assert np.array_equal(before[0], run(model, {"x": x})[0])


@pytest.mark.parametrize(
    ("signature", "target"),
    [
        ("(float[b, s, 6] x) => (float[s, b, 6] y)", "(s, b, six)"),
        ("(float[b, s, 6] x) => (float[n, 6] y)", "(rest, six)"),
        ("(float[b, s, 6] x) => (float[b, s, k] y)", "(b, s, rest)"),
    ],
    ids=["another place", "merged", "unknown"],
)
def test_a_target_of_other_sizes_stays(signature, target):
    model = graph_of(signature, f"{SIZES} target = Concat <axis = 0> {target} y = Reshape(x, target)", CONSTANTS)
    assert_unchanged(model, SimplifyShapes)


def test_an_expand_to_what_is_there_goes():
    body = f"{SIZES} h = Neg(x) target = Concat <axis = 0> (b, one, s) e = Expand(h, target) y = Neg(e)"
    model = graph_of(
        "(float[b, 1, s] x) => (float[b, 1, s] y)", body.replace("start = 1, end = 2", "start = 2"), CONSTANTS
    )
    expand = next(node for node in model.graph if node.op_type == "Expand")
    expand.outputs[0].shape = expand.inputs[0].shape
    assert SimplifyShapes()(model).modified
    assert op_types(model) == ["Neg", "Neg"]


@pytest.mark.parametrize("outputs", ["float[b, s] z", "float[b, s] h, float[b, s] z"], ids=["a module's", "an output"])
def test_an_expand_of_what_has_a_name_of_its_own_stays(outputs):
    body = f"{SIZES} h = Neg(x) target = Concat <axis = 0> (b, s) e = Expand(h, target) z = Neg(e)"
    model = graph_of(f"(float[b, s] x) => ({outputs})", body, CONSTANTS)
    value = next(node for node in model.graph if node.op_type == "Expand").inputs[0]
    next(iter(value.uses())).node.outputs[0].shape = value.shape
    if not value.is_graph_output():
        value.metadata_props[MODULES_KEY] = "model.norm"
    assert_unchanged(model, SimplifyShapes)


def test_an_expand_that_repeats_stays():
    body = f"{SIZES} h = Neg(z) target = Concat <axis = 0> (b, s) y = Expand(h, target)"
    model = graph_of("(float[b, s] x, float[1, s] z) => (float[b, s] y)", body, CONSTANTS)
    assert_unchanged(model, SimplifyShapes)
