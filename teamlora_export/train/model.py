"""The model that is trained: a frozen base with an adapter of any family on its linear layers.

The adapter's own tensors are float32 whatever the base's type; only they have gradients. Each layer computes what
`model/layer.py` defines, in one of two ways: packed, or one product for each expert.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from teamlora_export.adapter import AdapterConfig, AdapterSpec, BaseSignature, ExpertProjection
from teamlora_export.adapter.families import Family, ModuleSizes, family_named
from teamlora_export.errors import ExportError
from teamlora_export.model.inject import swap_linears
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.train.options import ALL_LINEAR, TrainOptions

# The published code starts M so, with a zero diagonal (github.com/Lin-Tianwei/TeamLoRA, lora.py at 8d8c102).
_INTERACTION_BOUND = 0.1


class TrainedLinear(ExpertLinear):
    """`ExpertLinear` as it is trained: what a family does not have is neither computed nor trained.

    Dropout is where the family's published code has it: of teamlora on what each expert reads (u), of the others on x.

    Args:
        packed: all experts in one product, else each in its own.
    """

    def __init__(
        self, linear: nn.Module, projection: ExpertProjection, family: str, dropout: float, packed: bool
    ) -> None:
        super().__init__(linear, projection, dropout, torch.float32)
        self.path, self.family, self.packed = projection.path, family, packed
        self.routes = family != "lora"
        self.mixes = family == "teamlora"
        self.router.requires_grad_(self.routes)
        self.interaction.requires_grad_(self.mixes)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_projection(x)
        read = x if self.mixes else self.dropout(x)
        if self.packed or not self.routes:
            return self._add_packed(y, x, read)
        return self._add_one_by_one(y, x, read)

    def route(self, x: Tensor) -> Tensor:
        logits = nn.functional.linear(x, self.router.to(x.dtype)).float()
        p = torch.softmax(logits, dim=-1)
        if not self.mixes:
            return self.routing_sum * p
        w = p + p @ self.interaction
        return self.routing_sum * w / w.sum(dim=-1, keepdim=True)

    def _add_packed(self, y: Tensor, x: Tensor, read: Tensor) -> Tensor:
        k, out, c = self.up.shape
        u = nn.functional.linear(read, self.down.to(x.dtype)) * self.scaling
        u = self.dropout(u) if self.mixes else u
        if self.routes:
            w = self._remember(self.route(x)).to(u.dtype).unsqueeze(-1)
            # [.., k, c]: what each expert reads, weighted.
            u = (w * (u.unsqueeze(-2) if self.shared_down else u.unflatten(-1, (k, c)))).flatten(-2)
        up = self.up.to(x.dtype).transpose(1, 2).reshape(k * c, out)
        return torch.addmm(y.flatten(0, -2), u.flatten(0, -2), up).view(y.shape)

    def _add_one_by_one(self, y: Tensor, x: Tensor, read: Tensor) -> Tensor:
        w = self._remember(self.route(x)).to(x.dtype)
        for i, (w_i, u_i) in enumerate(zip(w.split(1, dim=-1), self._read_by_each(read), strict=True)):
            y = y + w_i * nn.functional.linear(self.dropout(u_i) if self.mixes else u_i, self.up[i].to(x.dtype))
        return y

    def _read_by_each(self, read: Tensor) -> Iterable[Tensor]:
        k, down = self.up.shape[0], self.down.to(read.dtype)
        if self.family == "moelora":
            return (nn.functional.linear(read, own) * self.scaling for own in down.chunk(k))
        u = nn.functional.linear(read, down) * self.scaling
        return (u,) * k if self.shared_down else u.chunk(k, dim=-1)

    def _remember(self, w: Tensor) -> Tensor:
        self.last_routing = w if self.training else w.detach()
        return w


def start_adapter(base: BaseSignature, options: TrainOptions) -> AdapterSpec:
    """The adapter as training starts it, float32, drawn from the options' seed: the adapted model is the base.

    A and the router are uniform within 1/sqrt(in), as `nn.Linear` draws its weights; B is zero; M of teamlora is
    uniform within 0.1 with a zero diagonal. All of it as in the published code.

    Raises:
        ExportError: as `named_targets` does.
    """
    family = family_named(options.family)
    config = options.config(named_targets(base, options))
    rng = np.random.default_rng(options.seed)
    projections = {}
    for path, linear in base.linears.items():
        if config.targets(path):
            sizes = ModuleSizes(linear.in_features, linear.out_features, options.rank, options.num_experts)
            projections[path] = _start(path, family, sizes, config, rng)
    return AdapterSpec(family.name, config, projections, {}, source="(new)", sha256="")


def named_targets(base: BaseSignature, options: TrainOptions) -> tuple[str, ...] | str:
    """The options' targets; of all linear layers, the endings of their names.

    Raises:
        ExportError: a name, or the pattern, is that of no linear layer of the base.
    """
    given = tuple(_endings(base)) if options.targets == ALL_LINEAR else options.targets
    # A pattern is matched as a whole, a list name by name.
    names: dict[str, tuple[str, ...] | str]
    names = {given: given} if isinstance(given, str) else {name: (name,) for name in given or (ALL_LINEAR,)}
    missing = [name for name, of in names.items() if not any(map(options.config(of).targets, base.linears))]
    if missing:
        there = ", ".join(_endings(base))
        raise ExportError(
            f"--targets {', '.join(missing):.200}: names no linear layer of {base.name}. It has {there or 'none'}."
        )
    return given


def trained_parameters(base: BaseSignature, options: TrainOptions) -> int:
    """How many numbers such a training trains.

    Raises:
        ExportError: as `named_targets` does.
    """
    family = family_named(options.family)
    config = options.config(named_targets(base, options))
    total = 0
    for path, linear in base.linears.items():
        if config.targets(path):
            sizes = ModuleSizes(linear.in_features, linear.out_features, options.rank, options.num_experts)
            total += sum(math.prod(shapes[-1]) for shapes in family.expected(sizes).values())
    return total


def adapt(model: nn.Module, adapter: AdapterSpec, options: TrainOptions) -> dict[str, TrainedLinear]:
    """Put `adapter` into `model`, frozen but for it; the layers by their paths."""
    model.requires_grad_(False)
    packed = options.implementation == "packed"
    swap_linears(
        model,
        adapter.projections,
        lambda path, linear: TrainedLinear(linear, adapter.projections[path], adapter.family, options.dropout, packed),
    )
    return {path: model.get_submodule(path) for path in adapter.projections}  # type: ignore[misc]


def forget_routing(layers: Iterable[TrainedLinear]) -> None:
    """Before a forward, so that what a layer has after it is of that forward."""
    for layer in layers:
        layer.last_routing = None


def routing_of(layers: Iterable[TrainedLinear], shape: Sequence[int] | None = None) -> Tensor | None:
    """Of the last forward, the experts' shares (they sum to 1), float32 [layers, rows, tokens, k]; None of lora.

    Args:
        shape: [rows, tokens]. Some models flatten them before a projection: its routing, [rows tokens, k], is put back.
            Default: as the layers have them, which are alike then.

    Raises:
        ExportError: a layer was not called, or not on every token; it is named.
    """
    routed = [layer for layer in layers if layer.routes]
    if not routed:
        return None
    return torch.stack([_shares(layer, shape) for layer in routed])


def _shares(layer: TrainedLinear, shape: Sequence[int] | None) -> Tensor:
    w = layer.last_routing
    if w is None:
        raise ExportError(f"{layer.path}: is not called on a text. Leave it out of --targets.")
    if shape is not None and w.shape[:-1] != (*shape,):
        if w.shape[:-1].numel() != math.prod(shape):
            seen, total = w.shape[:-1].numel(), math.prod(shape)
            raise ExportError(
                f"{layer.path}: is called on {seen:,} tokens where the text has {total:,}. Leave it out of --targets."
            )
        w = w.reshape(*shape, -1)
    return w / layer.routing_sum


def _start(
    path: str, family: Family, sizes: ModuleSizes, config: AdapterConfig, rng: np.random.Generator
) -> ExpertProjection:
    leaves = {}
    for name, shapes in family.expected(sizes).items():
        # Of moelora the last: experts of rank r/k.
        shape = shapes[-1]
        if name.startswith("lora_B"):
            leaf = np.zeros(shape)
        elif name.startswith("lora_interaction_matrix"):
            leaf = rng.uniform(-_INTERACTION_BOUND, _INTERACTION_BOUND, shape)
            np.fill_diagonal(leaf, 0.0)
        else:
            leaf = rng.uniform(-1.0, 1.0, shape) / math.sqrt(sizes.in_features)
        leaves[name] = leaf.astype(np.float32)
    built = family.build(path, leaves, sizes, config)
    return dataclasses.replace(built, interaction=built.interaction.astype(np.float32))


def _endings(base: BaseSignature) -> list[str]:
    """Of the linear layers in the model's body, the last part of their names, in order: the head is none of them."""
    prefix = f"{base.body_prefix}." if base.body_prefix else ""
    inside = [path for path in base.linears if path.startswith(prefix)]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in inside))
