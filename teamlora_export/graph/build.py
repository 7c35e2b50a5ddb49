"""The graph of an adapted model, weights still recipes: traced shallow and repeated where layers are alike, else
traced whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.errors import ExportError, first_line, raise_findings
from teamlora_export.graph.layers import LayerPlan, layer_list, plan_layers, shorten, stands_for
from teamlora_export.graph.passes import rewrite
from teamlora_export.graph.record import NotLayered, Record, record, run, weights_needed, without_data
from teamlora_export.graph.stamp import LayersDiffer, stamp
from teamlora_export.graph.tasks import TracedSignature, opening, trace_signature
from teamlora_export.graph.trace import trace, traceable
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import lacking_names, missing_text
from teamlora_export.progress import Reporter


def build_graph(
    base: BaseModel,
    adapter: AdapterSpec,
    dtype: torch.dtype,
    reporter: Reporter,
    *,
    in_place: bool = False,
    every_layer: bool = False,
) -> ir.Model:
    """The rewritten graph of `base` with `adapter` (aligned with it).

    Args:
        in_place: the cache of a text generator is one buffer for each layer, and does not grow.
        every_layer: trace all layers even where they are alike.

    Raises:
        ExportError: transformers cannot trace this model, or its checkpoint lacks a weight that is read.
    """
    _refuse_missing(base, adapter)
    model = traceable(base, adapter, dtype)
    if not every_layer:
        try:
            shallow = shallow_model(base, model, in_place)
            if shallow is not None:
                return _trace_shallow(base, shallow, reporter)
        except (NotLayered, LayersDiffer) as reason:
            reporter.say(f"The layers are not alike ({reason}); tracing all of them.")
        # It may have lost layers.
        model = traceable(base, adapter, dtype)
    with reporter.step(f"Tracing all of {base.config.model_type} for {base.task}"):
        graph = trace(base, model, _signature(base, model, in_place))
        rewrite(graph)
    return graph


def _refuse_missing(base: BaseModel, adapter: AdapterSpec) -> None:
    """What a trace would be in vain for, where that can be known before: other kinds of checkpoints are looked at when
    they are loaded."""
    lacking = lacking_names(base.source, base.aliases(), base.signature) - set(adapter.overrides)
    if not lacking:
        return
    model = base.skeleton(torch.float32)
    try:
        lacking &= weights_needed(model, *opening(base, model, long=False))
    except Exception:  # the trace says what is wrong with a model that cannot run
        return
    raise_findings(f"The weights of {base.name}", [missing_text(name) for name in sorted(lacking)])


@dataclass(frozen=True)
class Shallow:
    """A model with the sampled layers only, proven to compute in them what the deep one computes."""

    model: nn.Module
    plan: LayerPlan
    signature: TracedSignature


def shallow_model(base: BaseModel, model: nn.Module, in_place: bool = False) -> Shallow | None:
    """The shallow model made of `model`, or None where it would save nothing.

    Raises:
        NotLayered: it would not compute the same, or that cannot be shown.
    """
    prefix = layer_list(model, base.config)
    if prefix is None:
        return None
    mode = without_data()
    _, deep = _record(base, model, prefix, mode, in_place)
    plan = plan_layers(prefix, deep)
    if plan is None:
        return None
    shorten(model, plan)
    signature, records = _record(base, model, prefix, mode, in_place)
    if not stands_for(records, deep, plan):
        raise NotLayered("with fewer of them the model computes something else")
    return Shallow(model, plan, signature)


def _record(
    base: BaseModel, model: nn.Module, prefix: str, mode: FakeTensorMode, in_place: bool
) -> tuple[TracedSignature, list[Record]]:
    """Records of two runs: a long one with an empty cache, and the one that will be traced."""
    try:
        forward, sample = opening(base, model, long=True)
        long, opened = record(model, prefix, forward, sample, mode)
        signature = trace_signature(base, model, opened, in_place=in_place)
        inputs = copy.deepcopy(dict(signature.sample))
        short, _ = record(model, prefix, signature.forward, inputs, mode)
    except (NotLayered, ExportError):
        raise
    except Exception as error:
        raise NotLayered(first_line(error)) from error
    return signature, [long, short]


def _signature(base: BaseModel, model: nn.Module, in_place: bool) -> TracedSignature:
    return trace_signature(base, model, _opened(base, model), in_place=in_place)


def _opened(base: BaseModel, model: nn.Module) -> Mapping[str, Any]:
    """What a first run of a text generator returns; an encoder needs none.

    Raises:
        ExportError: it cannot run without data.
    """
    if base.task != "text-generation":
        return {}
    try:
        return run(model, *opening(base, model, long=False))
    except Exception as error:
        raise ExportError(
            f"{base.name}: the shapes of its cache cannot be found ({first_line(error)}); "
            f"{base.config.model_type} is not supported for {base.task}."
        ) from error


def _trace_shallow(base: BaseModel, shallow: Shallow, reporter: Reporter) -> ir.Model:
    plan = shallow.plan
    label = f"Tracing {len(plan.sample)} of {len(plan.sources)} layers of {base.config.model_type} for {base.task}"
    with reporter.step(label):
        graph = trace(base, shallow.model, shallow.signature)
        rewrite(graph)
    stamp(graph, plan)
    return graph
