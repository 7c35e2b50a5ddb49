"""What each task's graph takes and gives: sample inputs for tracing, dynamic axes, the ecosystem's names, the forward.

To add a task: its sample, forward and outputs here, what is asked of it in `ports.py`, its class in `model/base.py`, a
word in the help of `cli_export.py`.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from teamlora_export.errors import ExportError
from teamlora_export.files import read_json
from teamlora_export.graph.cache import InPlaceCache, widened
from teamlora_export.graph.record import keys_and_values, run
from teamlora_export.model.base import BaseModel
from teamlora_export.ports import BATCH, CAPACITY, PAST, SEQUENCE, TOTAL, window_capacity

# Sizes of the sample: all different, none 0 or 1, so that no axis is taken for a constant or for another.
_BATCH, _SEQUENCE, _PAST, _CAPACITY, _LEAST_RING = 2, 3, 5, 11, 13
# Where configurations keep the number of positions, and a number for those that have no limit.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
_MANY = 4096

_PAST_INPUT = re.compile(r"^(?:input\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")
_PRESENT_OUTPUT = re.compile(r"^(?:output\.)?past_key_values\.layers\.(\d+)\.(key|value)s$")
_ENCODER_OUTPUTS = {
    "text-classification": ("logits",),
    "feature-extraction": ("last_hidden_state",),
    "sentence-embedding": ("last_hidden_state", "sentence_embedding"),
}


@dataclass(frozen=True)
class TracedSignature:
    """How to trace one task of one model.

    Attributes:
        forward: replaces the model's own; takes `sample`, returns a dict of what the graph gives.
        sample: keyword arguments of `forward`.
        dynamic_shapes: torch.export's specification for `sample`.
        outputs: names of the graph's outputs, in their order.
        cache_axes: of each layer, the name of the axis of its cache that holds tokens.
    """

    forward: Callable[..., dict[str, Any]]
    sample: Mapping[str, Any]
    dynamic_shapes: dict[str, Any]
    outputs: tuple[str, ...]
    cache_axes: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in their order."""
        names: list[str] = []
        for name, value in self.sample.items():
            names += _cache_names(name, len(value.layers)) if isinstance(value, DynamicCache) else [name]
        return tuple(names)

    @staticmethod
    def input_name(name: str) -> str:
        return _PAST_INPUT.sub(r"past_key_values.\1.\2", name)

    @staticmethod
    def output_name(name: str) -> str:
        return _PRESENT_OUTPUT.sub(r"present.\1.\2", name)

    def dimensions(self, input_name: str) -> dict[int, str]:
        """Dynamic axes of an input, by the ecosystem's name of both."""
        if input_name.startswith("past_key_values."):
            return {0: BATCH, 2: self.cache_axes[int(input_name.split(".")[1])]}
        if input_name == "attention_mask" and "past_key_values" in self.sample:
            return {0: BATCH, 1: TOTAL}
        return {0: BATCH, 1: SEQUENCE}

    @staticmethod
    def derived_dimensions(symbols: Mapping[str, str]) -> dict[str, str]:
        """Sums of the exporter's symbols that have a name of their own."""
        past = next((symbol for symbol, name in symbols.items() if name == PAST), None)
        sequence = next((symbol for symbol, name in symbols.items() if name == SEQUENCE), None)
        if past is None or sequence is None:
            return {}
        return {f"{past} + {sequence}": TOTAL, f"{sequence} + {past}": TOTAL}


def opening(base: BaseModel, model: nn.Module, *, long: bool) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
    """A first run of `model`: a forward and its inputs, with an empty cache; `long`: of as many tokens as it takes."""
    length = _most_tokens(base.config.get_text_config()) if long else _SEQUENCE
    if base.task == "text-generation":
        _require_plain_cache(base)
        ids = torch.zeros(_BATCH, length, dtype=torch.long)
        return _generation_forward(model), {"input_ids": ids, "past_key_values": DynamicCache()}
    return encoder_forward(base, model), _encoder_sample(model, length)


def _most_tokens(config: Any) -> int:
    """About as many as a model has positions for (some leave the first two out)."""
    named = [getattr(config, name, None) for name in _POSITIONS]
    positions = next((value for value in named if isinstance(value, int) and value > 0), _MANY)
    return max(positions - 2, _SEQUENCE)


