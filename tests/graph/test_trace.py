"""What is traced has exactly the names of its task, or is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from transformers import DynamicCache

from teamlora_export.errors import ExportError
from teamlora_export.graph.tasks import TracedSignature
from teamlora_export.graph.trace import _name_inputs_and_outputs

_CACHE = ["past_key_values.layers.0.keys", "past_key_values.layers.0.values"]


def traced(inputs: list[str], outputs: list[str]) -> ir.Model:
    return ir.Model(
        ir.Graph([ir.Value(name=name) for name in inputs], [ir.Value(name=name) for name in outputs], nodes=[]),
        ir_version=10,
    )


@pytest.fixture
def signature() -> TracedSignature:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    sample = {"input_ids": torch.zeros(1, 1), "past_key_values": cache}
    return TracedSignature(lambda **_: {}, sample, {}, ("logits", "present.0.key", "present.0.value"))


@pytest.mark.parametrize(("before", "after"), [("", ""), ("input.", "output.")])
def test_inputs_and_outputs_take_the_names_of_the_ecosystem(before, after, signature):
    inputs, outputs = ([prefix + name for name in _CACHE] for prefix in (before, after))
    model = traced(["input_ids", *inputs], ["logits", *outputs])
    _name_inputs_and_outputs(model, signature)
    assert [value.name for value in model.graph.inputs] == [
        "input_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [value.name for value in model.graph.outputs] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            ["input_ids", "cache.0.k", "cache.0.v"],
            [],
            "inputs named cache.0.k, cache.0.v where past_key_values.0.key",
        ),
        (["input_ids", *_CACHE], ["scores", *_CACHE], "outputs named scores where logits is expected"),
        (["input_ids", *_CACHE, "cache_position"], [], "inputs named cache_position where nothing is expected"),
        ([*_CACHE, "input_ids"], [], "inputs named in another order"),
    ],
)
def test_a_field_that_transformers_renamed_is_an_error_that_names_both(inputs, outputs, message, signature):
    with pytest.raises(ExportError, match=rf"transformers .* \(tested: .*\) traces {message}"):
        _name_inputs_and_outputs(traced(inputs, outputs), signature)
