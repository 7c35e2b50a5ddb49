"""The published layer, written once more with loops over tokens and experts: what the tests hold everything against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def by_definition(
    feeds: Mapping[str, np.ndarray],
    k: int,
    shared_down: bool,
    out_splits: Sequence[int],
    *,
    rounds_product: bool,
    exact_sums: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The op as `graph/op.py` defines it, every rounding to T included: the least and the largest y that float32
    arithmetic in any order may give.

    Args:
        feeds: x [.., in], base, down, mix and up by their names, in T (mix: float32).
        rounds_product: v up is rounded to T before `base` is added, as the function body does and a kernel need not.
        exact_sums: float32 makes z without an error, in any order.
    """
    kind = feeds["x"].dtype
    x, base, down, mix, up = (feeds[name].astype(np.float64) for name in ("x", "base", "down", "mix", "up"))
    siblings = len(mix)
    c, rows = len(up) // k, len(down) // siblings
    z_error = (0.0 if exact_sums else down.shape[1] + 8) * _EPS * (np.abs(x) @ np.abs(down).T)
    z = _rounded(kind, x @ down.T, z_error)
    low, high = [], []
    for g in range(siblings):
        columns = slice(sum(out_splits[:g]), sum(out_splits[: g + 1]))
        u, u_error, logits, logit_error = (
            part[..., g * rows : (g + 1) * rows][..., where] for where in (slice(-k), slice(-k, None)) for part in z
        )
        w, w_error = _route(logits, logit_error, mix[g])
        each = (lambda array: np.tile(array, k)) if shared_down else (lambda array: array)
        u, u_error, w, w_error = each(u), each(u_error), np.repeat(w, c, axis=-1), np.repeat(w_error, c, axis=-1)
        v_error = np.abs(u) * w_error + np.abs(w) * u_error + u_error * w_error + _EPS * np.abs(u * w)
        v, v_error = _rounded(kind, u * w, v_error)
        size = (np.abs(v) + v_error) @ np.abs(up[:, columns])
        delta, delta_error = v @ up[:, columns], v_error @ np.abs(up[:, columns]) + (len(up) + 8) * _EPS * size
        if rounds_product:
            delta, delta_error = _rounded(kind, delta, delta_error)
        y = base[..., columns] + delta
        error = delta_error + _EPS * (np.abs(base[..., columns]) + np.abs(delta))
        with np.errstate(over="ignore"):
            low.append((y - error).astype(np.float32).astype(kind))
            high.append((y + error).astype(np.float32).astype(kind))
    return tuple(np.concatenate(part, axis=-1).astype(np.float64) for part in (low, high))  # type: ignore[return-value]


_EPS = 2.0**-24
# More than any number here; an error without a bound would become NaN.
_ANYTHING = 1e30


def _rounded(kind: np.dtype, value: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`value` rounded to T, and how far another may be from it that was within `error` before."""

    def to(array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32).astype(kind).astype(np.float64)

    nearest = to(value)
    if kind == np.float32:
        return nearest, error + _EPS * np.abs(nearest)
    with np.errstate(over="ignore"):
        return nearest, np.minimum(np.maximum(to(value + error) - nearest, nearest - to(value - error)), _ANYTHING)


def _route(logits: np.ndarray, error: np.ndarray, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w = normalise(softmax(logits) mix) [.., k] in float32, and its error."""
    k = len(mix)
    distance = logits - logits.max(-1, keepdims=True)
    p = np.exp(distance)
    relative = error + error.max(-1, keepdims=True) + (2 * k + 16 + np.abs(distance)) * _EPS
    w, w_error = p @ mix, (np.expm1(relative) * p) @ np.abs(mix)
    total, total_error = w.sum(-1, keepdims=True), (w_error + k * _EPS * np.abs(w)).sum(-1, keepdims=True)
    least = np.maximum(np.abs(total) - total_error, 1e-300)
    w = w / total
    return w, np.minimum((w_error + np.abs(w) * total_error) / least + 4 * _EPS * np.abs(w), _ANYTHING)
