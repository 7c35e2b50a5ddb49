"""Version 2 of the op in the native library: each row by its own adapter, whatever its neighbours; what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from formula import make_projection
from graph.test_op_adapters import Rows, adapters_model, alike, expected_rows, mixed_families, slot_feeds, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.test_onnxruntime_op import TOLERANCE, kernels_run, open_model

from teamlora_export.engine.onnxruntime_library import OnnxRuntimeLibrary, build_library
from teamlora_export.graph import op


@pytest.fixture(scope="module")
def library() -> OnnxRuntimeLibrary:
    return build_library()


def native(library, slots, feeds, indices: Sequence[int], dtype=ir.DataType.FLOAT, **options) -> np.ndarray:  # type: ignore[no-untyped-def]
    session = open_model(adapters_model(list(slots.values()), dtype), library.path, **options)
    return run_rows(session, feeds, indices, dtype)


def run_rows(session, feeds, indices, dtype=ir.DataType.FLOAT, weights=None) -> np.ndarray:  # type: ignore[no-untyped-def]
    binding, held = session.io_binding(), []
    for name, array in {**feeds, "adapter": np.array(indices, np.int32)}.items():
        plain = array if array.dtype in (np.float32, np.int32) else array.view(np.uint16)
        kind = {"mix": 1, "adapter": 6}.get(name, (weights or dtype).value if name in op.NARROW_INPUTS else dtype.value)
        held += [ort_value(plain, kind)]
        binding.bind_ortvalue_input(name, held[-1])
    y = np.full(feeds["base"].shape, np.nan, feeds["base"].dtype)
    held += [ort_value(y if y.dtype == np.float32 else y.view(np.uint16), dtype.value)]
    binding.bind_ortvalue_output("y", held[-1])
    session.run_with_iobinding(binding)
    return y.astype(np.float64)


def ort_value(array: np.ndarray, kind: int):  # type: ignore[no-untyped-def]
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), kind)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_each_row_is_computed_by_its_own_adapter_and_as_it_is_alone(library, tokens, dtype, rng, tmp_path):
    """Sixty tokens of an adapter are more than are computed together."""
    adapters = mixed_families(rng, 3, d_in=37, width=33)
    known = specs(adapters)
    slots = alike(slots_for_all(known), adapters[0])
    widths = [33, 34, 35]
    indices = [3, -1, 0, 4, 2, 1, 0, 3, 3]
    x, base = (rng.normal(size=(9, tokens, n)).astype(dtype.numpy()) for n in (37, 102))
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, dtype)}
    session = open_model(adapters_model(list(slots.values()), dtype), library.path, tmp_path / "profile")
    found = run_rows(session, feeds, indices, dtype)
    expected = expected_rows(adapters, indices, x.astype(np.float64), base.astype(np.float64), widths)
    floor = min(abs(p.normalizer_floor) for each in adapters for p in each if p)
    limit = TOLERANCE[dtype] * 8 / floor
    assert (np.abs(found - expected) <= limit * np.abs(expected).max()).all()
    assert (found[1] == base[1].astype(np.float64)).all()
    for row, index in enumerate(indices):
        one = {**feeds, "x": x[row : row + 1], "base": base[row : row + 1]}
        assert (run_rows(session, one, [index], dtype)[0] == found[row]).all(), "a row depends on its neighbours"
    same = run_rows(session, feeds, [2], dtype)
    assert (same == run_rows(session, feeds, [2] * 9, dtype)).all()
    assert kernels_run(session) == {op.NAME: 3 + len(indices)}


@pytest.mark.parametrize("weights", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16], ids=str)
@pytest.mark.parametrize("tokens", [1, 60])
def test_slots_of_16_bits_beside_float32_give_what_the_same_numbers_do_in_float32(library, weights, tokens, rng):
    """To the bit: widening is exact, and the sums are made in one order."""
    adapters = mixed_families(rng, 3, d_in=37, width=33)
    known = specs(adapters)
    slots = alike(slots_for_all(known), adapters[0])
    indices = [3, -1, 0, 4, 2, 1, 0]
    x, base = (rng.normal(size=(7, tokens, n)).astype(np.float32) for n in (37, 102))
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT)}
    narrow = feeds | {name: feeds[name].astype(weights.numpy()) for name in op.NARROW_INPUTS}
    wide = feeds | {name: narrow[name].astype(np.float32) for name in op.NARROW_INPUTS}
    model = adapters_model(list(slots.values()), ir.DataType.FLOAT, weights)
    found = run_rows(open_model(model, library.path), narrow, indices, weights=weights)
    assert (found == native(library, slots, wide, indices)).all()
    assert not (found[0] == base[0]).any()


def slots_for_all(known):  # type: ignore[no-untyped-def]
    from teamlora_export.adapter.padding import slots_for

    return slots_for(known)


def test_weights_large_enough_for_several_tasks_give_the_same(library, rng):
    """One adapter's rows of `down` and columns of `up` are shared out, or adapters are."""
    adapters: list[Rows] = [[make_projection(rng, 4, 16, False, 2048, 1401)] for _ in range(3)]
    known = specs(adapters)
    slots = slots_for_all(known)
    x, base = (rng.normal(size=(4, 2, n)).astype(np.float32) for n in (2048, 1401))
    feeds = {"x": x / 45, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT)}
    for indices in ([1] * 4, [0, 2, 1, 2]):
        found = native(library, slots, feeds, indices)
        expected = expected_rows(adapters, indices, (x / 45).astype(np.float64), base.astype(np.float64), [1401])
        assert np.abs(found - expected).max() <= 2.0**-16 * np.abs(expected).max()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    shared=st.booleans(),
    rows=st.lists(st.integers(-1, 3), min_size=1, max_size=5),
    tokens=st.integers(0, 9),
    width=st.integers(1, 40),
    d_in=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_any_sizes_as_in_the_body(library, sizes, shared, rows, tokens, width, d_in, seed):
    rng = np.random.default_rng(seed)
    adapters: list[Rows] = [[make_projection(rng, k, c, shared and k > 1, d_in, width)] for k, c in sizes]
    known = specs(adapters)
    slots = slots_for_all(known)
    indices = [row % len(adapters) if row >= 0 else -1 for row in rows]
    x, base = (rng.normal(size=(len(rows), tokens, n)).astype(np.float32) for n in (d_in, width))
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT)}
    found = native(library, slots, feeds, indices)
    expected = expected_rows(adapters, indices, x.astype(np.float64), base.astype(np.float64), [width])
    floor = max(min(min(abs(p.normalizer_floor) for [p] in adapters), 1.0), 0.02)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= 1e-4 / floor * np.abs(expected).max(initial=1)).all()


