"""Version 2 of the op, with an adapter for each row: its body in ONNX Runtime, row by row against the layers that the
adapters are, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from formula import FAMILIES, by_formula, make_projection, random_projection
from graph.test_op import ROUNDOFF, one_node_model, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from teamlora_export.adapter import AdapterConfig, AdapterSpec, ExpertProjection
from teamlora_export.adapter.padding import Slot, placed, slots_for
from teamlora_export.deploy.session import run_once
from teamlora_export.graph import op
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.passes.attach_functions import AttachFunctions

Rows = Sequence[ExpertProjection | None]


def adapters_model(
    slots: Sequence[Slot], dtype: ir.DataType = ir.DataType.FLOAT, weights: ir.DataType | None = None
) -> ir.Model:
    """`one_node_model` of version 2: slots and indices are inputs."""
    model = one_node_model([s.out_features for s in slots], slots[0].num_experts, slots[0].shared_down, dtype, weights)
    node = next(iter(model.graph))
    adapter = ir.Value(name="adapter", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape(["rows"]))
    model.graph.inputs.append(adapter)
    for value in node.inputs[2:]:
        value.shape = ir.Shape(["slots", *value.shape])
    node.resize_inputs(len(op.INPUTS) + 1)
    node.replace_input_with(len(op.INPUTS), adapter)
    model.functions.clear()
    AttachFunctions()(model)
    return model


def specs(adapters: Sequence[Rows]) -> list[AdapterSpec]:
    """Adapters of so many siblings each; a sibling may be left out."""
    named = [{f"s{i}": replace(p, path=f"s{i}") for i, p in enumerate(siblings) if p} for siblings in adapters]
    return [AdapterSpec("lora", AdapterConfig(8, 1.0), projections, {}, "", "0" * 64) for projections in named]


def alike(slots: dict[str, Slot], siblings: Rows) -> dict[str, Slot]:
    """Siblings of one node have slots of one shape."""
    k, c = (max(getattr(s, name) for s in slots.values()) for name in ("num_experts", "expert_rank"))
    shared = all(slot.shared_down for slot in slots.values())
    return {path: Slot(s.in_features, s.out_features, k, c, shared) for path, s in slots.items()}


def slot_feeds(adapters: Sequence[AdapterSpec], slots: dict[str, Slot], dtype: ir.DataType) -> dict[str, np.ndarray]:
    """down, mix and up with an adapter in each slot."""
    made = []
    for adapter in adapters:
        folded = [op.fold(p) for p in placed(adapter, slots).projections.values()]
        made.append(
            (
                np.concatenate([f.down for f in folded]),
                np.concatenate([f.mix for f in folded]),
                np.concatenate([f.up for f in folded], axis=1),
            )
        )
    down, mix, up = (np.stack(each) for each in zip(*made, strict=True))
    return {"down": down.astype(dtype.numpy()), "mix": mix.astype(np.float32), "up": up.astype(dtype.numpy())}


def expected_rows(
    adapters: Sequence[Rows], indices: Sequence[int], x: np.ndarray, base: np.ndarray, widths: Sequence[int]
) -> np.ndarray:
    """Each row by the published layer of its own adapter."""
    y = base.copy()
    for row, index in enumerate(indices):
        for g, part in enumerate(np.split(base[row], np.cumsum(widths)[:-1], axis=-1)):
            projection = adapters[index][g] if index >= 0 else None
            if projection is not None:
                y[row, :, sum(widths[:g]) : sum(widths[: g + 1])] = by_formula(projection, x[row], part)
    return y


def mixed_families(rng: np.random.Generator, siblings: int, d_in: int = 7, width: int = 5) -> list[Rows]:
    """An adapter of each family, and one that changes the first sibling alone."""
    made: list[Rows] = [
        [random_projection(rng, family, d_in, width + g) for g in range(siblings)] for family in FAMILIES
    ]
    made.append([random_projection(rng, "teamlora", d_in, width), *[None] * (siblings - 1)])
    return made


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("siblings", [1, 2, 3])
def test_each_row_is_computed_by_its_own_adapter(siblings, dtype, rng):
    adapters = mixed_families(rng, siblings)
    known = specs(adapters)
    slots = alike(slots_for(known), adapters[0])
    widths = [5 + g for g in range(siblings)]
    model = adapters_model(list(slots.values()), dtype)
    indices = [3, -1, 0, 4, 2, 1, 0]
    x, base = rng.normal(size=(7, 3, 7)), rng.normal(size=(7, 3, sum(widths)))
    x, base = x.astype(dtype.numpy()), base.astype(dtype.numpy())
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, dtype)}
    found = run(model, {**feeds, "adapter": np.array(indices, np.int32)})
    expected = expected_rows(adapters, indices, x.astype(np.float64), base.astype(np.float64), widths)
    assert np.abs(found - expected).max() <= 64 * ROUNDOFF[dtype] * np.abs(expected).max()
    assert (found[1] == base[1]).all(), "a row without an adapter is its base, to the bit"
    for index in (-1, 2):
        all_rows = run(model, {**feeds, "adapter": np.array([index], np.int32)})
        each_row = run(model, {**feeds, "adapter": np.full(7, index, np.int32)})
        assert np.abs(all_rows - each_row).max() <= 4 * ROUNDOFF[dtype] * np.abs(expected).max()
    # Rows do not see each other's adapters: alone, each is the same.
    alone = np.concatenate(
        [
            run(model, {**feeds, "x": x[i : i + 1], "base": base[i : i + 1], "adapter": np.array([a], np.int32)})
            for i, a in enumerate(indices)
        ]
    )
    assert np.abs(alone - found).max() <= 4 * ROUNDOFF[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("weights", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=str)
@pytest.mark.parametrize("siblings", [1, 3])
def test_slots_of_16_bits_beside_float32_are_widened_and_nothing_else_is_rounded(siblings, weights, rng):
    """Beside slots in float32 of the same numbers; and against the adapters that those numbers stand for, before they
    were padded and cut, in float64."""
    adapters = mixed_families(rng, siblings)
    known = specs(adapters)
    slots = alike(slots_for(known), adapters[0])
    widths = [5 + g for g in range(siblings)]
    x, base = (rng.normal(size=(7, 3, n)).astype(np.float32) for n in (7, sum(widths)))
    indices = [3, -1, 0, 4, 2, 1, 0]
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT), "adapter": np.int32(indices)}
    narrow = feeds | {name: feeds[name].astype(weights.numpy()) for name in op.NARROW_INPUTS}
    wide = feeds | {name: narrow[name].astype(np.float32) for name in op.NARROW_INPUTS}
    model = adapters_model(list(slots.values()), ir.DataType.FLOAT, weights)
    found = run_narrow(model, narrow)
    same = run(adapters_model(list(slots.values())), wide)
    # ONNX Runtime may take other kernels of its own, which sum in another order.
    assert np.abs(found - same).max() <= 16 * ROUNDOFF[ir.DataType.FLOAT] * np.abs(same).max()
    held = [
        [None if p is None else op.as_held(p, weights.numpy(), slots[f"s{g}"].parts(p)) for g, p in enumerate(each)]
        for each in adapters
    ]
    expected = expected_rows(held, indices, x.astype(np.float64), base.astype(np.float64), widths)
    assert np.abs(found - expected).max() <= 64 * ROUNDOFF[ir.DataType.FLOAT] * np.abs(expected).max()
    again = slot_feeds(specs(held), slots, weights)
    assert all((again[name] == narrow[name]).all() for name in op.NARROW_INPUTS), "held again, they are other numbers"
    inline_bodies(model)
    assert np.abs(run_narrow(model, narrow) - found).max() <= 16 * ROUNDOFF[ir.DataType.FLOAT] * np.abs(found).max()


def run_narrow(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    plain = {n: a.view(np.uint16) if a.dtype == ml_dtypes.bfloat16 else a for n, a in feeds.items()}
    return run_once(session, ["y"], plain)[0]


def test_indices_that_are_not_as_many_as_rows_are_refused_but_beside_one_row_which_is_answered_for_each(rng):
    """As standard operators broadcast; the kernels refuse both."""
    adapters = mixed_families(rng, 1)[:2]
    known = specs(adapters)
    slots = slots_for(known)
    model = adapters_model(list(slots.values()))
    weights = slot_feeds(known, slots, ir.DataType.FLOAT)
    x, base = (rng.normal(size=(1, 3, n)).astype(np.float32) for n in (7, 5))
    found = run(model, {**weights, "x": x, "base": base, "adapter": np.int32([1, 0])})
    for row, index in zip(found, (1, 0), strict=True):
        assert np.allclose(row, run(model, {**weights, "x": x, "base": base, "adapter": np.int32([index])})[0])
    x, base = np.repeat(x, 3, 0), np.repeat(base, 3, 0)
    with pytest.raises(Exception, match="cannot broadcast"):
        run(model, {**weights, "x": x, "base": base, "adapter": np.int32([1, 0])})


@pytest.mark.parametrize("shared", [False, True])
def test_logits_far_below_zero_do_not_vanish_beside_an_expert_that_is_not_there(shared, rng):
    """Its logit is zero, and exp(-200) is zero in float32: without a guard the weights would be 0 / 0."""
    small, large = make_projection(rng, 2, 3, shared, 7, 6), make_projection(rng, 4, 3, shared, 7, 6)
    small = replace(small, router=np.tile(np.ones(7), (2, 1)) * [[-30.0], [-29.9]])
    adapters = [[small], [large]]
    known = specs(adapters)
    slots = slots_for(known)
    x, base = 1 + rng.random((2, 4, 7)), np.zeros((2, 4, 6))
    feeds = slot_feeds(known, slots, ir.DataType.FLOAT)
    given = {"x": x.astype(np.float32), "base": base.astype(np.float32), "adapter": np.array([0, 1], np.int32)}
    found = run(adapters_model(list(slots.values())), feeds | given)
    expected = expected_rows(adapters, [0, 1], x, base, [6])
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_an_empty_slot_is_the_base(rng):
    adapters = [[random_projection(rng, "teamlora")], [None]]
    slots = slots_for(specs(adapters[:1]))
    known = [specs(adapters[:1])[0], AdapterSpec("lora", AdapterConfig(8, 1.0), {}, {}, "", "0" * 64)]
    feeds = slot_feeds(known, slots, ir.DataType.FLOAT)
    x, base = (rng.normal(size=(2, 3, n)).astype(np.float32) for n in (7, 6))
    found = run(adapters_model(list(slots.values())), {"x": x, "base": base, **feeds, "adapter": np.int32([1, 0])})
    assert (found[0] == base[0]).all()
    assert not (found[1] == base[1]).all()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    shared=st.booleans(),
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=5),
    tokens=st.integers(0, 4),
    opset=st.sampled_from([op.OLDEST_OPSET, 17, op.BODY_OPSET]),
    seed=st.integers(0, 99),
)
def test_the_body_takes_any_sizes_and_opsets(sizes, shared, rows, tokens, opset, seed):
    rng = np.random.default_rng(seed)
    adapters: list[Rows] = [[make_projection(rng, k, c, shared and k > 1, 6, 4)] for k, c in sizes]
    known = specs(adapters)
    slots = slots_for(known)
    indices = [row % len(adapters) if row >= 0 else -1 for row in rows]
    x, base = rng.normal(size=(len(rows), tokens, 6)), rng.normal(size=(len(rows), tokens, 4))
    x, base = x.astype(np.float32), base.astype(np.float32)
    model = adapters_model(list(slots.values()))
    model.graph.opset_imports[""] = opset
    model.functions.clear()
    AttachFunctions()(model)
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT), "adapter": np.int32(indices)}
    found = run(model, feeds)
    expected = expected_rows(adapters, indices, x.astype(np.float64), base.astype(np.float64), [4])
    floor = min(min(abs(p.normalizer_floor) for [p] in adapters), 1.0)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= 1e-4 / max(floor, 0.02) * np.abs(expected).max(initial=1)).all()


def test_the_inlined_body_is_the_same_and_rounds_in_16_bits(rng):
    """ONNX's own evaluator runs what is written, since ONNX Runtime's CPU provider has no products in bfloat16."""
    adapters = mixed_families(rng, 2)
    known = specs(adapters)
    slots = alike(slots_for(known), adapters[0])
    for dtype, unit in ((ir.DataType.FLOAT, 2.0**-24), (ir.DataType.BFLOAT16, 2.0**-8)):
        model = adapters_model(list(slots.values()), dtype)
        inline_bodies(model)
        assert not model.functions
        x, base = (rng.normal(size=(3, 4, n)).astype(dtype.numpy()) for n in (7, 11))
        feeds = {"x": x, "base": base, **slot_feeds(known, slots, dtype), "adapter": np.int32([4, 2, -1])}
        found = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0].astype(np.float64)
        expected = expected_rows(adapters, [4, 2, -1], x.astype(np.float64), base.astype(np.float64), [5, 6])
        assert np.abs(found - expected).max() <= 64 * unit * np.abs(expected).max()


def test_a_body_of_version_1_is_what_it_was_and_of_version_2_has_its_own_name():
    forms = [
        op.OpForm(g, shared, adapters, narrow)
        for g in (1, 2)
        for shared in (0, 1)
        for narrow in (0, 1)
        for adapters in (0, 1)
    ]
    assert len({form.overload for form in forms}) == len(forms)
    assert [form.version for form in forms] == [1, 2] * 8
    names = [node.name for form in forms for node in op.function(form)]
    assert len(names) == len(set(names))
    assert all(len(op.function(form).inputs) == 5 + form.adapters for form in forms)
