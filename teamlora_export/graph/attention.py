"""Attention as ONNX's own operator, by the interface at which transformers' models ask for it.

A model calls the attention function of its configuration with queries, keys and values, and with a mask that the mask
function of the same name makes once for all layers of a kind. The two here write one `Attention` node a layer: grouped
heads are not repeated, and the mask is one Boolean tensor. Models whose code does not use the interface, and layers
that ask for more than the operator can do, compute what they always did.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from teamlora_export.graph import op
from teamlora_export.graph.cache import Ring

IMPLEMENTATION = "onnx_attention"
# What models hand to attention that changes the result and is no attribute of the operator.
_BEYOND = ("s_aux", "position_bias", "cache")


def use_attention_operator(model: nn.Module) -> bool:
    """Let `model` (as transformers built it) be traced with `Attention`, where its code allows that."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    if not model._can_set_attn_implementation():  # type: ignore[operator]
        return False
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = IMPLEMENTATION
    return True


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [batch, heads, sequence, size], key and value [batch, kv heads, total, size], attention_mask bool
    [batch, 1, sequence, total] -> [batch, sequence, heads, size].

    Raises:
        ValueError: the mask is not of these keys.
    """
    if attention_mask is None or any(others.get(name) is not None for name in _BEYOND):
        return _as_written(module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **others)
    # Not while tracing: to ask for a size is an operation there, and to compare two ties them.
    if get_proxy_mode() is None and attention_mask.shape[-1] not in (1, key.shape[2]):
        raise ValueError(f"a mask over {attention_mask.shape[-1]} keys, of which there are {key.shape[2]}")
    attributes = {"scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling)}
    if softcap:
        attributes["softcap"] = float(softcap)
    shape = (*query.shape[:3], value.shape[3])
    attended = torch.onnx.ops.symbolic(
        "Attention", (query, key, value, attention_mask), attributes, dtype=query.dtype, shape=shape, version=op.OPSET
    )
    return attended.transpose(1, 2).contiguous(), None


def _as_written(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **others: Any
) -> tuple[Tensor, Any]:
    """What transformers computes without us: PyTorch's attention, or the model's own where that cannot do it."""
    if others.get("softcap") is None and others.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **others)
    eager: Callable[..., tuple[Tensor, Any]] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    if mask is not None:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    return eager(module, query, key, value, mask, **others)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Ring = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Which token may see which: bool [batch, 1, q_length, kv_length].

    Args:
        q_offset: place of the first query, or of the first of each row [batch, 1, 1, 1].
        kv_offset: place of the first key, or those of all.
        attention_mask: bool [batch, kv_offset + kv_length]; of a ring, [batch, total].

    Raises:
        ValueError: more is to be seen than a ring holds.
    """
    if isinstance(kv_offset, Ring) and (others.get("local_size") != kv_offset.window or others.get("use_vmap")):
        raise ValueError(f"a mask of another kind than a window of {kv_offset.window} tokens")
    if mask_function is None or others.get("use_vmap"):
        return sdpa_mask(  # type: ignore[return-value]
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]
            kv_offset,  # type: ignore[arg-type]
            mask_function or causal_mask_function,
            attention_mask,
            **{**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
    queries = torch.arange(q_length).view(1, 1, -1, 1) + q_offset
    if isinstance(kv_offset, Ring):
        keys = kv_offset.places[:, None, None]
    else:
        keys = torch.arange(kv_length).view(1, 1, 1, -1) + kv_offset
    batch = torch.arange(batch_size).view(-1, 1, 1, 1)
    seen = mask_function(batch, torch.zeros(1, 1, 1, 1, dtype=torch.int64), queries, keys)
    if isinstance(kv_offset, Ring):
        seen = seen & _named_in_ring(kv_offset.places, attention_mask)
    elif attention_mask is not None:
        seen = seen & attention_mask[:, None, None, kv_offset : kv_offset + kv_length]
    return seen.expand(batch_size, 1, q_length, kv_length)


def _named_in_ring(places: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which rows of a ring, int64 [batch, rows], may be seen at all: bool [batch, 1, 1, rows]."""
    named = places >= 0
    if attention_mask is not None:
        named = named & attention_mask.gather(1, places.clamp(min=0))
    return named[:, None, None]
