"""Mixtures of experts: near ties of a router are no fault in any dtype, and a wrong router is one.

OLMoE with 64 experts: for some token two of them score so nearly alike that 16 bits take others than float64 does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from faults import Fault, assert_located, insert_after, insert_before, judged, node_of, plant, weight

LAYERS = r"model\.layers\."


def exchange_two(array: np.ndarray) -> np.ndarray:
    return array[[1, 0, *range(2, len(array))]]


def take_the_worst(model: ir.Model) -> None:
    node_of(model, "model.layers.1.mlp.gate/choice").attributes["largest"] = ir.AttrInt64("largest", 0)


def forget_to_normalise(model: ir.Model) -> None:
    node = node_of(model, "model.layers.2.mlp.gate/1")
    while node.op_type != "Div":
        node = node.inputs[0].producer()
    insert_before(model, node, 1, "Pow", 0)


def lose_half_of_the_shares(model: ir.Model) -> None:
    insert_after(model, node_of(model, "model.layers.3.mlp.gate/1").outputs[0], "Mul", 0.5)


ROUTERS = {
    "rows of the router exchanged": Fault(
        weight("model.layers.0.mlp.gate.weight", exchange_two), rf"{LAYERS}0\.mlp\.gate"
    ),
    "an expert's weights exchanged with another's": Fault(
        weight("model.layers.0.mlp.experts.down_proj", exchange_two), rf"{LAYERS}0\.mlp\.experts"
    ),
    "the worst experts taken for the best": Fault(take_the_worst, rf"{LAYERS}1\.mlp\.gate"),
    "shares not normalised": Fault(forget_to_normalise, rf"{LAYERS}2\.mlp\.gate"),
    "half of the shares lost": Fault(lose_half_of_the_shares, rf"{LAYERS}3\.mlp\.experts"),
}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_experts_that_float64_would_not_take_are_no_fault_where_they_score_alike(dtype, make_bundle):
    verdict = judged(make_bundle("olmoe", dtype))
    assert verdict.passed, verdict.departure or verdict.worst
    choices = [j for case in verdict.cases for j in case.judgements if j.name.endswith("/choice")]
    assert any(j.error.rms > 0 for j in choices), "no other expert was taken, so nothing is shown"
    assert max(j.severity for j in choices) < 0.5, "tolerances have room"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_wrong_router_is_located_by_its_values_alone(dtype, make_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("teamlora_export.validate.run.judge_weights", lambda *_: ())
    verdict = judged(plant(make_bundle("olmoe", dtype), tmp_path / "bundle", ROUTERS))
    assert_located(verdict, ROUTERS)
    assert not any(case.passed for case in verdict.cases), "it shows from end to end too"
