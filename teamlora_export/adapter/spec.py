"""What an adapter is once it has been read, whichever family it came from.

Every family is a case of the same layer (TeamLoRA, arXiv 2408.09856, section 3, as its authors' layer computes it):

    p = softmax(x Rt)                     R: router         [k, in]
    w = p + p M;  w = routing_sum * w / sum(w)    M: interaction    [k, k]
    u = (x At) * scaling                  A: down           [a, in]
    y = base(x) + sum_i w_i (u_i Bit)     B_i: ups[i]       [out, c]

u_i is the i-th chunk of c columns (a = k c), or the whole of u where the family shares it (a = c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from teamlora_export.adapter.config import AdapterConfig


@dataclass(frozen=True)
class ExpertProjection:
    """One adapted linear layer. Arrays keep the checkpoint's dtype (float32, float16 or bfloat16)."""

    path: str
    down: np.ndarray
    router: np.ndarray
    interaction: np.ndarray
    ups: tuple[np.ndarray, ...]
    scaling: float
    routing_sum: float
    shared_down: bool

    @property
    def num_experts(self) -> int:
        return len(self.ups)

    @property
    def in_features(self) -> int:
        return int(self.down.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.ups[0].shape[0])

    @property
    def down_rank(self) -> int:
        """Rows of A (a): k c, or c when every expert reads all of u."""
        return int(self.down.shape[0])

    @property
    def expert_rank(self) -> int:
        """Columns of one B (c)."""
        return int(self.ups[0].shape[1])

    @property
    def num_parameters(self) -> int:
        return self.down.size + self.router.size + self.interaction.size + sum(up.size for up in self.ups)

    @cached_property
    def normalizer_floor(self) -> float:
        """The least value that sum(w) can take for any token: min over experts of c = (I + M) 1.

        sum(w) = sum_e p_e c_e is a convex combination of c, so it reaches min(c) as the router saturates. At or below
        zero, some token makes the layer divide by zero or change sign.
        """
        return float(np.min(self._normalizer))

    @property
    def cancels_routing(self) -> bool:
        """Whether sum(w) is zero for every token, so that the layer is 0 / 0: c = 0, up to its rounding."""
        return not np.any(np.abs(self._normalizer) > self.num_experts * np.finfo(np.float32).eps)

    @property
    def _normalizer(self) -> np.ndarray:
        """c = (I + M) 1, [k]."""
        return 1.0 + self.interaction.astype(np.float64).sum(axis=1)


@dataclass(frozen=True)
class AdapterSpec:
    """A whole adapter: its projections by module path, and base parameters that training replaced.

    `overrides` maps a base parameter's name to its trained value (`bias="all"`, `modules_to_save`).
    """

    family: str
    config: AdapterConfig
    projections: Mapping[str, ExpertProjection]
    overrides: Mapping[str, np.ndarray]
    source: str
    sha256: str

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype, or a comma-separated list where it mixes several."""
        return ", ".join(sorted({str(p.down.dtype) for p in self.projections.values()}))

    @property
    def num_parameters(self) -> int:
        return sum(p.num_parameters for p in self.projections.values()) + sum(
            value.size for value in self.overrides.values()
        )

    @property
    def num_bytes(self) -> int:
        arrays = [a for p in self.projections.values() for a in (p.down, p.router, p.interaction, *p.ups)]
        return sum(a.nbytes for a in [*arrays, *self.overrides.values()])

    def unsafe_normalizers(self) -> dict[str, float]:
        """Modules whose routing normaliser can reach zero for some token, with its worst case."""
        return {path: p.normalizer_floor for path, p in self.projections.items() if p.normalizer_floor <= 0.0}
