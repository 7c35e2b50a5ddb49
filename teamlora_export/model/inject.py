"""Puts an adapter into a Hugging Face model in place, and takes a trained one out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from teamlora_export.adapter.check import BaseSignature, LinearShape
from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.model.layer import ExpertLinear


def inject(model: nn.Module, adapter: AdapterSpec) -> None:
    """Replace the adapted linear layers of `model` by `ExpertLinear` and its overridden parameters by the trained ones.

    The adapter must have been aligned with this model (`adapter.align_with_base`). Everything but the adapter is
    frozen.
    """
    model.requires_grad_(False)
    dropout = adapter.config.lora_dropout
    swap_linears(
        model,
        adapter.projections,
        lambda path, linear: ExpertLinear(linear, adapter.projections[path], dropout),
    )
    parameters = dict(model.named_parameters())
    for name, value in adapter.overrides.items():
        parameters[name].data.copy_(torch.tensor(value.astype(np.float32)))


def swap_linears(model: nn.Module, paths: Mapping[str, object], make: Callable[[str, nn.Module], nn.Module]) -> None:
    """Replace the module at each of `paths` by `make(path, module)`, keeping its training mode."""
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        linear = getattr(parent, name)
        setattr(parent, name, make(path, linear).train(linear.training))


def extract(model: nn.Module, adapter: AdapterSpec) -> AdapterSpec:
    """`adapter` with the values that its layers in `model` hold now, in float32."""

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().float().cpu().numpy()

    projections = {}
    for path, projection in adapter.projections.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, ExpertLinear)
        projections[path] = replace(
            projection,
            down=array(layer.down),
            router=array(layer.router),
            interaction=array(layer.interaction),
            ups=tuple(array(up) for up in layer.up),
        )
    return replace(adapter, projections=projections)


def signature_of(model: nn.Module, name: str) -> BaseSignature:
    """What an adapter can be checked against; reads shapes only, so the parameters may be on any device."""
    return BaseSignature(
        name=name,
        linears={path: _linear_shape(m) for path, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))},
        parameters={path: tuple(p.shape) for path, p in model.named_parameters()},
        body_prefix=getattr(model, "base_model_prefix", ""),
    )


def _linear_shape(module: nn.Module) -> LinearShape:
    weight, transposed = module.weight, isinstance(module, Conv1D)
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[union-attr]
    in_features, out_features = (rows, columns) if transposed else (columns, rows)
    return LinearShape(in_features, out_features, module.bias is not None, transposed)