def test_a_slot_is_read_anew_at_every_call(library, rng):
    """A swap is a copy into the slot's memory; nothing of the adapter before is kept, packed or otherwise."""
    adapters: list[Rows] = [[make_projection(rng, 4, 2, False, 16, 24)] for _ in range(3)]
    known = specs(adapters)
    slots = slots_for_all(known)
    x, base = (rng.normal(size=(2, 3, n)).astype(np.float32) for n in (16, 24))
    memory = slot_feeds(known[:2], slots, ir.DataType.FLOAT)
    session = open_model(adapters_model(list(slots.values())), library.path)
    for new in (0, 2, 1):
        for name, array in slot_feeds([known[new]], slots, ir.DataType.FLOAT).items():
            memory[name][1] = array[0]
        found = session.run(None, {"x": x, "base": base, **memory, "adapter": np.int32([1, 0])})[0]
        expected = expected_rows(adapters, [new, 0], x.astype(np.float64), base.astype(np.float64), [24])
        assert np.abs(found - expected).max() <= 2.0**-16 * np.abs(expected).max()


def test_nan_stays_with_its_row(library, rng):
    adapters: list[Rows] = [[make_projection(rng, 4, 2, False, 16, 24)] for _ in range(2)]
    known = specs(adapters)
    slots = slots_for_all(known)
    x, base = (rng.normal(size=(4, 3, n)).astype(np.float32) for n in (16, 24))
    x[1, 2, 3] = np.nan
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT)}
    found = native(library, slots, feeds, [0, 0, 1, -1])
    assert np.isnan(found[1, 2]).all()
    assert np.isfinite(np.delete(found.reshape(12, 24), 5, axis=0)).all()


def test_what_does_not_belong_together_is_refused_in_words(library, rng):
    adapters: list[Rows] = [[make_projection(rng, 4, 2, False, 7, 6)] for _ in range(2)]
    known = specs(adapters)
    slots = slots_for_all(known)
    x, base = (rng.normal(size=(2, 3, n)).astype(np.float32) for n in (7, 6))
    feeds = {"x": x, "base": base, **slot_feeds(known, slots, ir.DataType.FLOAT), "adapter": np.int32([1, 0])}
    session = open_model(adapters_model(list(slots.values())), library.path)
    session.run(None, feeds)
    for name, value, words in (
        ("adapter", np.int32([1, 2]), "adapter holds 2, there are 2 slots"),
        ("adapter", np.int32([1, 0, 0]), r"adapter is \[3\], expected \[1\] or \[2\]"),
        ("mix", feeds["mix"][:1], "down, mix and up have 2, 1 and 2 slots"),
        ("up", feeds["up"][:, :7], r"up is \[7, 6\], expected two dimensions"),
        ("base", base[:, :2], r"base is \[2, 2, 6\], expected \[2, 3, 6\]"),
    ):
        with pytest.raises(Exception, match=words):
            session.run(None, {**feeds, name: value})


def test_the_cuda_kernels_refuse_an_adapter_for_each_row_in_words(programs, rng):
    """Emulated, in the CPU provider: they would take the slots for one adapter's weights."""
    slots = slots_for_all(specs([[make_projection(rng, 4, 2, False, 7, 6)]]))
    library = programs / "onnxruntime" / "libteamlora_onnxruntime_emulated.so"
    with pytest.raises(Exception, match="an adapter for each row \\(version 2\\) has no CUDA kernels yet"):
        open_model(adapters_model(list(slots.values())), library)
