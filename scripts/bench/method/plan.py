"""What is trained: families, numbers of experts, targets and seeds, at equal numbers of trained parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from teamlora_export.adapter import BaseSignature
from teamlora_export.train import TrainOptions

FAMILIES = ("teamlora", "hydralora", "moelora", "lora")
EXPERTS = (2, 4, 8)
BASE = "base"
# A cell's `group`: it is exported, and scored again.
EXPORTED = "teamlora-k4-ffn"
# As Llama and Phi-3 call them; a base has some of these.
_FFN = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
TARGETS = {"ffn": _FFN, "all": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", *_FFN)}
# What the experts' sum is multiplied by where its rank is the grid's. The optimiser moves each of its numbers equally
# far, so that a sum of a smaller rank moves less: by the rank were all directions to agree, by its root were they
# independent. Two thirds lie between: the first step moves the sums of all cells about equally far
# (tests/bench/test_claim_cells.py: none 1.4 times as far as another).
SCALE = 4.0
_MOVES = 2 / 3


@dataclass(frozen=True)
class Settings:
    """What all cells of a grid have in common.

    Attributes:
        rank: r of the TeamLoRA with four experts whose number of parameters the others are given.
        train, validation, test: examples of each kind of task.
        dtype: of the frozen base while it is trained, and of the whole model while it is scored.
    """

    rank: int = 32
    steps: int = 300
    batch: int = 16
    learning_rate: float = 1.5e-3
    train: int = 400
    validation: int = 10
    test: int = 100
    dtype: str = "bf16"
    data_seed: int = 0

    @property
    def counts(self) -> dict[str, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


FULL = Settings()
QUICK = Settings(steps=60, validation=4, test=20)


@dataclass(frozen=True)
class Cell:
    """One training and its score; of `BASE`, a score alone.

    Attributes:
        share: of the number of trained parameters that the others have.
    """

    family: str
    experts: int
    targets: str
    share: float
    seed: int

    @property
    def name(self) -> str:
        """For people, and for `--cells`."""
        return self.group if self.family == BASE else f"{self.group}-s{self.seed}"

    @property
    def keeps_adapter(self) -> bool:
        """Whether the trained adapter stays when it has been scored: those of all cells would fill gigabytes."""
        return self.family == "teamlora" and (self.seed == 0 or self.group == EXPORTED)

    @property
    def group(self) -> str:
        """The same for all seeds."""
        if self.family == BASE:
            return BASE
        experts = "" if self.family == "lora" else f"-k{self.experts}"
        return f"{self.family}{experts}-{self.targets}" + ("" if self.share == 1 else "-half")


def full_grid(seeds: Sequence[int]) -> list[Cell]:
    """Every cell, in an order that tells most soon: seed by seed, four experts first, feed-forward layers first."""
    return [
        Cell(BASE, 1, "ffn", 1.0, 0),
        *(
            cell
            for seed in seeds
            for targets in TARGETS
            for experts in (4, 2, 8)
            for cell in _of_experts(experts, targets, seed)
        ),
    ]


def quick_grid(seeds: Sequence[int]) -> list[Cell]:
    """Four experts on the feed-forward layers."""
    return [Cell(BASE, 1, "ffn", 1.0, 0), *(cell for seed in seeds for cell in _of_experts(4, "ffn", seed))]


def _of_experts(experts: int, targets: str, seed: int) -> Iterator[Cell]:
    for family in FAMILIES:
        if family != "lora" or experts == 4:
            yield Cell(family, 1 if family == "lora" else experts, targets, 1.0, seed)
    yield Cell("teamlora", experts, targets, 0.5, seed)


def options_of(cell: Cell, settings: Settings, base: Path, data: Path, output: Path) -> TrainOptions:
    """The training of a cell; its rank is the one that comes nearest to the number of parameters that it is to have.

    Args:
        data: the folder of `write_tasks`.
    """
    options = TrainOptions(
        base=str(base),
        data=(data / "train.jsonl",),
        validation=(data / "validation.jsonl",),
        output=output,
        family=cell.family,
        experts=cell.experts,
        targets=_targets(cell.targets, str(base)),
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        warmup=0.1,
        evaluate_every=max(1, settings.steps // 3),
        patience=0,
        seed=cell.seed,
        dtype=settings.dtype,
        resume=True,
    )
    team = dataclasses.replace(options, family="teamlora", experts=4, rank=settings.rank)
    rank = nearest_rank(options, cell.share * count_parameters(team))
    return dataclasses.replace(options, rank=rank, alpha=_alpha(cell, rank, settings.rank))


def _alpha(cell: Cell, rank: int, usual: int) -> float:
    """Of the rank of the experts' sum, which is `r` in all families: teamlora's and moelora's experts have a part of it
    each, hydralora's share one A. The weights of teamlora's sum to k, those of the others to 1."""
    scale = SCALE * (usual / rank) ** _MOVES
    return round(scale * rank / (cell.experts if cell.family == "teamlora" else 1), 2)


def _targets(which: str, base: str) -> tuple[str, ...]:
    there = {path.rpartition(".")[2] for path in _signature(base).linears}
    return tuple(name for name in TARGETS[which] if name in there)


def nearest_rank(options: TrainOptions, parameters: float) -> int:
    """The rank whose number of trained parameters, which grows linearly, comes nearest to `parameters`."""
    unit = options.experts if options.family in ("teamlora", "moelora") else 1
    least, more = (count_parameters(dataclasses.replace(options, rank=n * unit)) for n in (1, 2))
    return unit * max(1, 1 + round((parameters - least) / (more - least)))


def count_parameters(options: TrainOptions) -> int:
    """As `teamlora_export.train.count_parameters`, which opens the base each time."""
    from teamlora_export.train.model import trained_parameters

    return trained_parameters(_signature(options.base), options)


@cache
def _signature(base: str) -> BaseSignature:
    from teamlora_export.model.base import open_base

    return open_base(base, "text-generation").signature
