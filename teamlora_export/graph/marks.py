"""Marks values of a traced graph with the modules that gave them, for validation to compare module by module.

Each mark is a node of its own, which `passes/module_outputs.py` takes out again:

    PATH            what the module returned; the first, where it returned several
    PATH/1 ..       the others of them
    LIST.input      what enters a list of layers
    PATH/scores     what a choice is made by in the module's code, and
    PATH/choice     the indices of what was taken (`choices.py`)

Modules that return no floating-point tensor have none, nor have those inside of packed experts: they see tokens in an
order of the implementation's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from teamlora_export.graph import op
from teamlora_export.graph.choices import CHOICE, SCORES, Best, SeesChoices, TopK


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """While it is entered, what `model` computes passes through marks."""
    packed = tuple(f"{path}." for path, module in model.named_modules() if _packs_experts(module))
    handles: list[Any] = [
        module.register_forward_hook(_mark_outputs(path))
        for path, module in model.named_modules()
        if path and not path.startswith(packed)
    ]
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            handles.append(module[0].register_forward_pre_hook(_mark_input(f"{path}.input")))
    try:
        with SeesChoices(model, _mark_choice):
            yield
    finally:
        for handle in handles:
            handle.remove()


def map_outputs(path: str, output: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """What a module returned, with `change(mark, tensor)` in place of each tensor that has a mark; None where none has.

    Of several, those are marked that are of the same tokens as the first.
    """
    if isinstance(output, Tensor):
        return change(path, output) if output.is_floating_point() else None
    if type(output) is not tuple or not output or not isinstance(output[0], Tensor):
        return None
    return tuple(
        change(f"{path}/{index}" if index else path, part)
        if isinstance(part, Tensor) and part.is_floating_point() and _of_the_same_tokens(part, output[0])
        else part
        for index, part in enumerate(output)
    )


def _of_the_same_tokens(left: Tensor, right: Tensor) -> bool:
    """Whether both are known to be alike in all axes but the last, without making it a condition of the trace."""
    sizes = zip(left.shape[:-1], right.shape[:-1], strict=False)
    return left.ndim == right.ndim and all(statically_known_true(a == b) for a, b in sizes)


def _mark_outputs(path: str) -> Callable[..., Any]:
    return lambda _module, _inputs, output: map_outputs(path, output, _mark)


def _mark_input(name: str) -> Callable[..., Any]:
    def mark(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        is_value = args and isinstance(args[0], Tensor) and args[0].is_floating_point()
        return (_mark(name, args[0]), *args[1:]) if is_value else None

    return mark


def _mark_choice(path: str, scores: Tensor, top_k: TopK) -> Best:
    values, indices = top_k(_mark(f"{path}/{SCORES}", scores))
    return values, _mark(f"{path}/{CHOICE}", indices)


def _packs_experts(module: nn.Module) -> bool:
    """Whether weights of several experts are in one tensor of this module."""
    return any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def _mark(name: str, tensor: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{op.DOMAIN}::{op.MARKER}",
        (tensor,),
        {"path": name},
        dtype=tensor.dtype,
        shape=tensor.shape,
        version=op.VERSION,
    )