def trace_signature(base: BaseModel, model: nn.Module, opened: Mapping[str, Any], *, in_place: bool) -> TracedSignature:
    """The signature of `base.task` for `model` (a skeleton of any depth), of which the first run returned `opened`.

    Args:
        in_place: the cache of a text generator is one buffer for each layer (`cache.py`), and does not grow.
    """
    if base.task == "text-generation":
        layers = _cache_layers(base, opened["past_key_values"])
        return _in_place_generation(model, layers) if in_place else _generation(model, layers, None)
    sample = _encoder_sample(model, _SEQUENCE)
    auto = torch.export.Dim.AUTO
    dynamic_shapes = {name: {0: auto, 1: auto} for name in sample}
    return TracedSignature(encoder_forward(base, model), sample, dynamic_shapes, _ENCODER_OUTPUTS[base.task])


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{index}.{which}" for index in range(layers) for which in ("key", "value")]


def _in_place_generation(model: nn.Module, layers: Sequence[tuple[Tensor, Tensor]]) -> TracedSignature:
    """With a ring in each layer that has a window, where the model applies all windows that it declares."""
    everything = (None,) * len(layers)
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    declared = DynamicCache(config=config).layers[: len(layers)]
    windows = tuple(getattr(layer, "sliding_window", None) or None for layer in declared)
    if windows != everything and len(windows) == len(layers):
        signature = _generation(model, layers, windows)
        try:
            run(model, signature.forward, copy.deepcopy(dict(signature.sample)))
        except Exception:  # a mask that is not made as the rings need it, by whatever code the model has
            return _generation(model, layers, everything)
        return signature
    return _generation(model, layers, everything)


def _generation(
    model: nn.Module, layers: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int | None] | None
) -> TracedSignature:
    """One graph for prefill (an empty cache) and decode, left and right padding.

    Args:
        layers: what a first run left in the cache.
        windows: of each layer, for a cache in place (`InPlaceCache`); None: the cache grows.
    """
    axes, past = _sample_cache(layers, windows)
    mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long)
    mask[0, :2] = 0
    sample: dict[str, Any] = {
        "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
        "attention_mask": mask,
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).repeat(_BATCH, 1),
        "past_key_values": past,
    }
    if "position_ids" not in inspect.signature(model.forward).parameters:
        del sample["position_ids"]
    auto = torch.export.Dim.AUTO
    dynamic_shapes: dict[str, Any] = {name: {0: auto, 1: auto} for name in sample}
    dynamic_shapes["past_key_values"] = [{0: auto, 2: auto} for layer in past.layers for _ in ("key", "value")]
    outputs = ("logits", *_cache_names("present", len(past.layers)))
    forward = _generation_forward(model) if windows is None else _in_place_forward(model, windows)
    return TracedSignature(forward, sample, dynamic_shapes, outputs, axes)


def _in_place_forward(model: nn.Module, windows: Sequence[int | None]) -> Callable[..., dict[str, Any]]:
    inner = model.forward

    def forward(
        input_ids: Tensor, attention_mask: Tensor, past_key_values: DynamicCache, **inputs: Any
    ) -> dict[str, Any]:
        cache = InPlaceCache(past_key_values, windows, attention_mask, input_ids.shape[1])
        mask = attention_mask
        if None in windows:
            mask = widened(mask, cache.get_max_length(windows.index(None)))
        outputs = inner(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, **inputs, use_cache=True, return_dict=True
        )
        return {"logits": outputs.logits, "past_key_values": cache.buffers()}

    return forward


def _generation_forward(model: nn.Module) -> Callable[..., dict[str, Any]]:
    inner = model.forward

    def forward(**inputs: Any) -> dict[str, Any]:
        outputs = inner(**inputs, use_cache=True, return_dict=True)
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}

    return forward


