"""Plants faults into exported models; validation must catch every one and name the module where it is, and no other.

Each module is judged by what the candidate itself fed it, so many faults in one model do not hide each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from faults import (
    Fault,
    assert_located,
    bypass,
    cap_scores,
    change_epsilon,
    edit_the_body,
    exchange_heads,
    exchange_the_activation,
    forget_a_sign,
    forget_to_normalize,
    ignore_the_mask,
    judged,
    keep_keys_as_values,
    lose_precision,
    noise,
    plant,
    read_rings_one_place_off,
    read_the_cache_backwards,
    rewire,
    rewire_base,
    scale_attention,
    scale_what_experts_read,
    see_one_token_more,
    see_the_next_token,
    shift_positions,
    shift_tokens,
    skip_a_residual,
    take_rings_for_buffers,
    transpose_interaction,
    weight,
    without,
    write_at_the_start,
    write_keys_among_values,
    write_the_cache_of_another_layer,
)
from typer.testing import CliRunner

from teamlora_export.bundle import Bundle
from teamlora_export.cli import app
from teamlora_export.errors import ExportError
from teamlora_export.graph.passes.module_outputs import MODULES_KEY
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.stored import adapted_modules

DTYPES = ("fp32", "fp16", "bf16")


def layer(number: int | str, rest: str) -> str:
    return rf"model\.layers\.{number}\.{rest}"


def mlp(number: int, name: str) -> str:
    return f"model.layers.{number}.mlp.{name}"


def attention(number: int, name: str) -> str:
    return f"model.layers.{number}.self_attn.{name}"


# The module, and what can only show one step later: its part of the attention, or the cache.
IN_WEIGHTS = {
    "experts exchanged": Fault(
        weight(mlp(2, "down_proj.teamlora_up"), lambda up: up[[2, 3, 0, 1, 4, 5, 6, 7]]), layer(2, r"mlp\.down_proj")
    ),
    "constants folded twice": Fault(
        weight(attention(1, "o_proj.teamlora_down"), lambda down: np.concatenate([down[:8] * 8, down[8:]])),
        layer(1, r"self_attn\.o_proj"),
    ),
    "M transposed": Fault(
        weight(attention(3, "q_proj+k_proj+v_proj.mix"), lambda mix: mix.transpose(0, 2, 1)),
        layer(3, r"self_attn\.[qkv]_proj"),
    ),
    "M added twice": Fault(
        weight(attention(5, "q_proj+k_proj+v_proj.mix"), lambda mix: 2 * mix - np.eye(4, dtype=np.float32)),
        layer(5, r"self_attn\.[qkv]_proj"),
    ),
    "siblings exchanged": Fault(
        weight(mlp(2, "gate_proj+up_proj.down"), lambda down: np.concatenate([down[12:], down[:12]])),
        layer(2, r"mlp\.(gate|up)_proj"),
    ),
    "up is zero": Fault(weight(mlp(4, "down_proj.teamlora_up"), np.zeros_like), layer(4, r"mlp\.down_proj")),
    "a column of up lost": Fault(
        weight(mlp(5, "down_proj.teamlora_up"), without(slice(None), 7)), layer(5, r"mlp\.down_proj")
    ),
    "router reversed": Fault(
        weight(mlp(6, "down_proj.teamlora_down"), lambda down: np.concatenate([down[:8], down[:7:-1]])),
        layer(6, r"mlp\.down_proj"),
    ),
    "a row of the router lost": Fault(
        weight(mlp(0, "down_proj.teamlora_down"), without(9)), layer(0, r"mlp\.down_proj")
    ),
    "5 % too much": Fault(
        weight(attention(4, "o_proj.teamlora_up"), lambda up: up * 1.05), layer(4, r"self_attn\.o_proj")
    ),
    "1 % noise in a base weight": Fault(weight(mlp(1, "down_proj.weight.T"), noise), layer(1, r"mlp\.down_proj")),
    "a base weight transposed": Fault(
        weight(attention(0, "o_proj.weight.T"), np.transpose), layer(0, r"self_attn\.o_proj")
    ),
    "a channel of a norm lost": Fault(
        weight("model.layers.3.input_layernorm.weight", without(5)), layer(3, "input_layernorm")
    ),
    "a head of the base lost": Fault(
        weight(attention(6, "q_proj+k_proj+v_proj.weight"), without(slice(None), slice(32, 40))),
        layer(6, r"self_attn\.k_proj"),
    ),
    "head scaled by 1.005": Fault(weight("lm_head.weight.T", lambda head: head * 1.005), "lm_head"),
}
IN_STRUCTURE = {
    "experts bypassed": Fault(bypass(mlp(1, "down_proj")), r"model\.layers\.1(\.mlp\.down_proj)?"),
    "another layer's base weight": Fault(
        rewire_base(attention(2, "o_proj"), attention(3, "o_proj.weight.T")), layer(2, r"self_attn\.o_proj")
    ),
    "experts read what is not normalised": Fault(
        rewire(mlp(3, "gate_proj+up_proj"), 0, "model.layers.2"), layer(3, r"mlp\.(gate|up)_proj")
    ),
    "another layer's base": Fault(
        rewire(attention(4, "o_proj"), 1, attention(3, "o_proj")), layer(4, r"self_attn\.o_proj")
    ),
    "another layer's M": Fault(
        rewire(attention(5, "o_proj"), 3, attention(4, "o_proj.teamlora_mix")), layer(5, r"self_attn\.o_proj")
    ),
    "another layer's router": Fault(
        rewire(mlp(5, "gate_proj+up_proj"), 2, mlp(4, "gate_proj+up_proj.down")), layer(5, r"mlp\.(gate|up)_proj")
    ),
    "wrong epsilon": Fault(change_epsilon, layer(2, "input_layernorm")),
    "residual skipped": Fault(skip_a_residual, r"model\.layers\.5"),
    "attention scaled wrongly": Fault(scale_attention, layer(0, r"self_attn\.o_proj")),
    "scores capped": Fault(cap_scores, layer(6, r"self_attn\.o_proj")),
    "heads exchanged": Fault(exchange_heads, layer(2, r"self_attn\.o_proj")),
    "another activation": Fault(exchange_the_activation, layer(4, r"mlp\.act_fn")),
    "a sign lost in the rotation": Fault(forget_a_sign, layer(7, r"self_attn\.o_proj") + r"|present\.7\.key"),
    "cache read backwards": Fault(
        read_the_cache_backwards, layer(1, r"self_attn\.o_proj") + r"|present\.1\.(key|value)"
    ),
    "keys kept as values": Fault(keep_keys_as_values, layer(3, r"self_attn\.o_proj") + r"|present\.3\.value"),
    "precision lost on the way": Fault(lose_precision, layer(6, r"mlp\.(act_fn|down_proj)")),
    "experts read 5 % more": Fault(scale_what_experts_read, layer(6, r"mlp\.(gate|up)_proj")),
    "final norm skipped": Fault(rewire("logits", 0, "model.layers.7"), r"lm_head|model\.norm"),
    "tokens off by one": Fault(shift_tokens, r"model\.embed_tokens"),
}
EVERYWHERE = {
    "mask ignored": Fault(ignore_the_mask, layer(r"\d", r"self_attn\.o_proj")),
    # The sine has no name of its own: it shows in the keys.
    "positions off by one": Fault(shift_positions, r"model\.rotary_emb|present\.\d\.key"),
    "router not normalised": Fault(
        edit_the_body(forget_to_normalize, "siblings1"), layer(r"\d", r"(self_attn\.o_proj|mlp\.down_proj)")
    ),
    "M transposed in the body": Fault(
        edit_the_body(transpose_interaction, "siblings3"), layer(r"\d", r"self_attn\.[qkv]_proj")
    ),
}
IN_PLACE = {
    "every call written at the start": {
        "": Fault(write_at_the_start, r"present\.\d\.(key|value)|" + layer(r"\d", r"self_attn\.o_proj"))
    },
    "the next token seen": {"": Fault(see_the_next_token, layer(r"\d", r"self_attn\.o_proj"))},
    "one layer's cache": {
        "keys written among values": Fault(
            write_keys_among_values, layer(3, r"self_attn\.[ov]_proj") + r"|present\.3\.value"
        ),
        "another layer's keys kept": Fault(
            write_the_cache_of_another_layer, layer(5, r"self_attn\.o_proj") + r"|present\.5\.key"
        ),
    },
}
IN_RINGS = {
    "a window of one token more": Fault(see_one_token_more, layer(r"\d", r"self_attn\.o_proj")),
    "rings read one place off": Fault(read_rings_one_place_off, layer(r"\d", r"self_attn\.o_proj")),
}
GROUPS: dict[str, Mapping[str, Fault]] = {
    "weights": IN_WEIGHTS,
    "structure": IN_STRUCTURE,
    "everywhere": EVERYWHERE,
}


@pytest.fixture
def planted(tmp_path, make_bundle) -> Callable[..., Bundle]:
    return lambda faults, *bundle: plant(make_bundle(*bundle), tmp_path / "bundle", faults)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_planted_fault_is_located_where_each_layer_amplifies_rounding(group, dtype, planted):
    faults = GROUPS[group]
    verdict = judged(planted(faults, "amplifying", dtype))
    assert_located(verdict, faults)
    named = [d for d in verdict.departures if "read by nothing" not in d.reason]
    assert all("/" in d.node for d in named), "a node is named after its output and type"
    if group == "weights":
        # By each alone: weights of which no source is known are judged by what comes of them.
        for check in ("weights", "modules"):
            assert_located(verdict, faults, check)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("group", IN_PLACE)
def test_a_fault_in_a_cache_in_place_is_located(group, dtype, planted):
    assert_located(judged(planted(IN_PLACE[group], "amplifying", dtype, "function", "in-place")), IN_PLACE[group])


@pytest.mark.parametrize("name", IN_RINGS)
def test_a_fault_in_the_rings_of_layers_with_a_window_is_located(name, planted):
    faults = {name: IN_RINGS[name]}
    assert_located(judged(planted(faults, "mistral", "fp32", "function", "in-place")), faults)


@pytest.mark.parametrize("name", ["none", *IN_RINGS])
def test_a_window_that_is_wider_than_every_prompt_is_judged_all_the_same(name, planted):
    faults = {name: IN_RINGS[name]} if name in IN_RINGS else {}
    verdict = judged(planted(faults, "wide window", "fp32", "function", "in-place"))
    assert verdict.passed == (not faults)
    if faults:
        assert any(re.fullmatch(faults[name].located, d.module) for d in verdict.departures)


@pytest.mark.parametrize("model", ["mistral", "wide window"])
def test_rings_that_do_not_wrap_are_found(model, planted):
    faults = {"linear": Fault(take_rings_for_buffers, "")}
    with pytest.raises(ExportError, match="TensorScatter"):
        judged(planted(faults, model, "fp32", "function", "in-place"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_amplifies_rounding_passes_without_a_fault(dtype, planted):
    verdict = judged(planted({}, "amplifying", dtype))
    assert verdict.passed, verdict.departure
    assert verdict.weights > 100
    # Tolerances have room: a good model uses less than half of any.
    assert max(check.worst.severity for check in verdict.local) < 0.5


SINGLE = {
    "fp16 overflow": (
        ("llama", "fp16"),
        Fault(weight(mlp(1, "down_proj.weight.T"), lambda w: np.full_like(w, 6e4)), layer(1, r"mlp\.down_proj")),
    ),
    "NaN in a weight": (
        ("llama", "bf16"),
        Fault(weight(mlp(2, "down_proj.weight.T"), lambda w: w * np.nan), layer(2, r"mlp\.down_proj")),
    ),
    "bias dropped": (
        ("qwen2", "fp16"),
        Fault(weight(attention(2, "q_proj+k_proj+v_proj.bias"), np.zeros_like), layer(2, r"self_attn\.[qkv]_proj")),
    ),
    "an embedding that no prompt has": (
        ("qwen2", "bf16"),
        Fault(weight("model.embed_tokens.weight", without(383, 3)), r"model\.embed_tokens"),
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_fault_that_spreads_is_named_first_where_it_is(name, planted):
    bundle, fault = SINGLE[name]
    verdict = judged(planted({name: fault}, *bundle))
    assert not verdict.passed
    assert re.fullmatch(fault.located, verdict.departure.module), verdict.departure


@pytest.mark.parametrize("group", ["structure"])
def test_faults_are_located_layer_by_layer_too(group, planted):
    assert_located(judged(planted(GROUPS[group], "amplifying", "fp16"), layer_by_layer=True), GROUPS[group])


@pytest.mark.parametrize("bundle", [("llama", "fp16"), ("llama", "fp32", "standard"), ("llama", "bf16", "standard")])
def test_a_bundle_saved_again_without_a_fault_passes(bundle, planted):
    verdict = judged(planted({}, *bundle))
    assert verdict.passed, verdict.departure
    assert any(j.name.endswith("/experts") for j in verdict.modules), "experts are looked at by themselves"


@pytest.mark.parametrize("form", ["function", "standard"])
def test_every_part_of_an_adapted_projection_can_be_looked_at(form, make_bundle):
    bundle = make_bundle("llama", op_form=form)
    adapted = adapted_modules(bundle.manifest)
    assert len(adapted) == 28
    parts = {f"{path}/{part}" for path in adapted for part in ("input", "base", "experts")}
    assert parts <= set(OnnxRunner(bundle, adapted).taps)


def test_a_graph_that_does_not_say_which_value_is_which_modules_is_not_trusted(planted):
    def forget(model: ir.Model) -> None:
        for value in (value for node in model.graph for value in node.outputs):
            value.metadata_props.pop(MODULES_KEY, None)

    verdict = judged(planted({"marks": Fault(forget, "")}, "llama"))
    assert not verdict.passed
    assert verdict.departure is not None
    assert verdict.departure.check == "graph"
    assert len(verdict.departures) >= 28, "every adapted module"


def test_a_verdict_that_cannot_be_kept_is_given_all_the_same(planted, monkeypatch):
    """A full disk: nothing can be written into the bundle."""

    def full(*_: object) -> None:
        raise ExportError("No space left on device")

    bundle = planted({}, "llama", "fp16")
    monkeypatch.setattr("teamlora_export.shelf.write_manifest", full)
    result = CliRunner().invoke(app, ["validate", str(bundle.folder)])
    assert result.exit_code == 0, result.output
    shown = result.output.index("Passed: 6 cases")
    assert result.output.index("could not be kept") > shown
    assert "No space left on device" in result.output


@pytest.mark.parametrize("bundle", [("llama",), ("gemma3",), ("gpt2",), ("roberta",), ("bert", "bf16"), ("opt",)])
def test_a_good_bundle_passes_layer_by_layer(bundle, make_bundle):
    verdict = judged(make_bundle(*bundle), layer_by_layer=True)
    assert verdict.passed, verdict.departure
    assert len(verdict.modules) > 30, "every module is compared, not the outputs alone"
