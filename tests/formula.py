"""The published layer, written once more with loops over tokens and experts: what the tests hold everything against."""

from __future__ import annotations

import numpy as np

from teamlora_export.adapter import ExpertProjection

FAMILIES = {
    # name: (k, rank of A, columns of B, shared_down, routing_sum, interaction)
    "teamlora": (4, 8, 2, False, 4.0, True),
    "moelora": (3, 6, 2, False, 1.0, False),
    "hydralora": (3, 5, 5, True, 1.0, False),
    "lora": (1, 5, 5, False, 1.0, False),
}


def random_projection(rng: np.random.Generator, family: str, d_in: int = 7, d_out: int = 6) -> ExpertProjection:
    k, _, c, shared, total, interacts = FAMILIES[family]
    return make_projection(rng, k, c, shared, d_in, d_out, total, 0.1 * interacts)


def make_projection(
    rng: np.random.Generator,
    k: int,
    c: int,
    shared: bool,
    d_in: int,
    d_out: int,
    routing_sum: float = 2.0,
    interaction: float = 0.1,
) -> ExpertProjection:
    """A random projection of k experts of rank c."""
    return ExpertProjection(
        path="p",
        down=rng.normal(size=(c if shared else k * c, d_in)),
        router=rng.normal(size=(k, d_in)),
        interaction=rng.normal(size=(k, k)) * interaction,
        ups=tuple(rng.normal(size=(d_out, c)) for _ in range(k)),
        scaling=1.5,
        routing_sum=routing_sum,
        shared_down=shared,
    )


def by_formula(projection: ExpertProjection, x: np.ndarray, base: np.ndarray) -> np.ndarray:
    """TeamLoRA's published layer, token by token, in float64."""
    y = base.copy()
    for index in np.ndindex(x.shape[:-1]):
        logits = projection.router @ x[index]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        w = p + p @ projection.interaction
        w = projection.routing_sum * w / w.sum()
        u = projection.down @ x[index] * projection.scaling
        for i, up in enumerate(projection.ups):
            chunk = u if projection.shared_down else u[i * up.shape[1] : (i + 1) * up.shape[1]]
            y[index] += w[i] * (up @ chunk)
    return y
