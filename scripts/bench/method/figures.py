"""The folder that `claims.py -o` writes, figures.json, README.md and plot.png; and the figures of another run.

Cells that another run trained count beside those of this one (`claims.py --with`) where they are the same but for the
seed: the same settings, questions and rows, and the rank, alpha and number of parameters that this code gives them on
this base. Figures that do not say by hashes of which base, questions and rows they are count with a note.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from method.cells import Place, data_folder, hash_of_base, hash_of_questions, hash_of_rows, unlike
from method.plan import BASE, Cell, Settings, count_parameters, full_grid, options_of
from method.report import tables, write_plot
from method.score import Scores
from teamlora_export.bench.plot import require_matplotlib
from teamlora_export.errors import ExportError
from teamlora_export.files import read_json, sha256_of
from teamlora_export.staging import real_path, refuse_foreign, staged

FIGURES_NAME = "figures.json"
_CARD_NAME, _PLOT_NAME = "README.md", "plot.png"
_SIGNATURE, _SIGNED = "written_by", "scripts/bench/claims.py"


def require_output(output: Path) -> None:
    """Find out before anything is trained whether the folder can be written.

    Raises:
        ExportError: there is anything in it that no run wrote, by name; or what draws plots is not installed.
    """
    refuse_foreign(real_path(output), listed)
    try:
        require_matplotlib()
    except ModuleNotFoundError:
        raise ExportError("matplotlib is not installed. Run pip install 'teamlora-export[bench]'.") from None


def write_figures(found: Mapping[str, Any], output: Path) -> None:
    """The folder, whole; only one that a run wrote is replaced.

    Raises:
        ExportError: something else is there, or it cannot be written.
    """
    with staged(output, listed) as folder:
        (folder / _CARD_NAME).write_text(tables(found), encoding="utf-8")
        if found["scores"] or found["steps"]:
            write_plot(found, folder / _PLOT_NAME)
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        figures = {_SIGNATURE: _SIGNED, **found, "sha256": hashes}
        (folder / FIGURES_NAME).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


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
class _Others:
    settings: Settings
    code: str
    scores: list[_Trained]
    base_sha256: str | None = None
    questions_sha256: str | None = None
    rows_sha256: str | None = None


def read_scores(path: Path, place: Place) -> tuple[list[dict[str, Any]], str]:
    """The results in another run's figures.json; and a sentence of where they come from.

    What this code has found of a cell itself takes the place of the other's.

    Raises:
        ExportError: it is no such file, or of other settings, questions, rows or another base; each that differs is
            named.
    """
    advice = "Give a figures.json that this program wrote."
    try:
        fields = read_json(path, advice)
        found = msgspec.convert(fields, _Others)
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
    own = [place.find_own(result.of) for result in found.scores]
    scores = [
        {key: value for key, value in mine.items() if key != "answers"}
        if mine is not None
        else {**theirs, **_means(theirs)}
        for mine, theirs in zip(own, fields["scores"], strict=True)
    ]
    return scores, _told_of(path, found, {mine["cell"] for mine in own if mine is not None})


def _told_of(path: Path, found: _Others, replaced: Collection[str]) -> str:
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


def listed(folder: Path) -> set[str]:
    """The files in `folder` that a run wrote, and nobody changed since.

    Raises:
        ExportError: no run wrote them.
    """
    advice = "Choose another -o."
    try:
        figures = read_json(folder / FIGURES_NAME, advice, folder)
    except FileNotFoundError:
        raise ExportError(f"{folder}: is not empty, and no figures of this program are in it. {advice}") from None
    hashes = figures.get("sha256")
    if figures.get(_SIGNATURE) != _SIGNED or not isinstance(hashes, dict):
        raise ExportError(
            f"{folder / FIGURES_NAME}: is not what this program writes; an earlier version of it may have. {advice} Or "
            "remove that folder."
        )
    ours = (_CARD_NAME, _PLOT_NAME)
    whole = {
        name for name in ours if (folder / name).is_file() and sha256_of(folder / name, folder) == hashes.get(name)
    }
    return {FIGURES_NAME, *whole}
