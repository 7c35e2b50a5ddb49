"""The families that the op serves, and how each one names its tensors.

| family | keys of a module | experts read | routing weights sum to | scaling |
|---|---|---|---|---|
| teamlora | lora_A, lora_B{i}, lora_route.fc, lora_interaction_matrix | own chunk of A | k | alpha / (r / k) |
| hydralora | lora_A, lora_B{i}, lora_route | the whole of A | 1 | alpha / r |
| moelora | lora_A{i}, lora_B{i}, lora_route | own A | 1 | alpha / rank of an expert |
| comol | lora_A, lora_Cores.{i}, lora_B, lora_router | the whole of A | 1 | alpha / r |
| lora | lora_A, lora_B | the whole of A | 1 (k = 1) | alpha / r, or alpha / sqrt(r) with use_rslora |

CoMoL (arXiv 2603.00573, as its authors' layer computes it: github.com/DCDmllm/CoMoL, mocorelora at b9aac3d) mixes core
matrices C_i between a shared A and B: y = base(x) + B (sum_i p_i C_i)t A x. With B_i = B C_it that is hydralora's form,
which the op computes; its router reads A x (`core_router`), and is Q A of x then, or x.

A family says which leaves a module must have with which shapes (`expected`), makes an `ExpertProjection` of them
(`build`), and takes one apart again (`leaves`; comol's products have no way back, so that it is only read). Reading,
checking and reporting are the same for all and live in `read.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import numpy as np

from teamlora_export.adapter.config import COMOL_NAMES, AdapterConfig
from teamlora_export.adapter.spec import ExpertProjection
from teamlora_export.adapter.tensors import common_dtype

_NUMBERED = (r"lora_B\d+\.weight", r"lora_Cores\.\d+")
Shape = tuple[int, int]
Leaves = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ModuleSizes:
    """What the shapes of one module follow from."""

    in_features: int
    out_features: int
    rank: int
    num_experts: int

    @property
    def chunk(self) -> int:
        return self.rank // self.num_experts


@dataclass(frozen=True)
class Family:
    """One published adapter layout.

    Attributes:
        signature: a leaf that only this family has, given the ones before it in `FAMILIES`.
        expected: leaf name -> acceptable shapes, the usual one first.
        build: makes the projection of leaves that passed `expected`. leaves: the other way round; None where there is
            none.
        splits_rank: k must divide r.
        contradiction: what the configuration says against leaves that passed `expected`, or None.
        field_names: what it calls r and the number of experts.
    """

    name: str
    signature: Callable[[Set[str]], bool]
    expected: Callable[[ModuleSizes], dict[str, tuple[Shape, ...]]]
    build: Callable[[str, Leaves, ModuleSizes, AdapterConfig], ExpertProjection]
    leaves: Callable[[ExpertProjection], dict[str, np.ndarray]] | None
    splits_rank: bool
    contradiction: Callable[[Leaves, ModuleSizes, AdapterConfig], str | None] = lambda leaves, sizes, config: None
    field_names: tuple[str, str] = ("r", "lora_nums")


def detect_family(leaves: Set[str]) -> Family | None:
    """The family whose layout a set of leaf names (`lora_A.weight`, ...) belongs to."""
    return next((family for family in FAMILIES if family.signature(leaves)), None)


def count_experts(leaves: Set[str]) -> int:
    """Number of lora_B{i}, or of CoMoL's cores, among the leaf names; 1 where neither is numbered."""
    return max(1, *(sum(bool(re.fullmatch(name, leaf)) for leaf in leaves) for name in _NUMBERED))


def family_named(name: str) -> Family:
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)


def _ups(leaves: Leaves, sizes: ModuleSizes) -> tuple[np.ndarray, ...]:
    return tuple(leaves[f"lora_B{i}.weight"] for i in range(sizes.num_experts))


def _numbered_ups(projection: ExpertProjection) -> dict[str, np.ndarray]:
    return {f"lora_B{i}.weight": up for i, up in enumerate(projection.ups)}


