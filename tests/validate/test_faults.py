"""Plants faults into exported models; validation must catch every one and name the module where it is."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from teamlora_export.bundle import DATA_NAME, MODEL_NAME, Bundle, read_bundle, write_manifest
from teamlora_export.files import sha256_of
from teamlora_export.validate.run import validate_bundle

QKV = "model.layers.3.self_attn.q_proj+k_proj+v_proj"
GATE_UP = "model.layers.2.mlp.gate_proj+up_proj"


@dataclass(frozen=True)
class Fault:
    """An edit of a bundle's model, and a pattern for the module that must be named."""

    edit: Callable[[ir.Model], None]
    located: str
    bundle: tuple[str, ...] = ("llama",)


def weight(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = model.graph.initializers[name]
    changed = np.ascontiguousarray(change(value.const_value.numpy().copy()))
    value.const_value = ir.tensor(changed, dtype=value.dtype, name=name)


def node_of(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph for value in node.outputs if value.name == output)


def insert_before_uses(model: ir.Model, value: ir.Value, op_type: str, constant: np.ndarray) -> None:
    """Everything that read `value` reads `op_type(value, constant)`."""
    held = ir.Value(name=f"{value.name}.fault", const_value=ir.tensor(constant))
    model.graph.initializers.add(held)
    node = ir.node(op_type, [value, held], name=f"{value.name}.fault_node")
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    node.replace_input_with(0, value)
    model.graph.insert_before(next(iter(model.graph)), node)
    model.graph.sort()


def swap_experts(model: ir.Model) -> None:
    weight(model, "model.layers.2.mlp.down_proj.teamlora_up", lambda up: up[[2, 3, 0, 1, 4, 5, 6, 7]])


def fold_constants_twice(model: ir.Model) -> None:
    weight(
        model,
        "model.layers.1.self_attn.o_proj.teamlora_down",
        lambda down: np.concatenate([down[:8] * 8, down[8:]]),
    )


def forget_to_normalize(model: ir.Model) -> None:
    total = next(node for node in model.graph if node.op_type == "Div" and "w_sum" in (node.inputs[1].name or ""))
    ir.convenience.replace_all_uses_with(total.outputs[0], total.inputs[0])


def transpose_interaction(model: ir.Model) -> None:
    weight(model, f"{QKV}.mix", lambda mix: mix.transpose(0, 2, 1))


def exchange_siblings(model: ir.Model) -> None:
    weight(model, f"{GATE_UP}.down", lambda down: np.concatenate([down[12:], down[:12]]))


def change_epsilon(model: ir.Model) -> None:
    norm = node_of(model, "model.layers.2.input_layernorm")
    scaled = next(v for v in norm.inputs if v.producer() is not None)
    reciprocal = next(v for v in scaled.producer().inputs if v.producer() and v.producer().op_type == "Reciprocal")
    added = reciprocal.producer().inputs[0].producer().inputs[0].producer()
    assert added.op_type == "Add"
    epsilon = ir.Value(name="epsilon", const_value=ir.tensor(np.float32(1e-3)))
    model.graph.initializers.add(epsilon)
    added.replace_input_with(1, epsilon)


def ignore_the_mask(model: ir.Model) -> None:
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    insert_before_uses(model, mask, "Max", np.int64(1))


def shift_positions(model: ir.Model) -> None:
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    insert_before_uses(model, positions, "Add", np.int64(1))


def concatenate_cache_backwards(model: ir.Model) -> None:
    for name in ("present.1.key", "present.1.value"):
        node = node_of(model, name)
        past, new = node.inputs
        node.replace_input_with(0, new)
        node.replace_input_with(1, past)


def overflow(model: ir.Model) -> None:
    weight(model, "model.layers.1.mlp.down_proj.weight.T", lambda w: np.full_like(w, 6e4))


def drop_a_bias(model: ir.Model) -> None:
    weight(model, "model.layers.2.self_attn.q_proj+k_proj+v_proj.bias", lambda bias: np.zeros_like(bias))


def skip_a_residual(model: ir.Model) -> None:
    node = node_of(model, "model.layers.2")
    node.replace_input_with(0, node.inputs[1])


def scale_attention_wrongly(model: ir.Model) -> None:
    soft = next(node for node in model.graph if node.op_type == "Softmax")
    insert_before_uses(model, soft.inputs[0], "Mul", np.float32(1.1))


def read_the_next_layers_weights(model: ir.Model) -> None:
    node = node_of(model, "model.layers.1.mlp.down_proj")
    base = node.inputs[1].producer()
    base.replace_input_with(1, model.graph.initializers["model.layers.2.mlp.down_proj.weight.T"])


def scale_the_head_a_little(model: ir.Model) -> None:
    weight(model, "lm_head.weight.T", lambda head: head * np.float32(1.0005))


FAULTS = {
    "an expert's B swapped": Fault(swap_experts, r"model\.layers\.2\.mlp\.down_proj"),
    "constants folded twice": Fault(fold_constants_twice, r"model\.layers\.1\.self_attn\.o_proj"),
    "router not normalised": Fault(
        forget_to_normalize, r"model\.layers\.0\.self_attn\.q_proj", ("llama", "fp32", "standard")
    ),
    "M transposed": Fault(transpose_interaction, r"model\.layers\.3\.self_attn\.[qkv]_proj"),
    "siblings exchanged": Fault(exchange_siblings, r"model\.layers\.2\.mlp\.gate_proj"),
    "wrong epsilon": Fault(change_epsilon, r"model\.layers\.2\.input_layernorm"),
    "mask ignored": Fault(ignore_the_mask, r"model\.layers\.0\.self_attn.*"),
    "position off by one": Fault(shift_positions, r"model\.rotary_emb"),
    "cache concatenated backwards": Fault(
        concatenate_cache_backwards, r"model\.layers\.1\.self_attn.*|present\.1\.key"
    ),
    "fp16 overflow": Fault(overflow, r"model\.layers\.1\.mlp\.down_proj", ("llama", "fp16")),
    "bias dropped": Fault(drop_a_bias, r"model\.layers\.2\.self_attn\.[qkv]_proj", ("qwen2",)),
    "residual skipped": Fault(skip_a_residual, r"model\.layers\.2"),
    "attention scaled wrongly": Fault(scale_attention_wrongly, r"model\.layers\.0\.self_attn.*"),
    "another layer's weights": Fault(read_the_next_layers_weights, r"model\.layers\.1\.mlp\.down_proj"),
    "head scaled by 1.0005": Fault(scale_the_head_a_little, r"lm_head|logits", ("qwen2",)),
}


@pytest.fixture
def plant(tmp_path, make_bundle) -> Callable[[Fault], Bundle]:
    """A copy of a bundle with a fault in its model, and a manifest that vouches for it."""

    def plant(fault: Fault) -> Bundle:
        source = make_bundle(
            *fault.bundle[:1],
            *fault.bundle[1:2],
            **({"op_form": fault.bundle[2]} if fault.bundle[2:] else {}),
        )
        folder = tmp_path / "bundle"
        shutil.copytree(source.folder, folder)
        model = ir.load(source.model)
        fault.edit(model)
        ir.save(model, folder / MODEL_NAME, external_data=DATA_NAME)
        hashes = {name: sha256_of(folder / name) for name in (MODEL_NAME, DATA_NAME)}
        write_manifest(folder, dataclasses.replace(source.manifest, sha256=hashes))
        return read_bundle(folder)

    return plant


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught_and_located(name, plant):
    fault = FAULTS[name]
    verdict = validate_bundle(plant(fault))
    assert not verdict.passed
    assert verdict.departure is not None
    assert re.fullmatch(fault.located, verdict.departure.module), verdict.departure
    assert "/" in verdict.departure.node, "the node is named after its output and type"


@pytest.mark.parametrize("bundle", [("llama",), ("qwen2",), ("llama", "fp16"), ("llama", "fp32", "standard")])
def test_a_bundle_saved_again_without_a_fault_passes(bundle, plant):
    assert validate_bundle(plant(Fault(lambda model: None, "", bundle))).passed


@pytest.mark.parametrize("name", ["M transposed", "mask ignored", "cache concatenated backwards", "residual skipped"])
def test_a_fault_is_located_layer_by_layer_too(name, plant):
    fault = FAULTS[name]
    verdict = validate_bundle(plant(fault), layer_by_layer=True)
    assert not verdict.passed
    assert re.fullmatch(fault.located, verdict.departure.module), verdict.departure


@pytest.mark.parametrize("bundle", [("llama",), ("gemma3",), ("gpt2",), ("roberta",), ("bert", "bf16"), ("opt",)])
def test_a_good_bundle_passes_layer_by_layer(bundle, make_bundle):
    verdict = validate_bundle(make_bundle(*bundle), layer_by_layer=True)
    assert verdict.passed, verdict.departure
    assert len(verdict.modules) > 30, "every module is compared, not the outputs alone"
