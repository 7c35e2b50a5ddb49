"""The figures of another run, which count beside those of this one (`claims.py --with`).

Cells do where they are the same but for the seed: the same settings, questions and rows, and the rank, alpha and number
of parameters that this code gives them on this base. Figures that do not say by hashes of which base, questions and
rows they are count with a note. Timings and exports do where this run has none of the same; they say of which machine
and code they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from method.cells import Place, data_folder, hash_of_base, hash_of_questions, hash_of_rows, unlike
from method.plan import BASE, FAMILIES, TARGETS, Cell, Settings, count_parameters, full_grid, options_of
from method.score import Scores
from teamlora_export.errors import ExportError
from teamlora_export.files import read_json


@dataclass(frozen=True)
class Others:
    """What another run found.

    Attributes:
        told: a sentence of where the scores come from.
    """

    scores: Sequence[dict[str, Any]] = ()
    steps: Sequence[dict[str, Any]] = ()
    inference: Sequence[dict[str, Any]] = ()
    exports: Sequence[dict[str, Any]] = ()
    told: str = ""


@dataclass(frozen=True)
class _Trained:
    """What a cell's result has to hold to count."""

    cell: str
    family: str
    experts: int
    targets: str
    share: float
    seed: int
    code: str
    right: dict[str, str]
    rank: int = 0
    alpha: float = 0.0
    parameters: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    questions_sha256: str | None = None
    rows_sha256: str | None = None

    @property
    def of(self) -> Cell:
        return Cell(self.family, self.experts, self.targets, self.share, self.seed)


@dataclass(frozen=True)
class _Machine:
    processor: str
    cores: int
    versions: dict[str, str]
    load: float | None = None


@dataclass(frozen=True)
class _Ratio:
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class _Workload:
    batch: int
    length: int
    count: int


@dataclass(frozen=True)
class _Timed:
    """What a row of timings has to hold to be told."""

    row: str
    family: Literal[*FAMILIES]
    experts: int
    targets: Literal[*TARGETS]
    seconds: list[float]
    machine: _Machine | None = None
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Step(_Timed):
    implementation: str
    parameters: int
    over_lora: _Ratio
    moved: float


@dataclass(frozen=True, kw_only=True)
class _Inference(_Timed):
    quantity: str
    workload: _Workload
    ratios: list[float]
    over_base: _Ratio
    openings: int = 1


@dataclass(frozen=True)
class _Export:
    cell: str
    form: str
    mean: float
    bytes: int
    same: float
    right: dict[str, str]


@dataclass(frozen=True)
class _Figures:
    settings: Settings
    code: str
    scores: list[_Trained]
    steps: list[_Step] = field(default_factory=list)
    inference: list[_Inference] = field(default_factory=list)
    exports: list[_Export] = field(default_factory=list)
    base_sha256: str | None = None
    questions_sha256: str | None = None
    rows_sha256: str | None = None


def read_others(path: Path, place: Place) -> Others:
    """What is in another run's figures.json.

    What this code has found of a cell itself takes the place of the other's.

    Raises:
        ExportError: it is no such file, or of other settings, questions, rows or another base; each that differs is
            named.
    """
    advice = "Give a figures.json that this program wrote."
    try:
        fields = read_json(path, advice)
        found = msgspec.convert(fields, _Figures)
    except FileNotFoundError:
        raise ExportError(f"--with {path}: there is no such file. {advice}") from None
    except msgspec.ValidationError as error:
        raise ExportError(f"--with {path}: {error}. {advice}") from None
    if not found.scores:
        raise ExportError(f"--with {path}: has no scores. {advice}")
    differing = [
        f"{name} {value} (here {now})"
        for name, value in asdict(found.settings).items()
        if value != (now := getattr(place.settings, name))
    ]
    for there, here, what in (
        (found.base_sha256, hash_of_base(place.base), "another base"),
        (found.questions_sha256, hash_of_questions(place.settings), "other questions"),
        (found.rows_sha256, hash_of_rows(place), "other rows to train on"),
    ):
        if there not in (None, here):
            differing.append(what)
    if differing:
        raise ExportError(f"--with {path}: was made with {'; '.join(differing)}. Scores of both cannot be compared.")
    names = set()
    for result in found.scores:
        _refuse_other(path, result, place)
        if result.cell in names:
            raise ExportError(f"--with {path}: {result.cell} is there twice.")
        names.add(result.cell)
    _refuse_unlike_rows(path, found, place)
    own = [place.find_own(result.of) for result in found.scores]
    scores = [
        {key: value for key, value in mine.items() if key != "answers"}
        if mine is not None
        else {**theirs, **_means(theirs)}
        for mine, theirs in zip(own, fields["scores"], strict=True)
    ]
    rest = {part: fields.get(part, []) for part in ("steps", "inference", "exports")}
    return Others(scores, **rest, told=_told_of(path, found, {mine["cell"] for mine in own if mine is not None}))


