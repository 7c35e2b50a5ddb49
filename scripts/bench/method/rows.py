"""What figures.json holds, as far as tables, verdicts and plots read it: each row of it is checked when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from method.plan import FAMILIES, TARGETS, Cell, Settings
from method.score import Scores

# Of which nothing is markup to a table or a plot.
_Name = Annotated[str, Meta(pattern=r"^[\w ,.:()=+/-]{1,200}$")]
_Count = Annotated[int, Meta(ge=0)]
_Right = Mapping[str, Annotated[str, Meta(pattern=r"^[01]*$")]]


class _Row(msgspec.Struct, frozen=True, omit_defaults=True):
    pass


class Trained(_Row, kw_only=True):
    """The result of a cell."""

    cell: _Name
    family: str
    experts: _Count
    targets: str
    share: float
    seed: _Count
    code: _Name
    right: _Right
    rank: _Count = 0
    alpha: float = 0.0
    parameters: _Count = 0
    best_step: _Count | None = None
    versions: dict[str, str] = {}
    processor: _Name | None = None
    questions_sha256: str | None = None
    rows_sha256: str | None = None

    @property
    def of(self) -> Cell:
        return Cell(self.family, self.experts, self.targets, self.share, self.seed)


class Machine(_Row, kw_only=True):
    processor: _Name
    cores: _Count
    load: float | None
    versions: dict[_Name, _Name]


class Ratio(_Row, kw_only=True):
    median: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.median <= self.high < math.inf:
            raise ValueError("Expected a median between its quartiles, all above 0")


class Timed(_Row, kw_only=True):
    """A row of timings. Those of before machines and code were told have none."""

    row: _Name
    family: Literal[*FAMILIES]
    experts: _Count
    targets: Literal[*TARGETS]
    threads: _Count = 0
    seconds: list[float]
    machine: Machine | msgspec.UnsetType = msgspec.UNSET
    code: _Name | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        _require_times(self.seconds)


class Step(Timed, kw_only=True):
    implementation: _Name
    parameters: _Count
    over_lora: Ratio
    moved: Annotated[float, Meta(ge=0, le=1e6)]


class Workload(_Row, kw_only=True):
    batch: _Count
    length: _Count
    count: _Count


class Inference(Timed, kw_only=True):
    quantity: Literal["prefill", "decode"]
    workload: Workload
    ratios: list[float]
    over_base: Ratio
    openings: Annotated[int, Meta(ge=1)] = 1

    def __post_init__(self) -> None:
        _require_times(self.seconds)
        _require_times(self.ratios)


class Export(_Row, kw_only=True):
    cell: _Name
    form: _Name
    bytes: _Count
    same: Annotated[float, Meta(ge=0, le=100)]
    right: _Right
    version: _Name | msgspec.UnsetType = msgspec.UNSET
    code: _Name | msgspec.UnsetType = msgspec.UNSET


class Figures(_Row, kw_only=True):
    settings: Settings
    code: _Name
    scores: list[Trained] = []
    steps: list[Step] = []
    inference: list[Inference] = []
    exports: list[Export] = []
    base_sha256: str | None = None
    questions_sha256: str | None = None
    rows_sha256: str | None = None


def fields_of(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """As JSON has them; what answers say is taken from these."""
    found = [msgspec.to_builtins(row) for row in rows]
    return [{**fields, **means(fields["right"])} if "right" in fields else fields for fields in found]


def means(right: Mapping[str, str]) -> dict[str, Any]:
    """The average score and that of each task, by the answers alone."""
    scores = Scores({task: [bit == "1" for bit in bits] for task, bits in right.items()}, {})
    return {"mean": scores.mean, "by_task": scores.by_task}


def _require_times(values: Sequence[float]) -> None:
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError("Expected times above 0, and at least one")
