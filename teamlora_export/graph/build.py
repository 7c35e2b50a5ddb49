"""The graph of an adapted model, weights still recipes: traced shallow and repeated where layers are alike, else
traced whole."""

from __future__ import annotations

import onnx_ir as ir
import torch

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.graph.layers import plan_layers, shallow_adapter, shallow_config
from teamlora_export.graph.passes import rewrite
from teamlora_export.graph.stamp import LayersDiffer, stamp
from teamlora_export.graph.trace import trace
from teamlora_export.model.base import BaseModel
from teamlora_export.progress import Reporter


def build_graph(
    base: BaseModel,
    adapter: AdapterSpec,
    dtype: torch.dtype,
    reporter: Reporter,
    *,
    every_layer: bool = False,
) -> ir.Model:
    """The rewritten graph of `base` with `adapter` (aligned with it).

    Args:
        every_layer: trace all layers even where they are alike.

    Raises:
        ExportError: transformers cannot trace this model.
    """
    plan = None if every_layer else plan_layers(base, adapter)
    if plan is not None:
        label = f"Tracing {len(plan.sample)} of {len(plan.sources)} layers of {base.config.model_type} for {base.task}"
        with reporter.step(label):
            model = trace(base, shallow_adapter(adapter, plan), dtype, shallow_config(base, plan))
            rewrite(model)
        try:
            stamp(model, plan)
            return model
        except LayersDiffer as reason:
            reporter.say(f"The layers are not alike ({reason}); tracing all of them.")
    with reporter.step(f"Tracing all of {base.config.model_type} for {base.task}"):
        model = trace(base, adapter, dtype)
        rewrite(model)
    return model