def _no_interaction(sizes: ModuleSizes) -> np.ndarray:
    return np.zeros((sizes.num_experts, sizes.num_experts), np.float32)


def _expected_teamlora(sizes: ModuleSizes) -> dict[str, tuple[Shape, ...]]:
    k = sizes.num_experts
    return {
        "lora_A.weight": ((sizes.rank, sizes.in_features),),
        **{f"lora_B{i}.weight": ((sizes.out_features, sizes.chunk),) for i in range(k)},
        "lora_route.fc.weight": ((k, sizes.in_features),),
        "lora_interaction_matrix.weight": ((k, k),),
    }


def _build_teamlora(path: str, leaves: Leaves, sizes: ModuleSizes, config: AdapterConfig) -> ExpertProjection:
    return ExpertProjection(
        path=path,
        down=leaves["lora_A.weight"],
        router=leaves["lora_route.fc.weight"],
        interaction=leaves["lora_interaction_matrix.weight"],
        ups=_ups(leaves, sizes),
        scaling=config.alpha(path) / sizes.chunk,
        routing_sum=float(sizes.num_experts),
        shared_down=False,
    )


def _leaves_teamlora(projection: ExpertProjection) -> dict[str, np.ndarray]:
    return {
        "lora_A.weight": projection.down,
        "lora_route.fc.weight": projection.router,
        "lora_interaction_matrix.weight": projection.interaction,
        **_numbered_ups(projection),
    }


def _expected_hydralora(sizes: ModuleSizes) -> dict[str, tuple[Shape, ...]]:
    return {
        "lora_A.weight": ((sizes.rank, sizes.in_features),),
        **{f"lora_B{i}.weight": ((sizes.out_features, sizes.rank),) for i in range(sizes.num_experts)},
        "lora_route.weight": ((sizes.num_experts, sizes.in_features),),
    }


def _build_hydralora(path: str, leaves: Leaves, sizes: ModuleSizes, config: AdapterConfig) -> ExpertProjection:
    return ExpertProjection(
        path=path,
        down=leaves["lora_A.weight"],
        router=leaves["lora_route.weight"],
        interaction=_no_interaction(sizes),
        ups=_ups(leaves, sizes),
        scaling=config.alpha(path) / sizes.rank,
        routing_sum=1.0,
        shared_down=sizes.num_experts > 1,
    )


def _leaves_hydralora(projection: ExpertProjection) -> dict[str, np.ndarray]:
    return {"lora_A.weight": projection.down, "lora_route.weight": projection.router, **_numbered_ups(projection)}


def _expected_moelora(sizes: ModuleSizes) -> dict[str, tuple[Shape, ...]]:
    """Experts of rank r each, as most code bases have them, or of r/k."""
    ranks = (sizes.rank,) if sizes.rank % sizes.num_experts else (sizes.rank, sizes.chunk)
    return {
        **{f"lora_A{i}.weight": tuple((c, sizes.in_features) for c in ranks) for i in range(sizes.num_experts)},
        **{f"lora_B{i}.weight": tuple((sizes.out_features, c) for c in ranks) for i in range(sizes.num_experts)},
        "lora_route.weight": ((sizes.num_experts, sizes.in_features),),
    }


def _build_moelora(path: str, leaves: Leaves, sizes: ModuleSizes, config: AdapterConfig) -> ExpertProjection:
    downs = [leaves[f"lora_A{i}.weight"] for i in range(sizes.num_experts)]
    return ExpertProjection(
        path=path,
        down=np.concatenate(downs, axis=0, dtype=common_dtype(downs)),
        router=leaves["lora_route.weight"],
        interaction=_no_interaction(sizes),
        ups=_ups(leaves, sizes),
        scaling=config.alpha(path) / downs[0].shape[0],
        routing_sum=1.0,
        shared_down=False,
    )


def _leaves_moelora(projection: ExpertProjection) -> dict[str, np.ndarray]:
    downs = np.split(projection.down, projection.num_experts)
    return {
        **{f"lora_A{i}.weight": down for i, down in enumerate(downs)},
        "lora_route.weight": projection.router,
        **_numbered_ups(projection),
    }


