"""Sees every choice that a model's code makes by numbers: which experts its routers take, above all.

A choice is a top-k along the last axis. Two of nearly equal scores may exchange their places in another dtype, and what
follows is then another computation altogether; who compares two runs lets one follow the choices of the other. The
tracer marks what each choice is made by as `PATH/scores`, and what was taken (indices into it) as `PATH/choice`, after
the module whose code makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SCORES, CHOICE = "scores", "choice"

Best = tuple[Tensor, Tensor]
TopK = Callable[[Tensor], Best]


class SeesChoices(TorchFunctionMode):
    """While it is entered, `choose(path, scores, top_k)` makes every choice of `model`.

    It gets the path of the module that asks for it, the scores [.., n], and what gives their k best [.., k] and the
    indices of these, which is also what it returns.
    """

    def __init__(self, model: nn.Module, choose: Callable[[str, Tensor, TopK], Best]) -> None:
        super().__init__()
        self._model, self._choose = model, choose
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> SeesChoices:
        for path, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda *_, path=path: self._running.append(path)))
            self._handles.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if func not in (torch.topk, Tensor.topk) or not self._running:
            return func(*args, **kwargs)
        scores, *rest = args if args else (kwargs.pop("input"),)
        axis = rest[1] if len(rest) > 1 else kwargs.get("dim", -1)
        if axis not in (-1, scores.ndim - 1):
            return func(scores, *rest, **kwargs)
        return torch.return_types.topk(self._choose(self._running[-1], scores, lambda x: func(x, *rest, **kwargs)))

    def _leave(self) -> None:
        self._running.pop()


def is_choice(name: str) -> bool:
    return name.partition("#")[0].endswith(f"/{CHOICE}")


def scores_of(choice: str) -> str:
    """The name of what a choice was made by."""
    return choice.replace(f"/{CHOICE}", f"/{SCORES}")


def chosen_scores(choices: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`choices` with each that is one replaced by the scores [.., k] of what it takes, the best first: of two that
    score alike, either may be taken. NaN where it takes what does not exist."""
    found = dict(choices)
    for name, taken in choices.items():
        by = scores.get(scores_of(name))
        if is_choice(name) and by is not None:
            exists = (taken >= 0) & (taken < by.shape[-1])
            values = np.take_along_axis(by, np.where(exists, taken, 0), axis=-1).astype(np.float64)
            found[name] = -np.sort(-np.where(exists, values, np.nan), axis=-1)
    return found
