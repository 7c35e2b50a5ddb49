"""Faults that can be planted into the graph or the weights of an exported model of LLaMA's kind."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from teamlora_export.bundle import DATA_NAME, MODEL_NAME, Bundle, hash_files, read_bundle
from teamlora_export.graph import op
from teamlora_export.manifest import write_manifest
from teamlora_export.progress import Reporter
from teamlora_export.validate.run import validate_bundle
from teamlora_export.validate.verdict import Verdict

Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fault:
    """An edit of a model, and a pattern for the modules that must be named, and no others."""

    edit: Callable[[ir.Model], None]
    located: str


def plant(source: Bundle, folder: Path, faults: Mapping[str, Fault]) -> Bundle:
    """A copy of a bundle with faults in its model, and a manifest that vouches for it."""
    skipped = shutil.ignore_patterns(MODEL_NAME, DATA_NAME)
    shutil.copytree(source.folder, folder, ignore=skipped)
    model = ir.load(source.model)
    for fault in faults.values():
        fault.edit(model)
    ir.save(model, folder / MODEL_NAME, external_data=DATA_NAME)
    write_manifest(folder, dataclasses.replace(source.manifest, sha256=hash_files(folder)))
    return read_bundle(folder)


def judged(bundle: Bundle, **options: Any) -> Verdict:
    return validate_bundle(bundle, reporter=Reporter(quiet=True), **options)


def assert_located(verdict: Verdict, faults: Mapping[str, Fault], check: str = "") -> None:
    """Every fault is named by where it is, and nothing is blamed that is in order."""
    assert not verdict.passed
    named = {d.module: d for d in verdict.departures if d.check.startswith(check)}
    missed = [name for name, fault in faults.items() if not any(re.fullmatch(fault.located, m) for m in named)]
    assert not missed, sorted(named)
    blamed = [d for m, d in named.items() if not any(re.fullmatch(fault.located, m) for fault in faults.values())]
    assert not blamed


def weight(name: str, change: Change) -> Callable[[ir.Model], None]:
    """`change` gets the weight in float32."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        stored = value.const_value.numpy()
        changed = np.ascontiguousarray(change(stored.astype(np.float32)).astype(stored.dtype))
        value.const_value = ir.tensor(changed, dtype=value.const_value.dtype, name=name)

    return edit


def noise(array: np.ndarray) -> np.ndarray:
    return array * (1 + 0.01 * np.random.default_rng(0).standard_normal(array.shape).astype(np.float32))


