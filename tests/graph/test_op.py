"""The op's function body: in ONNX Runtime against the formula in float64, for every form and dtype; as it is written,
in ONNX's reference evaluator, against the definition with all of its roundings."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from formula import FAMILIES, by_definition, by_formula, make_projection, random_projection
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from teamlora_export.graph import op
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.precision import IR_DTYPES, ChangePrecision

ROUNDOFF = {ir.DataType.FLOAT: 2.0**-24, ir.DataType.FLOAT16: 2.0**-11}


def one_node_model(
    widths: list[int], num_experts: int, shared_down: bool, dtype: ir.DataType, weights: ir.DataType | None = None
) -> ir.Model:
    """A model of a single op node whose inputs are all graph inputs, of unknown sizes; `weights`: of down and up, where
    it is not `dtype`."""
    values = []
    for name in op.INPUTS:
        kind = ir.DataType.FLOAT if name == "mix" else dtype
        if weights is not None and name in op.NARROW_INPUTS:
            kind = weights
        rank = {"x": 3, "base": 3, "down": 2, "mix": 3, "up": 2}[name]
        shape = ir.Shape([f"{name}{axis}" for axis in range(rank)])
        values.append(ir.Value(name=name, type=ir.TensorType(kind), shape=shape))
    attributes = {"num_experts": num_experts, "shared_down": int(shared_down), "out_splits": widths}
    node = ir.node(op.NAME, values, attributes, domain=op.DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(dtype)
    node.outputs[0].shape = ir.Shape(["b", "s", sum(widths)])
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": op.BODY_OPSET}, name="one")
    model = ir.Model(graph, ir_version=10)
    AttachFunctions()(model)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]


def feeds_of(projections, x, base, dtype) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    folded = [op.fold(projection) for projection in projections]
    down, up = np.concatenate([f.down for f in folded]), np.concatenate([f.up for f in folded], axis=1)
    numeric = dtype.numpy()
    mix = np.concatenate([f.mix for f in folded]).astype(np.float32)
    return {
        "x": x.astype(numeric),
        "base": base.astype(numeric),
        "down": down.astype(numeric),
        "mix": mix,
        "up": up.astype(numeric),
    }


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("siblings", [1, 2, 3, 4])
def test_the_body_computes_the_formula(siblings, family, dtype, rng):
    projections = [random_projection(rng, family, d_out=5 + g) for g in range(siblings)]
    widths = [p.out_features for p in projections]
    x, base = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, sum(widths)))
    parts = np.split(base, np.cumsum(widths)[:-1], axis=-1)
    expected = np.concatenate([by_formula(p, x, b) for p, b in zip(projections, parts, strict=True)], axis=-1)
    model = one_node_model(widths, projections[0].num_experts, projections[0].shared_down, dtype)
    found = run(model, feeds_of(projections, x, base, dtype))
    # Inputs, u, logits and v are rounded once each, and the products add a few dozen terms of the size of the largest.
    assert np.abs(found - expected).max() <= 64 * ROUNDOFF[dtype] * np.abs(expected).max()


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 8),
    chunk=st.integers(1, 5),
    d_in=st.integers(1, 40),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_the_body_takes_any_sizes(k, chunk, d_in, tokens, seed):
    rng = np.random.default_rng(seed)
    projection = make_projection(rng, k, chunk, False, d_in, 6)
    x, base = rng.normal(size=(1, tokens, d_in)), rng.normal(size=(1, tokens, 6))
    feeds = feeds_of([projection], x, base, ir.DataType.FLOAT)
    found = run(one_node_model([6], k, False, ir.DataType.FLOAT), feeds)
    assert found.shape == base.shape
    low, high = by_definition(feeds, k, False, [6], rounds_product=True)
    assert ((found >= low) & (found <= high)).all()


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_body_rounds_where_the_definition_says(family, dtype, rng):
    """ONNX Runtime's CPU provider has no products in these types; ONNX's own evaluator runs what is written."""
    projections = [random_projection(rng, family, d_out=50 + g) for g in range(2)]
    widths, k, shared = [p.out_features for p in projections], projections[0].num_experts, projections[0].shared_down
    feeds = feeds_of(projections, rng.normal(size=(2, 9, 7)), rng.normal(size=(2, 9, sum(widths))), dtype)
    model = one_node_model(widths, k, shared, dtype)
    inline_bodies(model)
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0].astype(np.float64)
    low, high = by_definition(feeds, k, shared, widths, rounds_product=True)
    assert ((found >= low) & (found <= high)).all()
    assert (low == high).mean() > 0.5, "most of y must be known to the last bit for this to tell anything"


@pytest.mark.parametrize("weights", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("siblings", [1, 3])
def test_weights_of_16_bits_beside_float32_are_widened_and_nothing_else_is_rounded(siblings, family, weights, rng):
    projections = [random_projection(rng, family, d_out=5 + g) for g in range(siblings)]
    widths, k, shared = [p.out_features for p in projections], projections[0].num_experts, projections[0].shared_down
    x, base = rng.normal(size=(2, 9, 7)), rng.normal(size=(2, 9, sum(widths)))
    feeds = feeds_of(projections, x, base, ir.DataType.FLOAT)
    feeds |= {name: feeds[name].astype(weights.numpy()) for name in op.NARROW_INPUTS}
    model = one_node_model(widths, k, shared, ir.DataType.FLOAT, weights)
    low, high = by_definition(feeds, k, shared, widths, rounds_product=True)
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0]
    assert found.dtype == np.float32
    assert ((found >= low) & (found <= high)).all()
    inline_bodies(model)
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        value.const_value, value.shape = (
            ir.tensor(feeds[value.name], name=value.name),
            ir.Shape(feeds[value.name].shape),
        )
        model.graph.register_initializer(value)
    found = run(model, {name: feeds[name] for name in ("x", "base")})
    assert ((found >= low) & (found <= high)).all()
    held = [op.as_held(projection, weights.numpy()) for projection in projections]
    again = feeds_of(held, x, base, weights)
    assert all((again[name] == feeds[name]).all() for name in op.NARROW_INPUTS)


@pytest.mark.parametrize("target", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_inlined_body_that_is_retyped_rounds_there_too(family, target, rng):
    """As in a bundle of `--op standard`, whose weights are initializers."""
    projections = [random_projection(rng, family, d_out=50 + g) for g in range(2)]
    widths, k, shared = [p.out_features for p in projections], projections[0].num_experts, projections[0].shared_down
    feeds = feeds_of(projections, rng.normal(size=(2, 9, 7)), rng.normal(size=(2, 9, sum(widths))), IR_DTYPES[target])
    model = one_node_model(widths, k, shared, ir.DataType.FLOAT)
    inline_bodies(model)
    for value in [value for value in model.graph.inputs if value.name in ("down", "mix", "up")]:
        model.graph.inputs.remove(value)
        array = feeds[value.name].astype(np.float32)
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        model.graph.initializers.add(value)
    ChangePrecision("fp32", target)(model)
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, {name: feeds[name] for name in ("x", "base")})[0]
    low, high = by_definition(feeds, k, shared, widths, rounds_product=True)
    assert ((found.astype(np.float64) >= low) & (found.astype(np.float64) <= high)).all()


def test_large_logits_do_not_overflow_the_routing(rng):
    projection = random_projection(rng, "teamlora")
    x = 1e4 * rng.normal(size=(1, 4, 7))
    base = np.zeros((1, 4, 6))
    found = run(one_node_model([6], 4, False, ir.DataType.FLOAT), feeds_of([projection], x, base, ir.DataType.FLOAT))
    expected = by_formula(projection, x, base)
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_the_inlined_body_is_the_same_computation(rng):
    projections = [random_projection(rng, "teamlora") for _ in range(2)]
    x, base = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 3, 12))
    feeds = feeds_of(projections, x, base, ir.DataType.FLOAT)
    model = one_node_model([6, 6], 4, False, ir.DataType.FLOAT)
    kept = run(model, feeds)
    inline_bodies(model)
    assert not model.functions
    assert np.array_equal(run(model, feeds), kept)


def test_nodes_of_a_body_have_names_of_their_own():
    forms = [op.OpForm(*each) for each in itertools.product((1, 2), (False, True), (False, True))]
    names = [node.name for form in forms for node in op.function(form)]
    assert len(names) == len(set(names))
