"""The benchmark's test questions to one adapter, in PyTorch: what it scores, task by task.

    python scripts/bench/ask.py adapters/smollm2-teamlora --json adapters/smollm2-teamlora/score.json

The questions are those of `claims.py`, 100 of each of eleven kinds; so is the base, SmolLM2-135M-Instruct. All of it
computes in bf16, as there, or in what `--dtype` says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from method.cells import Place, code_version, default_folder, hash_of_base, hash_of_questions, score_in_torch
from method.command import run
from method.plan import FULL
from method.record import made_with, require_record, write_record
from method.report import guessing
from tasks import TASKS

from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.model.base import open_base
from teamlora_export.origin import require_one_base
from teamlora_export.progress import Reporter

sys.path.append(str(Path(__file__).parents[1]))
from get_model import get_model

SCRIPT = "scripts/bench/ask.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="a folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=FULL.dtype)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    if given.json is not None:
        require_record(given.json, SCRIPT)

    # Of the files as they are now, which are those that run.
    made = made_with(code_version(), ("torch", "transformers", "tokenizers"))
    reporter = Reporter()
    place = Place(get_model("smollm2"), FULL, default_folder())
    adapter = open_adapter(given.adapter, place.base, reporter)
    with reporter.step(f"Asking {len(TASKS) * FULL.test:,} questions"):
        scores = score_in_torch(place, given.adapter, given.dtype)
    found = {
        "mean": scores.mean,
        "by_task": scores.by_task,
        "guessing": guessing(list(scores.by_task)),
        "dtype": given.dtype,
        "questions": sum(map(len, scores.right.values())),
        "questions_sha256": hash_of_questions(FULL),
        "base_sha256": hash_of_base(place.base),
        "adapter_sha256": adapter.sha256,
        **made,
    }
    if given.json is not None:
        write_record(given.json, SCRIPT, found)
    for task, percent in scores.by_task.items():
        print(f"{task:12} {percent:5.1f}")
    print(f"{'average':12} {scores.mean:5.1f}   (guessing: {found['guessing']:.1f})")


def open_adapter(folder: Path, base: Path, reporter: Reporter) -> AdapterSpec:
    """The adapter, looked at before the base's weights are read; that it names another base is said.

    Raises:
        ExportError: it cannot be read, or does not fit the base.
    """
    adapter, opened = read_adapter(folder), open_base(str(base), "text-generation")
    require_one_base([adapter], opened.source.origin, any_base=True, reporter=reporter)
    return align_with_base(adapter, opened.signature)


if __name__ == "__main__":
    run(main)
