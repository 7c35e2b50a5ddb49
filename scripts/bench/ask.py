"""The benchmark's test questions to one adapter, in PyTorch: what it scores, task by task.

    python scripts/bench/ask.py adapters/smollm2-teamlora --json adapters/smollm2-teamlora/score.json

The questions are those of `claims.py`, 100 of each of eleven kinds; so is the base, SmolLM2-135M-Instruct in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from method.cells import Place, default_folder, hash_of_base, hash_of_questions, score_in_torch
from method.command import run
from method.plan import FULL
from method.report import guessing

from teamlora_export.staging import write_aside

sys.path.append(str(Path(__file__).parents[1]))
from get_model import get_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="a folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default=FULL.dtype)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()

    place = Place(get_model("smollm2"), FULL, default_folder())
    scores = score_in_torch(place, given.adapter, given.dtype)
    found = {
        "mean": scores.mean,
        "by_task": scores.by_task,
        "guessing": guessing(list(scores.by_task)),
        "dtype": given.dtype,
        "questions": sum(map(len, scores.right.values())),
        "questions_sha256": hash_of_questions(FULL),
        "base_sha256": hash_of_base(place.base),
    }
    for task, percent in scores.by_task.items():
        print(f"{task:12} {percent:5.1f}")
    print(f"{'average':12} {scores.mean:5.1f}   (guessing: {found['guessing']:.1f})")
    if given.json is not None:
        write_aside(given.json, json.dumps(found, indent=1) + "\n", result=False)


if __name__ == "__main__":
    run(main)
