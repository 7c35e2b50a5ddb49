"""Errors of one array against another, over the positions that mean something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ErrorStats:
    """Error of an array against its reference. `rms` and `largest` are absolute, `scale` is the reference's own rms."""

    rms: float
    largest: float
    scale: float

    @property
    def relative(self) -> float:
        return self.rms / self.scale if self.scale > 0 else self.rms


def measure(candidate: np.ndarray, reference: np.ndarray) -> ErrorStats:
    """Error of `candidate` against `reference` (equal shapes), in float64. NaN and infinity count as infinite error."""
    candidate, reference = candidate.astype(np.float64), reference.astype(np.float64)
    if candidate.shape != reference.shape:
        return ErrorStats(np.inf, np.inf, _rms(reference))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(candidate - reference)
    difference[~np.isfinite(difference)] = np.inf
    return ErrorStats(_rms(difference), float(difference.max(initial=0.0)), _rms(reference))


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def attended(name: str, array: np.ndarray, mask: np.ndarray, sequence: int) -> np.ndarray:
    """The entries of an output or module value that belong to real tokens, flattened to [tokens, ..].

    Args:
        name: the output's name; `present.*` is [batch, heads, total, size]. Of others, the axis of tokens is told by
            its size: [batch, sequence, ..], [batch, heads, sequence, ..], [batch * heads, sequence, ..] or
            [batch * sequence, size]; what has none, as [batch, ..], is taken whole.
        mask: [batch, total].
        sequence: how many tokens this step has: the last of `total`.
    """
    if name.startswith("present."):
        return np.moveaxis(array, 2, 1)[mask > 0]
    real, batch = mask[:, mask.shape[1] - sequence :] > 0, len(mask)
    if array.ndim == 2:
        return array[real.reshape(-1)] if len(array) == batch * sequence and sequence > 1 else array
    for axis in (1, 2):
        if axis < array.ndim and array.shape[axis] == sequence and len(array) % batch == 0:
            return np.moveaxis(array, axis, 1)[np.repeat(real, len(array) // batch, axis=0)]
    return array


def kl_divergence(candidate: np.ndarray, reference: np.ndarray) -> float:
    """Mean over rows of KL(reference || candidate) of the softmax of logits [rows, vocabulary], in nats."""
    p, q = log_softmax(reference), log_softmax(candidate)
    with np.errstate(invalid="ignore"):
        return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def top5_overlap(candidate: np.ndarray, reference: np.ndarray) -> float:
    """Mean share of the reference's five most likely tokens that are among the candidate's."""
    ours = np.argpartition(-candidate, 5, axis=-1)[:, :5]
    theirs = np.argpartition(-reference, 5, axis=-1)[:, :5]
    return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(ours, theirs, strict=True)]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of logits [rows, width], in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
