"""Which layers of a model are alike, and the shallow model that shows one or two of each kind.

Tracing costs seconds a layer, and most layers differ in nothing but their weights. Two layers are of one kind when
their
parameters have the same names and shapes, their modules the same settings, their per-layer entries in the configuration
agree, and their adapters have the same shapes. That is a claim about the code; `stamp.py` proves it on the graph.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.graph import op
from teamlora_export.model.base import BaseModel

# Settings that name a layer's place and decide nothing about its graph by themselves.
_PLACE_SETTINGS = ("layer_idx", "layer_index", "layer_id")


@dataclass(frozen=True)
class LayerPlan:
    """How to make a deep model's graph of a shallow one's.

    Attributes:
        prefix: module path of the list of layers (`model.layers`).
        sources: for each layer of the deep model, the layer of the shallow model to copy.
        pairs: layers of the shallow model that must turn out to be alike.
        sample: for each layer of the shallow model, the layer of the deep model that it stands for.
    """

    prefix: str
    sources: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]
    sample: tuple[int, ...]


def plan_layers(base: BaseModel, adapter: AdapterSpec) -> LayerPlan | None:
    """The plan for `base` with `adapter`, or None where a shallow model would save nothing or the layers are not a
    list."""
    model = base.skeleton(torch.float32)
    found = _layer_list(model, getattr(base.config, "num_hidden_layers", 0))
    if found is None:
        return None
    prefix, layers = found
    kinds: dict[object, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        kinds[_kind(index, layer, base.config, len(layers), prefix, adapter)].append(index)
    sample = tuple(sorted(index for members in kinds.values() for index in members[:2]))
    if len(sample) == len(layers):
        return None
    place = {index: position for position, index in enumerate(sample)}
    sources = {index: place[members[0]] for members in kinds.values() for index in members}
    pairs = tuple((place[members[0]], place[members[1]]) for members in kinds.values() if len(members) > 1)
    return LayerPlan(prefix, tuple(sources[index] for index in range(len(layers))), pairs, sample)


def shallow_config(base: BaseModel, plan: LayerPlan) -> Any:
    """The base's configuration with the sampled layers only; lists with an entry a layer are cut alike."""
    config = copy.deepcopy(base.config)
    depth = len(plan.sources)
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, type(value)(value[index] for index in plan.sample))
    config.num_hidden_layers = len(plan.sample)
    return config


def shallow_adapter(adapter: AdapterSpec, plan: LayerPlan) -> AdapterSpec:
    """The adapter of the sampled layers, and of whatever is outside the layers, under the shallow model's names."""
    place = {index: position for position, index in enumerate(plan.sample)}
    projections = {}
    for path, projection in adapter.projections.items():
        index, rest = layer_of(path, plan.prefix)
        if index is None:
            projections[path] = projection
        elif index in place:
            renamed = f"{plan.prefix}.{place[index]}.{rest}"
            projections[renamed] = replace(projection, path=renamed)
    return replace(adapter, projections=projections)


def layer_of(path: str, prefix: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp`, `model.layers` -> 3, `mlp`; None for a path outside the layers."""
    if not path.startswith(f"{prefix}."):
        return None, path
    index, _, rest = path[len(prefix) + 1 :].partition(".")
    return (int(index), rest) if index.isdigit() else (None, path)


def _layer_list(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList] | None:
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 2]
    return lists[0] if len(lists) == 1 else None


def _kind(index: int, layer: nn.Module, config: Any, depth: int, prefix: str, adapter: AdapterSpec) -> object:
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    settings = tuple((path, type(m).__name__, _settings(m)) for path, m in layer.named_modules())
    entries = tuple(
        (name, repr(value[index]))
        for name, value in sorted(vars(config).items())
        if isinstance(value, (list, tuple)) and len(value) == depth
    )
    adapted = tuple(
        (rest, tuple(op.weight_shapes(projection).items()), projection.shared_down)
        for path, projection in sorted(adapter.projections.items())
        for place, rest in [layer_of(path, prefix)]
        if place == index
    )
    return shapes, settings, entries, adapted


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, tuple, type(None))) and name not in _PLACE_SETTINGS
    )