def without(*index: object) -> Change:
    """Zero at an index."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index if len(index) > 1 else index[0]] = 0
        return array

    return change


def node_of(model: ir.Model, output: str) -> ir.Node:
    return next(node for node in model.graph for value in node.outputs if value.name == output)


def first_in_layer(model: ir.Model, layer: int, op_type: str) -> ir.Node:
    inside = (node for node in model.graph if node.name.startswith(f"model.layers.{layer}"))
    return next(node for node in inside if node.op_type == op_type)


def insert_after(model: ir.Model, value: ir.Value, op_type: str, constant: float) -> None:
    """Everything that read `value` reads `op_type(value, constant)`."""
    users = list(value.uses())
    for user, index in users:
        user.replace_input_with(index, _computed(model, value, op_type, constant))
    model.graph.sort()


def insert_before(model: ir.Model, node: ir.Node, index: int, op_type: str, constant: float) -> None:
    """An input of a node becomes `op_type(input, constant)`."""
    node.replace_input_with(index, _computed(model, node.inputs[index], op_type, constant))
    model.graph.sort()


def _computed(model: ir.Model, value: ir.Value, op_type: str, constant: float) -> ir.Value:
    number = model.graph.num_nodes()
    kind = np.dtype(ml_dtypes.bfloat16) if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy()
    held = _held(model, f"fault_{number}", np.asarray(constant, kind), value.dtype)
    return _append(model, op_type, [value, held], {}, value.dtype)


def _held(model: ir.Model, name: str, array: np.ndarray, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
    """A new constant."""
    tensor = ir.tensor(array, dtype=dtype, name=name)
    held = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    model.graph.initializers.add(held)
    return held


def _append(
    model: ir.Model, op_type: str, inputs: list[ir.Value], attributes: dict[str, int], dtype: ir.DataType
) -> ir.Value:
    name = f"fault_node_{model.graph.num_nodes()}"
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, ir.TensorType(dtype), inputs[0].shape
    model.graph.append(node)
    return node.outputs[0]


def rewire(output: str, index: int, source: str) -> Callable[[ir.Model], None]:
    """An input of the node that makes `output` becomes another weight or value."""

    def edit(model: ir.Model) -> None:
        _rewire(model, node_of(model, output), index, source)

    return edit


def rewire_base(output: str, source: str) -> Callable[[ir.Model], None]:
    """The product behind a node of the op uses another weight."""

    def edit(model: ir.Model) -> None:
        _rewire(model, node_of(model, output).inputs[1].producer(), 1, source)

    return edit


def _rewire(model: ir.Model, node: ir.Node, index: int, source: str) -> None:
    values = {value.name: value for each in model.graph for value in each.outputs}
    node.replace_input_with(index, values.get(source) or model.graph.initializers[source])
    model.graph.sort()


def bypass(output: str) -> Callable[[ir.Model], None]:
    """What read a node of the op reads its base."""

    def edit(model: ir.Model) -> None:
        node = node_of(model, output)
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[1])

    return edit


def change_epsilon(model: ir.Model) -> None:
    first_in_layer(model, 2, "RMSNormalization").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def ignore_the_mask(model: ir.Model) -> None:
    insert_after(model, next(value for value in model.graph.inputs if value.name == "attention_mask"), "Max", 1)


def shift_positions(model: ir.Model) -> None:
    insert_after(model, next(value for value in model.graph.inputs if value.name == "position_ids"), "Add", 1)


def shift_tokens(model: ir.Model) -> None:
    node = node_of(model, "model.embed_tokens")
    insert_before(model, node, 1, "BitwiseXor", 1)


def read_the_cache_backwards(model: ir.Model) -> None:
    attention = node_of(model, "present.1.key")
    step = {"starts": -1, "ends": -(1 << 40), "axes": 2, "steps": -1}
    bounds = [_held(model, f"fault_{name}", np.array([number])) for name, number in step.items()]
    for index in (4, 5):
        past = attention.inputs[index]
        attention.replace_input_with(index, _append(model, "Slice", [past, *bounds], {}, past.dtype))
    model.graph.sort()


def keep_keys_as_values(model: ir.Model) -> None:
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.3.key")
    node_of(model, "present.3.value").replace_input_with(5, past)


def skip_a_residual(model: ir.Model) -> None:
    node = node_of(model, "model.layers.5")
    node.replace_input_with(0, node.inputs[1])


def scale_attention(model: ir.Model) -> None:
    attributes = first_in_layer(model, 0, "Attention").attributes
    attributes["scale"] = ir.AttrFloat32("scale", attributes["scale"].as_float() * 1.1)


def cap_scores(model: ir.Model) -> None:
    first_in_layer(model, 6, "Attention").attributes["softcap"] = ir.AttrFloat32("softcap", 2.0)


def exchange_heads(model: ir.Model) -> None:
    """The queries' heads in another order, so that each group reads another group's keys."""
    attention = first_in_layer(model, 2, "Attention")
    held = _held(model, "fault_order", np.array([2, 3, 0, 1]))
    queries = attention.inputs[0]
    attention.replace_input_with(0, _append(model, "Gather", [queries, held], {"axis": 1}, queries.dtype))
    model.graph.sort()


def write_at_the_start(model: ir.Model) -> None:
    insert_after(model, node_of(model, "present.0.key").inputs[2], "Mul", 0)


def see_the_next_token(model: ir.Model) -> None:
    seen = next(node for node in model.graph if node.op_type == "LessOrEqual")
    insert_before(model, seen, 1, "Add", 1)


def write_keys_among_values(model: ir.Model) -> None:
    keys, values = (node_of(model, f"present.3.{which}") for which in ("key", "value"))
    values.replace_input_with(1, keys.inputs[1])
    model.graph.sort()


def write_the_cache_of_another_layer(model: ir.Model) -> None:
    node_of(model, "present.5.key").replace_input_with(0, node_of(model, "present.4.key").inputs[0])


def see_one_token_more(model: ir.Model) -> None:
    """The window of the one kind of mask that there is."""
    seen = next(node for node in model.graph if node.op_type == "Greater")
    insert_before(model, seen, 1, "Sub", 1)


def read_rings_one_place_off(model: ir.Model) -> None:
    insert_before(model, next(node for node in model.graph if node.op_type == "Mod"), 0, "Add", 1)


def take_rings_for_buffers(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "TensorScatter":
            node.attributes["mode"] = ir.AttrString("mode", "linear")


def exchange_the_activation(model: ir.Model) -> None:
    first_in_layer(model, 4, "Sigmoid").op_type = "HardSigmoid"


def forget_a_sign(model: ir.Model) -> None:
    insert_before(model, first_in_layer(model, 7, "RotaryEmbedding"), 2, "Mul", -1)


def lose_precision(model: ir.Model) -> None:
    value = node_of(model, "model.layers.6.mlp.act_fn").outputs[0]
    other = ir.DataType.BFLOAT16 if value.dtype != ir.DataType.BFLOAT16 else ir.DataType.FLOAT16
    users = list(value.uses())
    rounded = _append(model, "Cast", [value], {"to": int(other)}, other)
    back = _append(model, "Cast", [rounded], {"to": int(value.dtype)}, value.dtype)
    for user, index in users:
        user.replace_input_with(index, back)
    model.graph.sort()


def scale_what_experts_read(model: ir.Model) -> None:
    node = next(n for n in model.graph if op.is_op(n) and n.outputs[0].name.startswith("model.layers.6.mlp.gate"))
    insert_before(model, node, 0, "Mul", 1.05)


def edit_the_body(change: Callable[[ir.Function], None], overload: str) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        change(next(f for f in model.functions.values() if f.overload == overload))

    return edit


def forget_to_normalize(function: ir.Function) -> None:
    total = next(node for node in function if node.op_type == "Div" and "w_sum" in (node.inputs[1].name or ""))
    ir.convenience.replace_all_uses_with(total.outputs[0], total.inputs[0])


def transpose_interaction(function: ir.Function) -> None:
    mix = next(value for value in function.inputs if value.name == "mix")
    turned = ir.node("Transpose", [mix], {"perm": [0, 2, 1]}, name="fault_transpose")
    turned.outputs[0].name = "turned"
    ir.convenience.replace_all_uses_with(mix, turned.outputs[0])
    turned.replace_input_with(0, mix)
    function.insert_before(function[0], turned)
