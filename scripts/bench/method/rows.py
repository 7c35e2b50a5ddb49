"""What figures.json holds, as far as tables, verdicts and plots read it: each row is checked when it is read, and what
follows from its figures is computed anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from method.plan import FAMILIES, TARGETS, Cell, Settings
from method.score import Scores

# Nothing in it is markup to a table or a plot, or ends a line.
_Name = Annotated[str, Meta(pattern=r"\A[^|$<>`\[\]\\\x00-\x1f\x7f-\x9f]{1,200}\Z")]
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Times = Annotated[list[Annotated[float, Meta(ge=1e-9, le=1e9)]], Meta(min_length=1, max_length=1000)]
_Right = Mapping[str, Annotated[str, Meta(pattern=r"\A[01]*\Z")]]


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
    settings: Settings | UnsetType = UNSET
    versions: dict[_Name, _Name] = {}
    processor: _Name | UnsetType = UNSET
    questions_sha256: str | None = None
    rows_sha256: str | None = None

    @property
    def of(self) -> Cell:
        return Cell(self.family, self.experts, self.targets, self.share, self.seed)


class Machine(_Row, kw_only=True):
    processor: _Name
    cores: _Count
    load: Annotated[float, Meta(ge=0, le=1e6)] | None
    versions: dict[_Name, _Name]


class Timed(_Row, kw_only=True):
    """A row of timings. Those of before machines and code were told have none."""

    row: _Name
    family: Literal[*FAMILIES]
    experts: _Count
    targets: Literal[*TARGETS]
    threads: _Count = 0
    seconds: _Times
    machine: Machine | UnsetType = UNSET
    code: _Name | UnsetType = UNSET


class Step(Timed, kw_only=True):
    implementation: Literal["published", "packed"]
    parameters: _Count
    moved: Annotated[float, Meta(ge=0, le=1e6)]


class Workload(_Row, kw_only=True):
    batch: _Count
    length: _Count
    count: _Count


class Inference(Timed, kw_only=True):
    quantity: Literal["prefill", "decode"]
    workload: Workload
    ratios: _Times
    openings: Annotated[int, Meta(ge=1, le=1000)] = 1


class Export(_Row, kw_only=True):
    cell: _Name
    form: _Name
    bytes: _Count
    same: Annotated[float, Meta(ge=0, le=100)]
    right: _Right
    version: _Name | UnsetType = UNSET
    code: _Name | UnsetType = UNSET


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


def fields_of_steps(rows: Sequence[Step]) -> list[dict[str, Any]]:
    """As JSON has them; LoRA's of the same targets has to be among them."""
    of_lora = {row.targets: row.seconds for row in rows if row.family == "lora"}
    return [
        {**msgspec.to_builtins(row), "over_lora": quartiles(np.divide(row.seconds, of_lora[row.targets]))}
        for row in rows
    ]


def fields_of_inference(rows: Sequence[Inference]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [{**msgspec.to_builtins(row), "over_base": quartiles(row.ratios)} for row in rows]


def fields_of_exports(rows: Sequence[Export]) -> list[dict[str, Any]]:
    """As JSON has them."""
    return [{**msgspec.to_builtins(row), **means(row.right)} for row in rows]


def means(right: Mapping[str, str]) -> dict[str, Any]:
    """The average score and that of each task, by the answers alone."""
    scores = Scores({task: [bit == "1" for bit in bits] for task, bits in right.items()}, {})
    return {"mean": scores.mean, "by_task": scores.by_task}


def quartiles(ratios: Sequence[float] | np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(ratios, (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}
