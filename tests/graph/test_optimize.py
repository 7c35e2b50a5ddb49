"""The optimizer changes no result: a number next to 0 or 1 is a number."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import random_adapter
from onnx.reference import ReferenceEvaluator
from onnxscript.rewriter import pattern
from transformers import AutoModelForCausalLM, HeliumConfig

from teamlora_export.adapter import write_adapter
from teamlora_export.export import export_onnx
from teamlora_export.graph.optimize import EXACT_RULES, optimize
from teamlora_export.model.base import open_base
from teamlora_export.validate.run import validate_bundle


def graph_of(body: str, kind: str = "float", out: str | None = None) -> ir.Model:
    """A model from x [n, 3] to y, of nodes in ONNX's text form."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g ({kind}[n, 3] x) => ({out or kind}[n, 3] y) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


def session_of(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return session_of(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("epsilon", [1e-5, 1e-8, 1e-10, 1e-12, 1e-38])
@pytest.mark.parametrize("form", ["Add(x, c)", "Add(c, x)", "Sub(x, c)"])
def test_an_epsilon_however_small_stays(form, epsilon):
    model = graph_of(f"c = Constant <value_float = {epsilon!r}> () y = {form}")
    optimize(model)
    assert [node.op_type for node in model.graph] == [form[:3]]
    zeros = np.zeros((2, 3), np.float32)
    assert np.array_equal(np.abs(run(model, zeros)), np.full((2, 3), epsilon, np.float32))


@pytest.mark.parametrize("scale", [1.000001, 1 + 2**-20, 1 - 2**-20, 1 + 2**-23])
@pytest.mark.parametrize("form", ["Mul(x, c)", "Mul(c, x)", "Div(x, c)"])
def test_a_scale_next_to_one_stays(form, scale):
    model = graph_of(f"c = Constant <value_float = {scale!r}> () y = {form}")
    optimize(model)
    assert [node.op_type for node in model.graph] == [form[:3]]
    expected = np.float32(scale) if form[:3] == "Mul" else 1 / np.float32(scale)
    assert np.array_equal(run(model, np.ones((2, 3), np.float32)), np.full((2, 3), expected, np.float32))


@pytest.mark.parametrize("form", ["Mul(x, one)", "Mul(one, x)", "Div(x, one)"])
def test_exact_ones_are_dropped(form):
    model = graph_of(f"one = Constant <value_float = 1.0> () z = {form} y = Neg(z)")
    optimize(model)
    assert [node.op_type for node in model.graph] == ["Neg"]


@pytest.mark.parametrize("form", ["Add(x, zero)", "Add(zero, x)", "Sub(x, zero)"])
def test_a_zero_is_dropped_of_whole_numbers_alone(form):
    """Of floats it makes 0.0 of -0.0, or keeps it, whose reciprocals are unlike."""
    whole = graph_of(f"zero = Constant <value = int64 {{0}}> () z = {form} y = Neg(z)", "int64")
    optimize(whole)
    assert [node.op_type for node in whole.graph] == ["Neg"]
    for zero in (0.0, -0.0):
        body = f"zero = Constant <value_float = {zero}> () z = {form} y = Reciprocal(z)"
        plain, optimized = graph_of(body), graph_of(body)
        optimize(optimized)
        x = np.array([[0.0, -0.0, 2.0]], np.float32)
        assert np.array_equal(run(optimized, x), run(plain, x))


# What the library's other rules get wrong: bounds that cross, a double that float32 rounds first.
TRAPS = {
    "Relu of Clip below zero": "a = Constant <value_float = -2.0> () b = Constant <value_float = -1.0> () "
    "z = Clip(x, a, b) y = Relu(z)",
    "Clip of Clip without overlap": "a = Constant <value_float = -2.0> () b = Constant <value_float = -1.0> () "
    "c = Constant <value_float = 1.0> () d = Constant <value_float = 2.0> () z = Clip(x, a, b) y = Clip(z, c, d)",
    "Min of Max": "a = Constant <value_float = 1.0> () b = Constant <value_float = -1.0> () "
    "z = Max(x, a) y = Min(z, b)",
}


@pytest.mark.parametrize("name", TRAPS)
def test_bounds_that_cross_keep_their_order(name):
    x = np.array([[-3, -1.5, 0], [0.5, 1.5, np.nan]], np.float32)
    plain, optimized = graph_of(TRAPS[name]), graph_of(TRAPS[name])
    optimize(optimized)
    assert np.array_equal(run(optimized, x), run(plain, x), equal_nan=True)


# Shapes that they take for others or do not look at, and numbers that they cast otherwise.
BREAKABLE = {
    "a ScatterND that adds": "g (float[2, 3] x) => (float[2, 3] y) { i = Constant <value = int64[2, 1] {0, 1}> () "
    'y = ScatterND <reduction = "add"> (x, i, x) }',
    "a ScatterND of rows that are not counted": "g (float[n, 3] x) => (float[n, 3] y) "
    "{ i = Constant <value = int64[2, 1] {0, 1}> () y = ScatterND (x, i, x) }",
    "a ScatterND of fewer rows than there are": "g (float[n, m, 4] x, float[4, 3] t, float[m, 3] u) => (float[4, 3] y) "
    "{ s = Shape <start = 0, end = 2> (x) last = Constant <value = int64 {-1}> () d = Gather <axis = 0> (s, last) "
    "zero = Constant <value = int64 {0}> () one = Constant <value = int64 {1}> () r = Range (zero, d, one) "
    'l = Constant <value = int64[1] {-1}> () i = Unsqueeze (r, l) y = ScatterND <reduction = "none"> (t, i, u) }',
    "a number that a float rounds": "g (float[n, 3] x) => (float[n, 3] y) { s = Shape (x) "
    "c = ConstantOfShape <value = int64[1] {1152921573326323713}> (s) y = Cast <to = 1> (c) }",
    "zeros as text": "g (float[n, 3] x) => (string[n, 3] y) { s = Shape (x) c = ConstantOfShape (s) "
    "y = Cast <to = 8> (c) }",
    "a product of a block": "g (float[2, 1, 2, 2] x, float[2, 2, 2, 2] w) => (float[2, 2, 2, 2] y) "
    "{ a = Constant <value = int64[5] {1, 1, 2, 2, 2}> () b = Constant <value = int64[4] {2, 2, 2, 2}> () "
    "c = Reshape (x, a) d = MatMul (c, w) y = Reshape (d, b) }",
    "a product of blocks": "g (float[4, 4] x) => (float[4, 4] y) { a = Constant <value = int64[3] {4, 2, 2}> () "
    "b = Constant <value = int64[2] {4, 4}> () c = Reshape (x, a) d = MatMul (c, c) y = Reshape (d, b) }",
    "two of Flatten": "g (float[n, 2, 3] x) => (float[n, 6] y, float[m, 3] z) "
    "{ y = Flatten <axis = 1> (x) z = Flatten <axis = 2> (x) }",
    "halves of an odd size": "g (float[n, 3] x) => (float[n, 3] y) { o = Constant <value = int64[1] {0}> () "
    "i = Constant <value = int64[1] {1}> () e = Constant <value = int64[1] {3}> () "
    "l = Constant <value = int64[1] {-1}> () b = Slice (x, i, e, l) a = Slice (x, o, i, l) "
    "y = Concat <axis = -1> (b, a) }",
    "a size of 0 beside one that is not known": "g (float[n, 0] x, int64[2] s) => (float[m, 0] y) "
    "{ y = Reshape (x, s) }",
}


@pytest.mark.parametrize("name", BREAKABLE)
def test_what_a_rule_that_is_left_out_would_break_stays_right(name):
    plain, optimized = (
        ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {BREAKABLE[name]}'))
        for _ in range(2)
    )
    optimize(optimized)
    sizes = ([2 if isinstance(size, ir.SymbolicDim) else size for size in value.shape] for value in plain.graph.inputs)
    feeds = {
        value.name: np.zeros(shape, np.int64) if value.name == "s" else np.arange(np.prod(shape)).reshape(shape)
        for value, shape in zip(plain.graph.inputs, sizes, strict=True)
    }
    feeds = {key: array if key == "s" else array.astype(np.float32) for key, array in feeds.items()}
    found, expected = (session_of(model).run(None, feeds) for model in (optimized, plain))
    assert all(np.array_equal(a, b) and a.shape == b.shape for a, b in zip(found, expected, strict=True))


def test_a_double_is_rounded_as_often_as_the_model_rounds_it():
    body = "z = Cast <to = 1> (x) y = Cast <to = 10> (z)"
    plain, optimized = graph_of(body, "double", "float16"), graph_of(body, "double", "float16")
    optimize(optimized)
    # Just above the middle of two halves: float32 rounds it to the middle, from where it goes to the even one.
    x = np.full((1, 3), 1 + 2**-11 + 2**-40)
    # ONNX Runtime goes from a double to a half by way of float32 itself; ONNX's own evaluator does what is written.
    found, expected = (ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0] for model in (optimized, plain))
    assert np.array_equal(found, expected)
    assert not np.array_equal(expected, x.astype(np.float16)), "it makes a difference"


def test_no_rule_compares_a_number_within_a_tolerance():
    for rule in EXACT_RULES:
        for value in constants_of(rule):
            # Sizes and indices are integers, which no tolerance of 1e-5 confuses below 100,000.
            exact = value._rel_tol == 0 == value._abs_tol
            assert exact or rule.name == "SqueezeReshape1d", (rule.name, value.value)


def constants_of(rule: pattern.RewriteRule) -> list[pattern.Constant]:
    nodes = rule._target_pattern._nodes
    return [value for node in nodes for value in node.inputs if isinstance(value, pattern.Constant)]


def test_the_constants_of_rules_are_found_by_this_test():
    """Six of our own, and one of the library's."""
    assert sum(bool(constants_of(rule)) for rule in EXACT_RULES) == 7


def test_a_norm_of_a_zero_row_stays_finite_from_end_to_end(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(HeliumConfig(**sizes, **heads, rms_norm_eps=1e-8))
    model.model.embed_tokens.weight.data[::2] = 0
    model.save_pretrained(tmp_path / "base")
    base = open_base(str(tmp_path / "base"))
    write_adapter(random_adapter(base, ("q_proj", "down_proj")), tmp_path / "adapter")
    bundle = export_onnx(base.name, tmp_path / "adapter", tmp_path / "out", retrace=True)
    verdict = validate_bundle(bundle)
    assert verdict.passed, verdict.departure or verdict.worst