def _require_plain_cache(base: BaseModel) -> None:
    """Refuse models that keep something else than a key and a value for each token."""
    own = DynamicCache(config=base.config.get_text_config(decoder=True))
    foreign = {type(layer) for layer in own.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if foreign:
        names = " and ".join(sorted(kind.__name__ for kind in foreign))
        raise ExportError(
            f"{base.name}: {base.config.model_type} keeps a state of another kind ({names}) than a key and a value for "
            "each token, which is not supported."
        )


def _cache_layers(base: BaseModel, made: object) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer that a first run of the model made."""
    layers = keys_and_values(made) if isinstance(made, DynamicCache) else []
    for index, pair in enumerate(layers):
        if any(tensor is None or tensor.ndim != 4 for tensor in pair):
            raise ExportError(
                f"{base.name}: layer {index} of {base.config.model_type} keeps no key and value of its own, "
                "which is not supported."
            )
    if not layers:
        raise ExportError(f"{base.name}: {base.config.model_type} keeps no cache, which is not supported.")
    return layers


def _sample_cache(
    layers: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int | None] | None
) -> tuple[tuple[str, ...], DynamicCache]:
    """Of each layer the name of the axis that holds tokens, and a cache of such shapes."""
    if windows is None:
        axes, sizes = (PAST,) * len(layers), {PAST: _PAST}
    else:
        axes = tuple(CAPACITY if window is None else window_capacity(window) for window in windows)
        sizes = {name: _LEAST_RING + 2 * index for index, name in enumerate(dict.fromkeys(axes))}
        sizes[CAPACITY] = _CAPACITY
    # Made without a configuration, every layer keeps all tokens; the mask alone applies sliding windows.
    cache = DynamicCache()
    for index, (axis, pair) in enumerate(zip(axes, layers, strict=True)):
        key, value = (torch.zeros((*t.shape[:2], sizes[axis], t.shape[3]), dtype=t.dtype) for t in pair)
        cache.update(key, value, index)
    return axes, cache


def _encoder_sample(model: nn.Module, length: int) -> dict[str, Any]:
    mask = torch.ones(_BATCH, length, dtype=torch.long)
    mask[0, -1:] = 0
    # Real ids: some encoders count positions from the ids that are no padding.
    sample: dict[str, Any] = {"input_ids": torch.full((_BATCH, length), 3), "attention_mask": mask}
    accepted = inspect.signature(model.forward).parameters
    if "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 1) > 1:
        sample["token_type_ids"] = torch.zeros(_BATCH, length, dtype=torch.long)
    return sample


def encoder_forward(base: BaseModel, model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """What a graph of an encoder task computes, as PyTorch: also the reference of its validation."""
    inner = model.forward
    extra = {"use_cache": False} if "use_cache" in inspect.signature(inner).parameters else {}
    if base.task == "text-classification":
        return lambda **inputs: {"logits": inner(**inputs, **extra, return_dict=True).logits}
    if base.task == "feature-extraction":
        return lambda **inputs: {"last_hidden_state": inner(**inputs, **extra, return_dict=True).last_hidden_state}
    pooling = read_pooling(base.folder)

    def embed(**inputs: Tensor) -> dict[str, Tensor]:
        hidden = inner(**inputs, **extra, return_dict=True).last_hidden_state
        return {"last_hidden_state": hidden, "sentence_embedding": pooling(hidden, inputs["attention_mask"])}

    return embed


# Of sentence-transformers, those that the graph computes, and one that does nothing after training.
_SENTENCE_MODULES = {"Transformer", "Pooling", "Normalize", "Dropout"}


@dataclass(frozen=True)
class Pooling:
    """Hidden states to one vector a sentence, as sentence-transformers' `1_Pooling/config.json` and `modules.json`
    say."""

    mode: str = "mean"
    normalize: bool = True

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [batch, sequence, size], mask [batch, sequence] -> [batch, size]."""
        if self.mode == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def read_pooling(folder: Path) -> Pooling:
    """The pooling that `folder` asks for; mean and normalised where it says nothing.

    Raises:
        ExportError: it asks for a mode other than mean or cls, or for modules beside the pooling that change a vector.
    """
    advice = "Download the model again."
    try:
        modules = read_json(folder / "modules.json", advice, folder, list)
        kinds = [str(module.get("type")).rpartition(".")[2] for module in modules if isinstance(module, dict)]
        if strange := sorted(set(kinds) - _SENTENCE_MODULES):
            raise ExportError(
                f"{folder / 'modules.json'}: names {', '.join(strange):.200}; {', '.join(sorted(_SENTENCE_MODULES))} "
                "are supported. Take --task feature-extraction, and apply what comes after it yourself."
            )
        fields = read_json(folder / "1_Pooling" / "config.json", advice, folder)
    except FileNotFoundError:
        return Pooling()
    modes = [
        name.removeprefix("pooling_mode_")
        for name, on in fields.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    normalize = "Normalize" in kinds
    if modes == ["mean_tokens"]:
        return Pooling("mean", normalize)
    if modes == ["cls_token"]:
        return Pooling("cls", normalize)
    raise ExportError(
        f"{folder}: pooling by {' and '.join(modes)[:200] or 'nothing'}; mean_tokens or cls_token are supported."
    )