def _expected_comol(sizes: ModuleSizes) -> dict[str, tuple[Shape, ...]]:
    k, rank = sizes.num_experts, sizes.rank
    return {
        "lora_A.weight": ((rank, sizes.in_features),),
        **{f"lora_Cores.{i}": ((rank, rank),) for i in range(k)},
        "lora_B.weight": ((sizes.out_features, rank),),
        "lora_router.weight": ((k, rank), (k, sizes.in_features)),
    }


def _build_comol(path: str, leaves: Leaves, sizes: ModuleSizes, config: AdapterConfig) -> ExpertProjection:
    down, up, router = (leaves[f"lora_{name}.weight"].astype(np.float64) for name in ("A", "B", "router"))
    cores = [leaves[f"lora_Cores.{i}"].astype(np.float64) for i in range(sizes.num_experts)]
    # Where both have the same width, the file alone does not say what it reads.
    reads_core = bool(config.core_router) if sizes.rank == sizes.in_features else router.shape[1] == sizes.rank
    return ExpertProjection(
        path=path,
        down=leaves["lora_A.weight"],
        router=(router @ down if reads_core else router).astype(np.float32),
        interaction=_no_interaction(sizes),
        ups=tuple((up @ core.T).astype(np.float32) for core in cores),
        scaling=config.alpha(path) / sizes.rank,
        routing_sum=1.0,
        shared_down=sizes.num_experts > 1,
    )


def _contradiction_comol(leaves: Leaves, sizes: ModuleSizes, config: AdapterConfig) -> str | None:
    """The published code could not have loaded such a pair."""
    width = leaves["lora_router.weight"].shape[1]
    said = {None: width, True: sizes.rank, False: sizes.in_features}[config.core_router]
    if width == said:
        return None
    read = "A x" if width == sizes.rank else "x"
    return f"lora_router reads {read}, and core_router is {str(config.core_router).lower()}"


def _expected_lora(sizes: ModuleSizes) -> dict[str, tuple[Shape, ...]]:
    return {
        "lora_A.weight": ((sizes.rank, sizes.in_features),),
        "lora_B.weight": ((sizes.out_features, sizes.rank),),
    }


def _build_lora(path: str, leaves: Leaves, sizes: ModuleSizes, config: AdapterConfig) -> ExpertProjection:
    return ExpertProjection(
        path=path,
        down=leaves["lora_A.weight"],
        router=np.zeros((1, sizes.in_features), np.float32),
        interaction=_no_interaction(sizes),
        ups=(leaves["lora_B.weight"],),
        scaling=config.alpha(path) / (math.sqrt(sizes.rank) if config.use_rslora else sizes.rank),
        routing_sum=1.0,
        shared_down=False,
    )


def _leaves_lora(projection: ExpertProjection) -> dict[str, np.ndarray]:
    return {"lora_A.weight": projection.down, "lora_B.weight": projection.ups[0]}


# In the order in which they are told apart.
FAMILIES = (
    Family(
        "teamlora",
        lambda leaves: "lora_interaction_matrix.weight" in leaves or "lora_route.fc.weight" in leaves,
        _expected_teamlora,
        _build_teamlora,
        _leaves_teamlora,
        splits_rank=True,
    ),
    Family(
        "moelora", lambda leaves: "lora_A0.weight" in leaves, _expected_moelora, _build_moelora, _leaves_moelora, False
    ),
    Family(
        "hydralora",
        lambda leaves: "lora_B0.weight" in leaves,
        _expected_hydralora,
        _build_hydralora,
        _leaves_hydralora,
        False,
    ),
    Family(
        "comol",
        lambda leaves: "lora_Cores.0" in leaves,
        _expected_comol,
        _build_comol,
        None,
        False,
        _contradiction_comol,
        (COMOL_NAMES["r"], COMOL_NAMES["lora_nums"]),
    ),
    Family("lora", lambda leaves: "lora_B.weight" in leaves, _expected_lora, _build_lora, _leaves_lora, False),
)
