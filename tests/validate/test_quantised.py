"""Bundles with a quantised base: they are right, what is not is found where it is, and what it cost is told."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from faults import Fault, assert_located, judged, node_of, plant, rewire_base, weight
from typer.testing import CliRunner

from teamlora_export.bundle import read_bundle
from teamlora_export.cli import app
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.graph.quantized import dequantised, is_quantised
from teamlora_export.graph.read import read_graph
from teamlora_export.validate.verdict import Thresholds

INT4 = {"weights_form": "int4"}
EVERYTHING = {"weights_form": "int4", "head_form": "int8", "zero_points": True}
# Random weights have no structure that survives: what is asked of a trained model would fail them.
LENIENT = Thresholds(perplexity=10.0, agreement=0.0)


def mlp(number: int, name: str) -> str:
    return f"model.layers.{number}.mlp.{name}"


def attention(number: int, name: str) -> str:
    return f"model.layers.{number}.self_attn.{name}"


@pytest.mark.parametrize(
    ("options", "form"),
    [
        (INT4, {}),
        (EVERYTHING, {}),
        ({"weights_form": "int8"}, {"layer_by_layer": True}),
    ],
)
def test_a_quantised_bundle_is_right_and_says_what_it_cost(make_bundle, options, form) -> None:
    bundle = make_bundle("llama", **options)
    verdict = judged(bundle, thresholds=None if form else LENIENT, **form)
    assert verdict.exact, verdict.departures
    assert (verdict.quality is None) == bool(form)
    if verdict.quality is not None:
        assert verdict.passed, verdict.quality.findings
        quantised, base = verdict.quality.quantised, verdict.quality.base
        assert 0 < quantised.kl < base.kl
        assert verdict.quality.tasks > 0
        assert read_bundle(bundle.folder).manifest.validation["quality"]["figures"]["quantised"]["kl"] == quantised.kl


def test_16_bits_and_a_cache_in_place_are_judged_alike(make_bundle) -> None:
    bundle = make_bundle("llama", "fp16", cache="in-place", **EVERYTHING)
    verdict = judged(bundle, quality=False)
    assert verdict.passed, verdict.departures


def test_weights_are_stored_in_four_bits(make_bundle) -> None:
    bundle = make_bundle("llama", **INT4)
    model = read_graph(bundle)
    products = [node for node in model.graph if is_quantised(node)]
    # q/k/v and gate/up are one product each.
    assert len(products) == 4 * 4
    stored = sum(value.const_value.nbytes for node in products for value in node.inputs[1:])
    numbers = sum(dequantised(node).size for node in products)
    # 4 bits and a scale for 32 of them; 48 inputs fill one block and a half.
    assert stored < numbers * (4 / 8 + 4 / 32) * 4 / 3
    assert not any(
        node.op_type == "MatMul" and dequantised(node) is not None
        for node in model.graph
        if node.outputs[0].name != "logits"
    )


FAULTS = {
    "a scale twice as large in one block": Fault(
        weight(
            mlp(0, "down_proj.weight.T.scales"), lambda s: np.where(np.arange(s.size).reshape(s.shape) == 3, 2 * s, s)
        ),
        r"model\.layers\.0\.mlp\.down_proj",
    ),
    "two codes exchanged": Fault(
        weight(
            attention(1, "o_proj.weight.T.codes"), lambda c: np.concatenate([c[:, :, 1:2], c[:, :, :1], c[:, :, 2:]], 2)
        ),
        r"model\.layers\.1\.self_attn\.o_proj",
    ),
    "experts exchanged": Fault(
        weight(mlp(2, "down_proj.teamlora_up"), lambda up: up[[2, 3, 0, 1, 4, 5, 6, 7]]),
        r"model\.layers\.2\.mlp\.down_proj",
    ),
    "another layer's weight": Fault(
        rewire_base(attention(3, "q_proj+k_proj+v_proj"), attention(2, "q_proj+k_proj+v_proj.weight.codes")),
        r"model\.layers\.3\.self_attn\.[qkv]_proj",
    ),
}


def _ignore_zero_points(model: ir.Model) -> None:
    node_of(model, mlp(1, "down_proj")).inputs[1].producer().replace_input_with(3, None)


def test_faults_in_codes_are_found_where_they_are(make_bundle, tmp_path) -> None:
    faults = {**FAULTS, "zero points ignored": Fault(_ignore_zero_points, r"model\.layers\.1\.mlp\.down_proj")}
    bundle = plant(make_bundle("llama", **EVERYTHING), tmp_path / "faulty", faults)
    assert_located(judged(bundle, quality=False), faults)


def test_a_lost_adapter_is_seen_in_what_quantisation_cost(make_bundle, tmp_path) -> None:
    source = make_bundle("llama", **INT4)
    names = [name for name in read_graph(source).graph.initializers if name.endswith((".up", "teamlora_up"))]
    lost = {name: Fault(weight(name, np.zeros_like), ".*") for name in names}
    verdict = judged(plant(source, tmp_path / "lost", lost), thresholds=LENIENT)
    assert any("nearer to the model without experts" in finding for finding in verdict.quality.findings)


def test_a_bundle_that_lost_too_much_fails_by_name(make_bundle) -> None:
    bundle = make_bundle("llama", **INT4)
    result = CliRunner().invoke(app, ["validate", str(bundle.folder), "--least-agreement", "1"])
    assert result.exit_code == 1
    assert "Passed: 6 cases" in result.output
    assert "agreement on the likeliest" in result.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights_form": "int3"}, "--weights int3: unknown"),
        ({"head_form": "int4"}, "Give --weights as well"),
        ({"zero_points": True}, "Give --weights as well"),
        ({"weights_form": "int8", "head_form": "int4", "task": "feature-extraction"}, "has no head to quantise"),
    ],
)
def test_wrong_options_are_refused(make_base, make_adapter, tmp_path, options, said) -> None:
    with pytest.raises(ExportError, match=said):
        export_onnx(make_base("llama").name, make_adapter("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
