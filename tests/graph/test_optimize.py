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


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


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


@pytest.mark.parametrize("form", ["Mul(x, one)", "Mul(one, x)", "Div(x, one)", "Add(zero, x)", "Sub(x, zero)"])
def test_exact_ones_and_zeros_are_dropped(form):
    constants = "one = Constant <value_float = 1.0> () zero = Constant <value_float = 0.0> ()"
    model = graph_of(f"{constants} z = {form} y = Neg(z)")
    optimize(model)
    assert [node.op_type for node in model.graph] == ["Neg"]


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


def halves(width: int) -> ir.Model:
    """A graph that swaps the two parts of a row of `width`, of which the first has half of it, rounded down."""
    body = "".join(
        f"{name} = Constant <value = int64[1] {{{number}}}> () "
        for name, number in (("begin", 0), ("middle", width // 2), ("end", width), ("axis", -1))
    )
    # The rule that makes one Split of them looks at pairs whose second half comes first alone.
    body += "b = Slice(x, middle, end, axis) a = Slice(x, begin, middle, axis) y = Concat <axis = -1> (b, a)"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[n, {width}] x) => (float[n, {width}] y) {{ {body} }}'
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("width", [3, 4])
def test_halves_of_a_row_stay_what_they_are(width):
    """Of an odd size, Split's first part is the larger one."""
    x = np.arange(2 * width, dtype=np.float32).reshape(2, width)
    plain, optimized = halves(width), halves(width)
    optimize(optimized)
    assert np.array_equal(run(optimized, x), run(plain, x))


def test_no_rule_compares_a_number_within_a_tolerance():
    for rule in EXACT_RULES:
        for value in constants_of(rule):
            # Sizes and indices are integers, which no tolerance of 1e-5 confuses below 100,000.
            exact = value._rel_tol == 0 == value._abs_tol
            assert exact or rule.name in ("SqueezeReshape1d", "ScatterAllDynamic"), (rule.name, value.value)


def constants_of(rule: pattern.RewriteRule) -> list[pattern.Constant]:
    nodes = rule._target_pattern._nodes
    return [value for node in nodes for value in node.inputs if isinstance(value, pattern.Constant)]


def test_the_constants_of_rules_are_found_by_this_test():
    assert sum(bool(constants_of(rule)) for rule in EXACT_RULES) >= 6


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
