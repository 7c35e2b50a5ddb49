"""Which layers of a model are alike, and the shallow model that shows one or two of each kind.

Tracing costs seconds a layer, and most layers differ in nothing but their weights. Two layers are of one kind when they
compute the same, call by call (`record.py`). The shallow model is the deep one with the other layers left out: what the
deep model's depth, index or lists decided when it was built is as it was. What its code decides while it runs is
compared: all that the shallow model computes must be what the deep one computes in the same place. Where any of it
differs there is no plan, and every layer is traced.

`stamp.py` proves once more, on the graph, that the sampled layers of a kind are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from teamlora_export.graph.record import Record

# Where modules keep the index of their layer, by which they find their cache.
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


def layer_list(model: nn.Module, config: Any) -> str | None:
    """Module path of the one list of layers, where the model has one that is worth a shallow model."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    paths = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth > 2]
    return paths[0] if len(paths) == 1 else None


def plan_layers(prefix: str, records: Sequence[Record]) -> LayerPlan | None:
    """The plan for a model of which `records` were made (runs of different sizes), or None where a shallow model would
    save nothing."""
    kinds: dict[object, list[int]] = defaultdict(list)
    for index, calls in enumerate(zip(*(record.layers for record in records), strict=True)):
        kinds[calls].append(index)
    sample = tuple(sorted(index for members in kinds.values() for index in members[:2]))
    depth = sum(map(len, kinds.values()))
    if len(sample) == depth:
        return None
    place = {index: position for position, index in enumerate(sample)}
    sources = {index: place[members[0]] for members in kinds.values() for index in members}
    pairs = tuple((place[members[0]], place[members[1]]) for members in kinds.values() if len(members) > 1)
    return LayerPlan(prefix, tuple(sources[index] for index in range(depth)), pairs, sample)


def shorten(model: nn.Module, plan: LayerPlan) -> None:
    """Leave the sampled layers in `model`, in place. They take the cache of their new place; lists of the configuration
    with an entry a layer are cut alike. Its number of layers stays: what depends on it is the deep model's."""
    layers = list(model.get_submodule(plan.prefix).children())
    for position, index in enumerate(plan.sample):
        for module in layers[index].modules():
            for name in _PLACE_SETTINGS:
                if vars(module).get(name) == index:
                    setattr(module, name, position)
    model.set_submodule(plan.prefix, nn.ModuleList(layers[index] for index in plan.sample))
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == len(plan.sources):
                setattr(config, name, type(value)(value[index] for index in plan.sample))


def stands_for(shallow: Sequence[Record], deep: Sequence[Record], plan: LayerPlan) -> bool:
    """Whether the shallow model's runs are the deep model's, but for the layers that were left out."""
    return all(
        small.shared == large.shared
        and small.head == large.head
        and small.layers == tuple(large.layers[index] for index in plan.sample)
        for small, large in zip(shallow, deep, strict=True)
    )
