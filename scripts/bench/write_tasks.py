"""Writes the benchmark's tasks as JSON Lines: train.jsonl, validation.jsonl and test.jsonl in a folder.

    python scripts/bench/write_tasks.py -o FOLDER [--train 400] [--validation 20] [--test 100] [--seed 0]

A line is {"prompt": ..., "answer": ..., "task": ...}; numbers are of each kind of task. The same seed gives the same
files. See scripts/bench/tasks.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from method.command import run
from tasks import PARTS, TASKS, Example, Part, make_examples

from teamlora_export.errors import ExportError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for part, count in zip(PARTS, (400, 20, 100), strict=True):
        parser.add_argument(f"--{part}", type=int, default=count, help=f"examples of each kind (default: {count})")
    given = parser.parse_args()
    counts: dict[Part, int] = {part: getattr(given, part) for part in PARTS}
    if min(counts.values()) < 1:
        parser.error("give 1 example of each kind at least.")
    try:
        paths = write_tasks(given.output, counts, given.seed)
    except ValueError as error:
        raise ExportError(str(error)) from None
    for path in paths:
        print(path)


def write_tasks(folder: Path, counts: Mapping[Part, int], seed: int = 0) -> list[Path]:
    """A file for each part, with so many examples of each kind, in a random order.

    Raises:
        ValueError: a kind has not so many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part, count in counts.items():
        examples = [example for task in TASKS for example in make_examples(task, part, count, seed)]
        random.Random(f"{part}/{seed}").shuffle(examples)
        paths.append(folder / f"{part}.jsonl")
        paths[-1].write_text("".join(_line(example) for example in examples), encoding="utf-8")
    return paths


def _line(example: Example) -> str:
    return json.dumps(asdict(example)) + "\n"


if __name__ == "__main__":
    run(main)
