"""Runs a model whose weights do not fit into memory: every module has its weights while it runs, and no longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn


class _Weights(Protocol):
    def __contains__(self, name: str) -> bool: ...
    def read(self, name: str) -> np.ndarray: ...


def stream_weights(model: nn.Module, weights: _Weights, overrides: Mapping[str, np.ndarray]) -> None:
    """Hook `model` (a skeleton with the adapter in it) so that base parameters are read when their module is called.

    Args:
        weights: base parameters by name; parameters that it does not know (the adapter's) stay as they are.
        overrides: base parameters that the adapter replaced.
    """
    names = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    for module in model.modules():
        named = {parameter: names[id(parameter)] for parameter in module.parameters(recurse=False)}
        owned = {parameter: name for parameter, name in named.items() if name in weights}
        if owned:
            dtypes = {parameter: parameter.dtype for parameter in owned}
            _empty(owned)
            module.register_forward_pre_hook(_reader(owned, dtypes, weights, overrides))
            module.register_forward_hook(lambda _module, _inputs, _output, owned=owned: _empty(owned))


def _reader(
    owned: Mapping[nn.Parameter, str],
    dtypes: Mapping[nn.Parameter, torch.dtype],
    weights: _Weights,
    overrides: Mapping[str, np.ndarray],
) -> Any:
    def read(_module: nn.Module, _inputs: Any) -> None:
        for parameter, name in owned.items():
            array = overrides[name] if name in overrides else weights.read(name)
            parameter.data = to_torch(array).to(dtypes[parameter])

    return read


def _empty(owned: Mapping[nn.Parameter, str]) -> None:
    for parameter in owned:
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def to_torch(array: np.ndarray) -> Tensor:
    """A tensor of an array of any dtype, bfloat16 included; shares memory where it can."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
