"""That an adapter in a larger slot computes what it does by itself: in float64, against the published layer."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from formula import FAMILIES, by_formula, make_projection, random_projection
from hypothesis import given, settings
from hypothesis import strategies as st

from teamlora_export.adapter import AdapterConfig, AdapterSpec, ExpertProjection
from teamlora_export.adapter.padding import Room, Slot, as_adapter, place, placed, room_for, slots_for, slots_like
from teamlora_export.graph import op


def in_slot(projection: ExpertProjection, slot: Slot, x: np.ndarray, base: np.ndarray) -> np.ndarray:
    """What version 2 of the op computes of the folded, placed weights, in float64 and without its roundings."""
    weights, k = op.fold(place(projection, slot)), slot.num_experts
    assert weights.down.shape == (slot.down_rank + k, slot.in_features)
    assert weights.up.shape == (k * slot.expert_rank, slot.out_features)
    z = x @ weights.down.T
    u, logits = z[..., : slot.down_rank], z[..., slot.down_rank :]
    logits = np.where(np.abs(weights.mix[0]).sum(1) > 0, logits, np.finfo(np.float32).min)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    w = p @ weights.mix[0]
    w /= w.sum(-1, keepdims=True)
    read = np.tile(u, k) if slot.shared_down else u
    return base + (read * np.repeat(w, slot.expert_rank, -1)) @ weights.up


def spec(*projections: ExpertProjection, path: str = "p") -> AdapterSpec:
    named = {f"{path}{i}": projection for i, projection in enumerate(projections)}
    return AdapterSpec("lora", AdapterConfig(8, 1.0), named, {}, "", "0" * 64)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7), st.booleans()), min_size=1, max_size=4),
    room=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    scale=st.sampled_from([1.0, 40.0]),
    seed=st.integers(0, 999),
)
def test_an_adapter_in_a_slot_that_others_made_larger_computes_the_same(sizes, room, scale, seed):
    """Logits far below zero too, where that of an expert that is not there would be the largest by far."""
    rng = np.random.default_rng(seed)
    projections = [make_projection(rng, k, c, shared and k > 1, 5, 6) for k, c, shared in sizes]
    least = slots_for([spec(p) for p in projections])["p0"]
    more = Slot(5, 6, least.num_experts + room[0], least.expert_rank + room[1], least.shared_down)
    x, base = scale * rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 6))
    for projection in projections:
        expected = by_formula(projection, x, base)
        for slot in (least, more):
            assert slot.misfit(projection) is None
            error = np.abs(in_slot(projection, slot, x, base) - expected).max()
            # Sums in another order, divided by a normaliser that may be small.
            floor = max(abs(projection.normalizer_floor), 0.05)
            assert error <= 1e-12 / floor * max(np.abs(expected).max(), 1)


@settings(max_examples=100, deadline=None)
@given(
    given=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7), st.booleans()), min_size=1, max_size=3),
    late=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12), st.booleans()), min_size=2, max_size=2),
    seed=st.integers(0, 999),
)
def test_the_room_that_a_later_adapter_needs_is_enough_for_it_and_stays_exact(given, late, seed):
    """Two modules, of which the later adapter needs different rooms."""
    rng = np.random.default_rng(seed)
    known = [spec(*(make_projection(rng, k, c, shared and k > 1, 5, 6) for _ in late)) for k, c, shared in given]
    new = spec(*(make_projection(rng, k, c, shared and k > 1, 5, 6) for k, c, shared in late))
    least = slots_for(known)
    slots = slots_for(known, room_for(new, least))
    if not any(slot.shared_down for slot in least.values()):
        # The options alone, beside whatever the export has, keep room for what fits now.
        other = spec(*(make_projection(rng, 2, 1, False, 5, 6) for _ in late))
        alone = slots_for([other], room_for(new, least))
        assert not any(alone[path].misfit(p) for each in (*known, new) for path, p in each.projections.items())
    x, base = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 6))
    for path, projection in [pair for adapter in (*known, new) for pair in adapter.projections.items()]:
        assert slots[path].misfit(projection) is None
        expected = by_formula(projection, x, base)
        error = np.abs(in_slot(projection, slots[path], x, base) - expected).max()
        floor = max(abs(projection.normalizer_floor), 0.05)
        assert error <= 1e-12 / floor * max(np.abs(expected).max(), 1)


def test_a_rank_has_room_for_any_number_of_experts_that_divides_it(rng):
    slot = slots_for([spec(make_projection(rng, 2, 1, False, 5, 6))], Room(rank=12, experts=4))["p0"]
    assert (slot.num_experts, slot.expert_rank) == (4, 4), "three experts of 4 have no parts"
    for k in (1, 2, 3, 4):
        assert slot.misfit(make_projection(rng, k, 12 // k, False, 5, 6)) is None
    assert slots_for([spec(make_projection(rng, 4, 2, False, 5, 6))], Room(rank=8))["p0"].expert_rank == 2
    hydra = slots_for([spec(make_projection(rng, 3, 2, True, 5, 6))], Room(rank=8, experts=4))["p0"]
    assert (hydra.shared_down, hydra.num_experts, hydra.expert_rank) == (True, 4, 8)


@pytest.mark.parametrize(("rank", "experts"), [(16, 4), (64, 8), (7, 3), (2, 5)])
def test_a_rank_has_room_for_every_smaller_one(rank, experts, rng):
    """Fifteen in three experts have no parts, and sixteen in four need four of each alone."""
    lora = spec(make_projection(rng, 1, 1, False, 5, 6))
    slot = slots_for([lora], Room(rank, experts))["p0"]
    for k in range(1, experts + 1):
        for r in range(k, rank + 1, k):
            assert slot.misfit(make_projection(rng, k, r // k, False, 5, 6)) is None
    # Where r is of each expert, k times as much is enough.
    slot = slots_for([lora], Room(rank * experts, experts))["p0"]
    for k, shared in ((experts, False), (experts, True), (2, True), (3, False)):
        assert slot.misfit(make_projection(rng, k, rank, shared, 5, 6)) is None


def test_a_slot_like_others_takes_what_each_of_them_takes(rng):
    own, shared = Slot(5, 6, 4, 2, shared_down=False), Slot(5, 6, 3, 16, shared_down=True)
    (slot,) = slots_like({"own": own, "shared": shared}, {"new": (5, 6)}).values()
    for k, c, reads_all in ((4, 2, False), (3, 16, True)):
        assert slot.misfit(make_projection(rng, k, c, reads_all, 5, 6)) is None


def test_experts_whose_rank_is_too_large_are_cut_into_parts(rng):
    """A LoRA of rank 16 takes no more room than four experts of rank 4."""
    lora, team = make_projection(rng, 1, 16, False, 7, 6), make_projection(rng, 4, 4, False, 7, 6)
    slot = slots_for([spec(lora), spec(team)])["p0"]
    assert (slot.num_experts, slot.expert_rank) == (4, 4)
    x, base = rng.normal(size=(1, 9, 7)), np.zeros((1, 9, 6))
    for projection in (lora, team, make_projection(rng, 2, 7, False, 7, 6), make_projection(rng, 2, 6, True, 7, 6)):
        assert np.allclose(in_slot(projection, slot, x, base), by_formula(projection, x, base), rtol=0, atol=1e-11)
    # A is what it was: what it makes of a token may be as large as 16 bits hold.
    assert (op.fold(place(lora, slot)).down[:16] == op.fold(lora).down[:16]).all()
    assert slot.misfit(make_projection(rng, 2, 9, False, 7, 6)) == (
        "has 2 experts of rank 9, the bundle's slots have room for 4 of rank 4"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_slot_of_its_own_shape_an_adapter_keeps_its_weights(family, rng):
    projection = random_projection(rng, family)
    slot = slots_for([spec(projection)])["p0"]
    ours, own = op.fold(place(projection, slot)), op.fold(projection)
    assert all((getattr(ours, name) == getattr(own, name)).all() for name in ("down", "mix", "up"))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("first", [np.float16, ml_dtypes.bfloat16])
def test_experts_of_unlike_types_lose_nothing_in_a_slot(shared, first, rng):
    """A checkpoint that was cast in part."""
    projection = make_projection(rng, 3, 2, shared, 7, 6)
    types = (first, np.float32, np.float16)
    projection = replace(projection, ups=tuple(up.astype(t) for up, t in zip(projection.ups, types, strict=True)))
    slot = slots_for([spec(projection)])["p0"]
    assert (op.fold(place(projection, slot)).up == op.fold(projection).up).all()


def test_a_module_that_an_adapter_does_not_change_has_no_experts(rng):
    one, two = spec(random_projection(rng, "teamlora")), spec(*[random_projection(rng, "lora") for _ in range(2)])
    slots = slots_for([one, two])
    weights = op.fold(placed(one, slots).projections["p1"])
    assert all(not getattr(weights, name).any() for name in ("down", "mix", "up"))
    assert not np.asarray(op.fold(as_adapter(slots).projections["p0"]).mix).any()


def test_what_does_not_fit_is_told_in_words(rng):
    slot = Slot(7, 6, 3, 5, shared_down=True)
    for projection, words in (
        (make_projection(rng, 2, 2, False, 8, 6), "maps 8 to 6 features, the base 7 to 6"),
        (make_projection(rng, 4, 2, True, 7, 6), "has 4 experts, the bundle's slots have room for 3"),
        (make_projection(rng, 2, 3, False, 7, 6), "has 6 rows in A, which its experts do not share"),
        (make_projection(rng, 2, 6, True, 7, 6), "has 2 experts of rank 6, .* room for 3 of rank 5"),
    ):
        reason = slot.misfit(projection)
        assert reason is not None
        assert re.search(words, reason)
    assert slot.misfit(make_projection(rng, 2, 2, False, 7, 6)) is None
