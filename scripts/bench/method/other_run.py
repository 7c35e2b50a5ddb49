"""The figures of another run, which count beside those of this one (`claims.py --with`).

Cells do where they are the same but for the seed: the same settings, questions and rows, and the rank, alpha and number
of parameters that this code gives them on this base. Figures that do not say by hashes of which base, questions and
rows they are count with a note. Timings and exports do where this run has none of the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from method.cells import Place, data_folder, hash_of_base, hash_of_questions, hash_of_rows, unlike
from method.groups import TORCH
from method.plan import BASE, EXPERTS, EXPORTED, Settings, count_parameters, full_grid, options_of
from method.rows import Figures, Timed, Trained, fields_of_exports, fields_of_inference, fields_of_steps, means
from teamlora_export.errors import ExportError
from teamlora_export.files import read_json

_Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class OtherRun:
    """What another run found, as figures.json has it.

    Attributes:
        told: sentences of where it comes from.
    """

    scores: _Rows = ()
    steps: _Rows = ()
    inference: _Rows = ()
    exports: _Rows = ()
    told: str = ""


def read_other_run(path: Path, place: Place) -> OtherRun:
    """What is in another run's figures.json.

    What this code has found of a cell itself takes the place of the other's.

    Raises:
        ExportError: it is no such file, or of other settings, questions, rows or another base, each of which is named;
            or a row of it cannot stand beside this run's.
    """
    advice = "Give a figures.json that this program wrote."
    try:
        given = read_json(path, advice)
        found = msgspec.convert(given, Figures)
    except FileNotFoundError:
        raise ExportError(f"--with {path}: there is no such file. {advice}") from None
    except msgspec.ValidationError as error:
        raise ExportError(f"--with {path}: {error}. {advice}") from None
    if not (found.scores or found.steps or found.inference or found.exports):
        raise ExportError(f"--with {path}: has neither scores nor timings. {advice}")
    if lacking := {field.name for field in fields(Settings)} - set(given["settings"]):
        raise ExportError(f"--with {path}: its settings do not say {', '.join(sorted(lacking))}. {advice}")
    _refuse_another_kind(path, found, place)
    for what in _unlike(found, place):
        raise ExportError(f"--with {path}: {what}")
    own = [place.find_own(result.of) for result in found.scores]
    scores = [
        {key: value for key, value in mine.items() if key != "answers"}
        if mine is not None
        else {**theirs, **means(theirs["right"])}
        for mine, theirs in zip(own, given.get("scores", []), strict=True)
    ]
    replaced = {mine["cell"] for mine in own if mine is not None}
    return OtherRun(
        scores,
        fields_of_steps(found.steps),
        fields_of_inference(found.inference),
        fields_of_exports(found.exports),
        _told_of(path, found, replaced),
    )


def beside(theirs: _Rows, ours: _Rows, of: Sequence[str]) -> list[Mapping[str, Any]]:
    """Another run's rows and this one's, which take the place of those that are alike in the fields `of`."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for rows in (theirs, ours):
        by_key: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            by_key.setdefault(tuple(row[name] for name in of), []).append(row)
        found.update(by_key)
    return [row for rows in found.values() for row in rows]


def _refuse_another_kind(path: Path, found: Figures, place: Place) -> None:
    """Where all of the run is of something else."""
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
        raise ExportError(f"--with {path}: was made with {'; '.join(differing)}. The two cannot be compared.")


