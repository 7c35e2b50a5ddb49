"""The load-balancing loss of training, added to a model's own loss without touching what its layers return.

Per layer: mean over experts of (mean over tokens of w_i - 1/k)^2, where w is normalised to sum to one, so that the
loss is
zero when the experts are used equally. (With w scaled to sum to k the same minimum is reached, but never zero.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from teamlora_export.model.layer import ExpertLinear


def balance_loss(model: nn.Module) -> Tensor:
    """Mean over the adapted layers of `model` of their balance loss in the last forward; a float32 scalar."""
    losses = [
        _layer_loss(module.last_routing / module.routing_sum)
        for module in model.modules()
        if isinstance(module, ExpertLinear) and module.last_routing is not None
    ]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def add_balance_loss(model: nn.Module, weight: float) -> RemovableHandle:
    """From now on, `model`'s `loss` output contains `weight` times its balance loss while it trains.

    Transformers' `Trainer` then optimises both, unchanged. Remove the returned handle to undo.
    """

    def add(module: nn.Module, _args: Any, output: Any) -> None:
        if module.training and getattr(output, "loss", None) is not None:
            loss = balance_loss(module)
            output.loss = output.loss + weight * loss.to(output.loss)

    return model.register_forward_hook(add)


def _layer_loss(w: Tensor) -> Tensor:
    per_expert = w.float().flatten(0, -2).mean(dim=0)
    return (per_expert - 1.0 / w.shape[-1]).square().mean()
