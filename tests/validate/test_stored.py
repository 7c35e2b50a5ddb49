"""Weights in a bundle's file against their sources, without running anything."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.graph.read import read_graph
from teamlora_export.model.checkpoint import open_safetensors_weights
from teamlora_export.validate.stored import judge_weights, recipes_of
from teamlora_export.validate.taps import live_values


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight.T", "model.layers.2.mlp.down_proj.teamlora_up"])
@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int8])
def test_a_file_does_not_say_itself_in_which_type_its_weights_are(name, kind, make_bundle, make_base, make_adapter):
    """Rounded once to the type that the file states, they would be what that type makes of their source."""
    bundle, base = make_bundle("llama"), make_base("llama")
    adapter = align_with_base(read_adapter(make_adapter("llama")), base.signature)
    weights = open_safetensors_weights(base.source, base.aliases(), base.signature, base.aliases().keys())
    model = read_graph(bundle)

    def judge() -> list[str]:
        recipes = recipes_of(bundle.manifest)
        return [d.reason for d in judge_weights(model, recipes, weights, adapter, live_values(model), bundle.manifest)]

    assert judge() == []
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy().astype(kind), name=name)
    (reason,) = judge()
    assert reason.startswith(f"{name} is {np.dtype(kind).name.replace('float64', 'double')} in the file, which is no")
