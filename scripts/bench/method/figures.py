"""The folder that `claims.py -o` writes, figures.json, README.md and plot.png; and the figures of another run.

Cells that another run trained count beside those of this one (`claims.py --with`) where they are the same but for the
seed: the same settings and questions, and the rank, alpha and number of parameters that this code gives them on this
base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from method.cells import Place, asked_examples, data_folder, hash_of_base
from method.plan import BASE, Cell, Settings, count_parameters, options_of
from method.report import tables, write_plot
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
    mean: float
    right: dict[str, str]
    by_task: dict[str, float]
    rank: int = 0
    alpha: float = 0.0
    parameters: int = 0


@dataclass(frozen=True)
class _Others:
    settings: Settings
    code: str
    scores: list[_Trained]
    base_sha256: str | None = None


def read_scores(path: Path, place: Place) -> tuple[list[dict[str, Any]], str]:
    """The results in another run's figures.json; and a sentence of where they come from.

    Raises:
        ExportError: it is no such file, or of other settings, questions or another base; each that differs is named.
    """
    advice = "Give a figures.json that this program wrote."
    try:
        fields = read_json(path, advice)
        found = msgspec.convert(fields, _Others)
    except FileNotFoundError:
        raise ExportError(f"--with {path}: there is no such file. {advice}") from None
    except msgspec.ValidationError as error:
        raise ExportError(f"--with {path}: {error}. {advice}") from None
    differing = [
        f"{name} {value} (here {now})"
        for name, value in asdict(found.settings).items()
        if value != (now := getattr(place.settings, name))
    ]
    if found.base_sha256 not in (None, hash_of_base(place.base)):
        differing.append("another base")
    if differing:
        raise ExportError(f"--with {path}: was made with {'; '.join(differing)}. Scores of both cannot be compared.")
    questions: dict[str, int] = {}
    for example in asked_examples(place.settings):
        questions[example.task] = questions.get(example.task, 0) + 1
    names = set()
    for result in found.scores:
        _refuse_other(path, result, questions, place)
        if result.cell in names:
            raise ExportError(f"--with {path}: {result.cell} is there twice.")
        names.add(result.cell)
    doubt = "" if found.base_sha256 else ", which does not say of which weights its base was"
    cells = (result.cell + (f" ({result.code})" if result.code != found.code else "") for result in found.scores)
    return fields["scores"], f"From {path.name} of code {found.code}{doubt}: {', '.join(cells)}."


def _refuse_other(path: Path, result: _Trained, questions: Mapping[str, int], place: Place) -> None:
    cell = Cell(result.family, result.experts, result.targets, result.share, result.seed)
    if cell.name != result.cell:
        raise ExportError(f"--with {path}: {result.cell} is not what its options say, {cell.name}.")
    counts = {task: len(right) for task, right in result.right.items()}
    if counts != questions or any(set(right) - {"0", "1"} for right in result.right.values()):
        raise ExportError(f"--with {path}: {result.cell} was asked other questions.")
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
        raise ExportError(f"{folder / FIGURES_NAME}: is not what this program writes. {advice}")
    ours = (_CARD_NAME, _PLOT_NAME)
    whole = {
        name for name in ours if (folder / name).is_file() and sha256_of(folder / name, folder) == hashes.get(name)
    }
    return {FIGURES_NAME, *whole}
