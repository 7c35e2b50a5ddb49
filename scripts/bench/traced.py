"""Adapters of other kinds on a base, each layer written as its authors publish it, traced by transformers' exporter.

Nothing of ours is in these graphs: every layer is traced as it is, and each expert is a product of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from teamlora_export.adapter import AdapterConfig
from teamlora_export.adapter.spec import ExpertProjection
from teamlora_export.cache import cache_folder
from teamlora_export.graph.record import run
from teamlora_export.graph.silence import silenced
from teamlora_export.graph.tasks import opening, trace_signature
from teamlora_export.model.base import BaseModel
from teamlora_export.model.initialize import new_adapter
from teamlora_export.model.inject import swap_linears
from teamlora_export.model.layer import ExpertLinear, FrozenLinear
from teamlora_export.staging import scratch_folder

Layer = Callable[[nn.Module, ExpertProjection], nn.Module]


class TeamLora(ExpertLinear):
    """The reference layer, which keeps nothing of a call."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.route(x)
        u = nn.functional.linear(x, self.down) * self.scaling
        y = self.base_projection(x)
        for i, (w_i, u_i) in enumerate(zip(w.split(1, dim=-1), self.expert_inputs(u), strict=True)):
            y = y + w_i * nn.functional.linear(u_i, self.up[i])
        return y


class MoeLora(FrozenLinear):
    """Experts with an A and a B of their own, y = x Wt + b + sum_i softmax(x Rt)_i (x Ait) Bit s."""

    def __init__(self, linear: nn.Module, projection: ExpertProjection) -> None:
        super().__init__(linear)
        self.scaling = projection.scaling
        self.router = nn.Parameter(torch.from_numpy(projection.router))
        downs = np.split(projection.down, projection.num_experts)
        self.downs = nn.ParameterList([nn.Parameter(torch.from_numpy(down.copy())) for down in downs])
        self.ups = nn.ParameterList([nn.Parameter(torch.from_numpy(up)) for up in projection.ups])

    def forward(self, x: Tensor) -> Tensor:
        w = torch.softmax(nn.functional.linear(x, self.router), dim=-1)
        y = self.base_projection(x)
        for i, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            y = y + w[..., i : i + 1] * nn.functional.linear(nn.functional.linear(x, down), up) * self.scaling
        return y


class HydraLora(ExpertLinear):
    """One A, and a B for each expert that reads all of it, y = x Wt + b + sum_i softmax(x Rt)_i (x At s) Bit."""

    def forward(self, x: Tensor) -> Tensor:
        w = torch.softmax(nn.functional.linear(x, self.router), dim=-1)
        u = nn.functional.linear(x, self.down) * self.scaling
        y = self.base_projection(x)
        for i, w_i in enumerate(w.split(1, dim=-1)):
            y = y + w_i * nn.functional.linear(u, self.up[i])
        return y


class PlainLora(FrozenLinear):
    """y = x Wt + b + (x At) Bt s."""

    def __init__(self, linear: nn.Module, projection: ExpertProjection) -> None:
        super().__init__(linear)
        self.scaling = projection.scaling
        self.down = nn.Parameter(torch.from_numpy(projection.down))
        self.up = nn.Parameter(torch.from_numpy(np.concatenate(projection.ups, axis=1)))

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.base_projection(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.scaling
        )


def random_projections(base: BaseModel, config: AdapterConfig) -> Mapping[str, ExpertProjection]:
    """Of every layer that `config` targets; the numbers are of no account for speed."""
    return new_adapter(base.signature, config, seed=0, spread=0.02).projections


def traced_graph(name: str, base: BaseModel, projections: Mapping[str, ExpertProjection], layer: Layer | None) -> Path:
    """A folder with model.onnx of `base` whose projections are each a `layer`; traced once, and kept in the user's
    cache under `name`. Tracing takes minutes: it is done for every layer of the model.

    Args:
        layer: None for the base as it is.
    """
    folder = cache_folder() / "bench" / name
    if not (folder / "model.onnx").is_file():
        with scratch_folder(folder) as staging:
            print(f"Tracing {name} ...", flush=True)
            _trace(base, projections, layer, staging)
            staging.replace(folder)
    return folder


def _trace(base: BaseModel, projections: Mapping[str, ExpertProjection], layer: Layer | None, folder: Path) -> None:
    model = base.load(torch.float32).eval()
    opened = run(model, *opening(base, model, long=False))
    if layer is not None:
        swap_linears(model, projections, lambda path, linear: layer(linear, projections[path]))
    signature = trace_signature(base, model, opened, in_place=False)
    model.forward = signature.forward
    config = OnnxConfig(dynamic=True, dynamic_shapes=signature.dynamic_shapes)
    with silenced(), torch.no_grad():
        program, _ = OnnxExporter().export_program(model, dict(signature.sample), config)
    for values, rename in (
        (program.graph.inputs, signature.input_name),
        (program.graph.outputs, signature.output_name),
    ):
        for value in values:
            value.name = rename(value.name)
    ir.save(program, folder / "model.onnx", external_data="model.onnx.data")