def _unlike(found: Figures, place: Place) -> Iterator[str]:
    """A sentence for each row that cannot stand beside this run's, or beside another of its own."""
    for result in found.scores:
        if told := _unlike_cell(result, place):
            yield f"{result.cell} {told}"
    turns = {row.targets: len(row.seconds) for row in found.steps if row.family == "lora"}
    for row in found.steps:
        if len(row.seconds) != turns.get(row.targets):
            yield f"{row.row}: LoRA's steps on the same targets are not there, or of another number of turns."
    for timed in (*found.steps, *found.inference):
        if not _is_of_the_grid(timed):
            yield f"{timed.row}: has {timed.experts} experts, as no cell of this grid."
    for inferred in found.inference:
        if inferred.openings not in (1, len(inferred.ratios)):
            yield f"{inferred.row}: has {len(inferred.ratios)} ratios of {inferred.openings} openings."
    references = [row.cell for row in found.exports if row.form == TORCH]
    for export in found.exports:
        if export.cell.rpartition("-s")[0] != EXPORTED:
            yield f"{export.cell} is not what is exported, {EXPORTED}."
        if references.count(export.cell) != 1:
            yield f"{export.cell} is exported, and not once scored in {TORCH} beside it."
        if told := unlike({"right": export.right}, place):
            yield f"{export.cell}, {export.form}, {' and '.join(told)}."
    names = (
        *(result.cell for result in found.scores),
        *((row.family, row.experts, row.targets, row.implementation) for row in found.steps),
        *((row.family, row.experts, row.targets, row.row, row.quantity) for row in found.inference),
        *((row.cell, row.form) for row in found.exports),
    )
    for name, count in Counter(names).items():
        if count > 1:
            yield f"{name if isinstance(name, str) else ', '.join(map(str, name))} is there twice."


def _is_of_the_grid(row: Timed) -> bool:
    return row.experts == 1 if row.family == "lora" else row.experts in EXPERTS


def _unlike_cell(result: Trained, place: Place) -> str:
    """In what a cell is not what this code makes of it; empty where it is."""
    cell = result.of
    if cell.name != result.cell:
        return f"is not what its options say, {cell.name}."
    if cell not in full_grid([cell.seed]):
        return "is no cell of this grid."
    known = {"right": result.right, "questions_sha256": result.questions_sha256, "rows_sha256": result.rows_sha256}
    if told := unlike(known, place):
        return f"{' and '.join(told)}. Scores of both cannot be compared."
    if cell.family == BASE:
        return ""
    if result.settings not in (msgspec.UNSET, place.settings):
        return "was trained with other settings. Scores of both cannot be compared."
    options = options_of(cell, place.settings, place.base, data_folder(place), Path("unused"))
    here = (options.rank, options.used_alpha, count_parameters(options))
    if here == (result.rank, result.alpha, result.parameters):
        return ""
    return (
        f"has rank {result.rank}, alpha {result.alpha:g} and {result.parameters:,} parameters; here it has {here[0]}, "
        f"{here[1]:g} and {here[2]:,}. Scores of both cannot be compared."
    )


def _told_of(path: Path, found: Figures, replaced: Collection[str]) -> str:
    counted = [result for result in found.scores if result.cell not in replaced]
    rest = [part for part in ("steps", "inference", "exports") if getattr(found, part)]
    doubts = [
        *(["of which weights its base was"] if found.base_sha256 is None else []),
        *(["which questions were asked"] if _is_unsure_of_questions(found, counted) else []),
        *(
            ["which rows were trained on"]
            if any(result.rows_sha256 is None and result.family != BASE for result in counted)
            else []
        ),
    ]
    cells = [result.cell + (f" ({result.code})" if result.code != found.code else "") for result in counted]
    taken = [*([", ".join(cells)] if cells else []), *([f"{', '.join(rest)}, where this has none"] if rest else [])]
    told = []
    if taken:
        doubt = f", which does not say {', '.join(doubts)}" if doubts else ""
        told.append(f"From {path.name} of code {found.code}{doubt}: {'; and '.join(taken)}.")
    if replaced:
        told.append(f"Of {path.name} left out, for results of this code: {', '.join(sorted(replaced))}.")
    return " ".join(told)


def _is_unsure_of_questions(found: Figures, counted: Sequence[Trained]) -> bool:
    unsaid = any(result.questions_sha256 is None for result in counted)
    return unsaid or (bool(found.exports) and found.questions_sha256 is None)
