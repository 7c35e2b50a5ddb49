"""Does the export keep the score? The same questions to bundles of a trained cell, through the deployed program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

from method.cells import Place, asked_examples, code_version
from method.plan import Cell
from method.score import runner_generate, score, tokenizer_of
from teamlora_export import __version__
from teamlora_export.export import export_onnx
from teamlora_export.progress import Reporter
from teamlora_export.staging import write_aside

# Options of `export_onnx`.
FORMS: Mapping[str, Mapping[str, str]] = {
    "fp32": {},
    "fp16": {"dtype": "fp16"},
    "int4": {"weights_form": "int4"},
}


def score_export(cell: Cell, place: Place, form: str, threads: int, reporter: Reporter) -> dict[str, Any] | None:
    """The score of one form of a cell's bundle, from before or from now; None where the cell has not been trained.

    `same` is the share of answers, in percent, that are to the letter what PyTorch in fp32 answers, right or wrong.
    """
    trained, adapter = place.find(cell), place.adapter(cell)
    if trained is None or adapter is None:
        return None
    path = adapter.parent / f"export-{form}-{code_version()}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    with TemporaryDirectory(dir=place.folder) as folder:
        bundle = export_onnx(str(place.base), adapter, f"{folder}/bundle", reporter=reporter, **FORMS[form])
        size = sum(file.stat().st_size for file in bundle.folder.iterdir())
        found = score(runner_generate(bundle.folder, threads), tokenizer_of(place.base), asked_examples(place.settings))
    pairs = [
        (one, other)
        for task, answers in found.answers.items()
        for one, other in zip(answers, trained["answers"][task], strict=True)
    ]
    result = {
        "cell": cell.name,
        "form": form,
        "mean": found.mean,
        "by_task": found.by_task,
        "same": 100 * sum(one == other for one, other in pairs) / len(pairs),
        "bytes": size,
        "version": __version__,
    }
    write_aside(path, json.dumps(result, indent=1) + "\n", result=False)
    return result
