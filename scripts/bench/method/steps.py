"""Seconds of a training step of every family, in strict turns on one base in one process.

In a turn each way takes one step, forward to optimiser, on the same rows, every turn in another order. What else the
machine does hits each alike: what counts is the ratio to LoRA's step within a turn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from method.cells import Place, data_folder
from method.plan import FAMILIES, Cell, options_of
from teamlora_export.dtypes import DTYPES
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.inject import swap_linears
from teamlora_export.train import TrainOptions
from teamlora_export.train.data import read_rows
from teamlora_export.train.encode import Encoder, collator
from teamlora_export.train.model import TrainedLinear, adapt, routing_of, start_adapter

_CLIP = 1.0
_WARM_UP = 1


@dataclass(frozen=True)
class Way:
    """A family's layers and optimiser; `implementation` as in `TrainOptions`."""

    family: str
    experts: int
    implementation: str
    parameters: int
    layers: Mapping[str, TrainedLinear]
    optimizer: torch.optim.Optimizer
    balance_weight: float

    @property
    def name(self) -> str:
        return self.family if self.family == "lora" else f"{self.family} k={self.experts}, {self.implementation}"


def time_steps(
    place: Place,
    experts: Sequence[int],
    targets: str,
    turns: int,
    threads: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """A row for each family, number of experts and implementation, at equal numbers of trained parameters.

    `seconds` are of each turn, `over_lora` are the median and the quartiles of the ratios within a turn. `moved` is of
    the first step, before which an adapter adds nothing: the root mean square of what it adds on the same rows, over
    that of what the base's layer gives, mean over layers.
    """
    torch.set_num_threads(threads)
    base = open_base(str(place.base), "text-generation")
    model = base.load(getattr(torch, DTYPES[place.settings.dtype].torch)).train()
    ways = _ways(model, base, place, experts, targets)
    linears = {path: model.get_submodule(path) for path in ways[0].layers}
    orders = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    moved: dict[str, float] = {}
    for turn, batch in enumerate(_batches(place, _WARM_UP + turns)):
        for index in orders.permutation(len(ways)).tolist():
            way = ways[index]
            swap_linears(model, linears, lambda path, _, way=way: way.layers[path])  # type: ignore[misc]
            begin = clock()
            _step(model, way, batch)
            taken = clock() - begin
            if turn == 0:
                moved[way.name] = _moved(model, way, batch)
            swap_linears(model, linears, lambda path, _: linears[path])
            if turn >= _WARM_UP:
                seconds[way.name].append(taken)
    return [
        {**_row(way, seconds[way.name], seconds["lora"], targets, threads), "moved": moved[way.name]} for way in ways
    ]


def _ways(model: nn.Module, base: BaseModel, place: Place, experts: Sequence[int], targets: str) -> list[Way]:
    ways = []
    for family in FAMILIES:
        for k in experts if family != "lora" else (1,):
            for implementation in ("published", "packed") if family != "lora" else ("packed",):
                cell = Cell(family, k, targets, 1.0, 0)
                options = options_of(cell, place.settings, place.base, data_folder(place), Path("unused"))
                ways.append(_way(model, base, dataclasses.replace(options, implementation=implementation)))
    return ways


def _way(model: nn.Module, base: BaseModel, options: TrainOptions) -> Way:
    adapter = start_adapter(base.signature, options)
    linears = {path: model.get_submodule(path) for path in adapter.projections}
    layers = adapt(model, adapter, options)
    swap_linears(model, linears, lambda path, _: linears[path])
    parameters = [parameter for layer in layers.values() for parameter in layer.trained().values()]
    return Way(
        options.family,
        options.num_experts,
        options.implementation,
        sum(parameter.numel() for parameter in parameters),
        layers,
        torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0),
        options.used_balance_weight,
    )


def _step(model: nn.Module, way: Way, batch: Mapping[str, torch.Tensor]) -> None:
    loss = model(**batch, use_cache=False).loss
    if way.family != "lora":
        balance = _balance(way, batch["attention_mask"])
        loss = loss + way.balance_weight * balance
        balance.item()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for layer in way.layers.values() for p in layer.trained().values()], _CLIP)
    way.optimizer.step()
    way.optimizer.zero_grad()


def _balance(way: Way, mask: torch.Tensor) -> torch.Tensor:
    """Of all families with experts, as a training computes it for its log; with gradients where it has a weight."""
    with torch.set_grad_enabled(way.balance_weight > 0):
        routing = routing_of(way.layers.values())
        assert routing is not None
        use = torch.einsum("lbsk,bs->lk", routing, mask.float() / mask.sum())
        return (use - 1.0 / routing.shape[-1]).square().mean()


@torch.no_grad()
def _moved(model: nn.Module, way: Way, batch: Mapping[str, torch.Tensor]) -> float:
    found = []

    def look(layer: nn.Module, read: tuple[torch.Tensor], given: torch.Tensor) -> None:
        own = layer.base_projection(read[0]).float()
        found.append(float((given.float() - own).square().mean().sqrt() / own.square().mean().sqrt()))

    hooks = [layer.register_forward_hook(look) for layer in way.layers.values()]
    try:
        model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found) / len(found)


def _batches(place: Place, count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of the training part, in its order."""
    settings = place.settings
    options = options_of(Cell("lora", 1, "ffn", 1.0, 0), settings, place.base, data_folder(place), Path("unused"))
    rows = read_rows(options.data).rows
    encoder = Encoder(place.base, options)
    encoded, _ = encoder.encode(rows, sorted({row.task for row in rows}))
    collate = collator(encoder.padding)
    starts = [(i * settings.batch) % max(1, len(encoded) - settings.batch) for i in range(count)]
    return [collate(encoded[start : start + settings.batch]) for start in starts]


def _row(way: Way, seconds: list[float], of_lora: list[float], targets: str, threads: int) -> dict[str, Any]:
    low, median, high = np.percentile(np.array(seconds) / np.array(of_lora), (25, 50, 75)).tolist()
    return {
        "row": way.name,
        "family": way.family,
        "experts": way.experts,
        "implementation": way.implementation,
        "targets": targets,
        "parameters": way.parameters,
        "threads": threads,
        "seconds": seconds,
        "over_lora": {"median": median, "low": low, "high": high},
    }