def _refuse_unlike_rows(path: Path, found: _Figures, place: Place) -> None:
    """Of timings and exports: where they cannot be told beside each other."""
    turns = {(row.targets, len(row.seconds)) for row in found.steps}
    if any(not count for _, count in turns) or len(turns) != len({targets for targets, _ in turns}):
        raise ExportError(f"--with {path}: steps of the same targets are of unlike numbers of turns.")
    if any(not (row.seconds and row.ratios) for row in found.inference):
        raise ExportError(f"--with {path}: inference has a row of no turn.")
    references = [row.cell for row in found.exports if row.form == "PyTorch"]
    for row in found.exports:
        if references.count(row.cell) != 1:
            raise ExportError(f"--with {path}: {row.cell} is exported, and not once scored in PyTorch beside it.")
        if told := unlike({"right": row.right}, place):
            raise ExportError(f"--with {path}: {row.cell}, {row.form}, {' and '.join(told)}.")


def _told_of(path: Path, found: _Figures, replaced: Collection[str]) -> str:
    counted = [result for result in found.scores if result.cell not in replaced]
    doubts = [
        *(["of which weights its base was"] if found.base_sha256 is None else []),
        *(["which questions were asked"] if any(result.questions_sha256 is None for result in counted) else []),
        *(
            ["which rows were trained on"]
            if any(result.rows_sha256 is None and result.family != BASE for result in counted)
            else []
        ),
    ]
    doubt = f", which does not say {', '.join(doubts)}" if doubts else ""
    told = []
    if counted:
        cells = (result.cell + (f" ({result.code})" if result.code != found.code else "") for result in counted)
        told.append(f"From {path.name} of code {found.code}{doubt}: {', '.join(cells)}.")
    if replaced:
        told.append(f"Of {path.name} left out, for results of this code: {', '.join(sorted(replaced))}.")
    return " ".join(told)


def _means(result: Mapping[str, Any]) -> dict[str, Any]:
    """What tables read, by the answers alone."""
    scores = Scores({task: [bit == "1" for bit in right] for task, right in result["right"].items()}, {})
    return {"mean": scores.mean, "by_task": scores.by_task}


def _refuse_other(path: Path, result: _Trained, place: Place) -> None:
    cell = result.of
    if cell.name != result.cell:
        raise ExportError(f"--with {path}: {result.cell} is not what its options say, {cell.name}.")
    if cell not in full_grid([cell.seed]):
        raise ExportError(f"--with {path}: {result.cell} is no cell of this grid.")
    if any(set(right) - {"0", "1"} for right in result.right.values()):
        raise ExportError(f"--with {path}: {result.cell} has answers that are neither right nor wrong.")
    if told := unlike(asdict(result), place):
        raise ExportError(f"--with {path}: {result.cell} {' and '.join(told)}. Scores of both cannot be compared.")
    if cell.family == BASE:
        return
    options = options_of(cell, place.settings, place.base, data_folder(place), Path("unused"))
    here = (options.rank, options.used_alpha, count_parameters(options))
    if here != (result.rank, result.alpha, result.parameters):
        raise ExportError(
            f"--with {path}: {result.cell} has rank {result.rank}, alpha {result.alpha:g} and {result.parameters:,} "
            f"parameters; here it has {here[0]}, {here[1]:g} and {here[2]:,}. Scores of both cannot be compared."
        )
