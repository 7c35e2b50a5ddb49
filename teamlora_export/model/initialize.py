"""New TeamLoRA adapters: as training starts them, or random ones for trying an export without training."""

from __future__ import annotations

import math

import numpy as np

from teamlora_export.adapter.check import BaseSignature, LinearShape
from teamlora_export.adapter.config import AdapterConfig
from teamlora_export.adapter.spec import AdapterSpec, ExpertProjection
from teamlora_export.errors import ExportError


def new_adapter(base: BaseSignature, config: AdapterConfig, seed: int, spread: float = 0.0) -> AdapterSpec:
    """A TeamLoRA adapter on every linear layer of `base` that `config` targets, in float32.

    A and R are drawn as `nn.Linear` draws its weights (uniform within 1/sqrt(in)). B and M are zero, so that the
    adapted model
    starts as the base, or normal with standard deviation `spread` (relative to 1/sqrt(r) for B).

    Raises:
        ExportError: no layer of the base is targeted, or k does not divide r.
    """
    rng = np.random.default_rng(seed)
    num_experts = config.lora_nums or 1
    if config.r % num_experts:
        raise ExportError(f"lora_nums={num_experts} does not divide r={config.r}.")
    projections = {
        path: _new_projection(path, linear, config, num_experts, rng, spread)
        for path, linear in base.linears.items()
        if config.targets(path)
    }
    if not projections:
        raise ExportError(f"{base.name}: target_modules={config.target_modules!r} names none of its linear layers.")
    return AdapterSpec("teamlora", config, projections, {}, source="(new)", sha256="")


def _new_projection(
    path: str, linear: LinearShape, config: AdapterConfig, k: int, rng: np.random.Generator, spread: float
) -> ExpertProjection:
    bound = 1.0 / math.sqrt(linear.in_features)
    chunk = config.rank(path) // k

    def uniform(rows: int) -> np.ndarray:
        return rng.uniform(-bound, bound, (rows, linear.in_features)).astype(np.float32)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0.0, 1.0, shape).astype(np.float32) * np.float32(scale)

    return ExpertProjection(
        path=path,
        down=uniform(chunk * k),
        router=uniform(k),
        interaction=normal(k, k, scale=spread),
        ups=tuple(normal(linear.out_features, chunk, scale=spread / math.sqrt(chunk * k)) for _ in range(k)),
        scaling=config.alpha(path) / chunk,
        routing_sum=float(k),
        shared_down=False,
    )
