"""Does the export keep the score? The same questions to bundles of a trained cell, through the deployed program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from method.cells import Place, asked_examples, score_in_torch, whole_version
from method.groups import TORCH
from method.plan import Cell
from method.score import runner_generate, score, tokenizer_of
from teamlora_export import __version__
from teamlora_export.export import export_onnx
from teamlora_export.progress import Reporter
from teamlora_export.staging import scratch_folder, write_aside

# Options of `export_onnx`.
FORMS: Mapping[str, Mapping[str, str]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int4": {"weights_form": "int4"},
}


def score_exports(
    cell: Cell, place: Place, forms: Sequence[str], threads: int, reporter: Reporter
) -> list[dict[str, Any]]:
    """The scores of a cell in PyTorch in fp32 and of its bundles in `forms`, from before or from now; none where the
    cell has not been trained.

    `same` is the share of answers, in percent, that are to the letter what PyTorch answers, right or wrong; `right` has
    a mark for each question, by task, as a cell's result.
    """
    adapter = place.adapter(cell)
    if adapter is None:
        return []
    rows = []
    for form in (TORCH, *forms):
        found = _kept(adapter.parent, form, place.any_version)
        if found is None:
            with reporter.step(f"Scoring {cell.name}, {form}"):
                row = _score(cell, place, adapter, form, threads, reporter)
            found = adapter.parent / f"export-{form}-{whole_version()}.json"
            write_aside(found, json.dumps(row, indent=1) + "\n", result=False)
        rows.append({**json.loads(found.read_text(encoding="utf-8")), "code": found.stem.rpartition("-")[2]})
    expected: dict[str, list[str]] = {}
    for example in asked_examples(place.settings):
        expected.setdefault(example.task, []).append(example.answer.strip())
    return [{**row, "right": _right(row, expected), "same": _same(row, rows[0])} for row in rows]


def _kept(folder: Path, form: str, any_version: bool) -> Path | None:
    """What was found before: by this code, or the newest of any."""
    own = folder / f"export-{form}-{whole_version()}.json"
    if own.is_file() or not any_version:
        return own if own.is_file() else None
    others = folder.glob(f"export-{form}-????????.json")
    return max(others, key=lambda path: path.stat().st_mtime, default=None)


def _score(cell: Cell, place: Place, adapter: Path, form: str, threads: int, reporter: Reporter) -> dict[str, Any]:
    size = 0
    if form == TORCH:
        found = score_in_torch(place, adapter, "fp32")
    else:
        with scratch_folder(place.folder / "export") as folder:
            bundle = export_onnx(str(place.base), adapter, folder / "bundle", reporter=reporter, **FORMS[form])
            size = sum(file.stat().st_size for file in bundle.folder.iterdir())
            generate = runner_generate(bundle.folder, threads)
            found = score(generate, tokenizer_of(place.base), asked_examples(place.settings))
    return {
        "cell": cell.name,
        "form": form,
        "mean": found.mean,
        "by_task": found.by_task,
        "answers": found.answers,
        "bytes": size,
        "version": __version__,
    }


def _right(row: Mapping[str, Any], expected: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {
        task: "".join(str(int(said == answer)) for said, answer in zip(answers, expected[task], strict=True))
        for task, answers in row["answers"].items()
    }


def _same(row: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    pairs = [
        one == other
        for task, answers in row["answers"].items()
        for one, other in zip(answers, reference["answers"][task], strict=True)
    ]
    return 100 * sum(pairs) / len(pairs)
