"""Trains a TeamLoRA adapter on SmolLM2-135M-Instruct: four small tasks, some ten minutes on two cores.

Makes the rows up (seeded), writes them as JSON Lines with held-out ones that share no prompt with them, and asks
`teamlora-export train` for the rest; prints its command. What follows `--` goes to it as well.

    scripts/train_adapter.py [-o out/smollm2-teamlora] [--data out/rows] [-- --steps 40 --family lora ...]
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from get_model import get_model

SEED = 20240817
# Of each task.
ROWS, HELD_OUT = 480, 24
OPTIONS = (
    *("--rank", "8", "--experts", "4", "--alpha", "8", "--balance-weight", "0.05"),
    *("--steps", "160", "--batch", "12", "--learning-rate", "4e-3", "--warmup", "0.1", "--patience", "0"),
    *("--evaluate-every", "40", "--seed", str(SEED), "--save-dtype", "fp16"),
)


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


def sentiment(rng: random.Random) -> Example:
    """Classification: is a review good or bad?"""
    good = ["wonderful", "moving", "sharp", "delightful", "brilliant", "warm"]
    bad = ["dull", "clumsy", "tedious", "shallow", "noisy", "forgettable"]
    things = ["film", "book", "meal", "concert", "hotel", "lecture", "game"]
    is_good = rng.random() < 0.5
    words = rng.sample(good if is_good else bad, 2)
    text = f"The {rng.choice(things)} was {words[0]} and, in the end, {words[1]}."
    return Example(f"Review: {text}\nSentiment:", " positive" if is_good else " negative")


def arithmetic(rng: random.Random) -> Example:
    """Calculation: sums of small numbers."""
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    return Example(f"Question: What is {a} plus {b}?\nResult:", f" {a + b}")


def extraction(rng: random.Random) -> Example:
    """Structured output: the facts of a sentence as JSON."""
    name = rng.choice(["Ada", "Boris", "Chen", "Dana", "Emil", "Farah", "Goran", "Hana"])
    city = rng.choice(["Lisbon", "Oslo", "Quito", "Riga", "Seoul", "Tunis"])
    age = rng.randint(18, 80)
    return Example(
        f"Text: {name}, who is {age}, moved to {city} last year.\nJSON:",
        f' {{"name": "{name}", "age": {age}, "city": "{city}"}}',
    )


def reordering(rng: random.Random) -> Example:
    """Transformation: words in alphabetical order."""
    words = rng.sample(["apple", "bread", "cloud", "door", "engine", "forest", "garden", "house", "island", "jar"], 4)
    return Example(f"Words: {', '.join(words)}\nSorted:", f" {', '.join(sorted(words))}")


TASKS = {"sentiment": sentiment, "arithmetic": arithmetic, "extraction": extraction, "reordering": reordering}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/smollm2-teamlora"))
    parser.add_argument("--data", type=Path, default=Path("out/rows"), help="folder for the rows")
    arguments, more = parser.parse_known_args()

    for part, rows in make_rows(random.Random(SEED)).items():
        for task, examples in rows.items():
            path = arguments.data / part / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(asdict(example)) + "\n" for example in examples))
    command = ["train", str(get_model("smollm2")), "--data", str(arguments.data / "train")]
    command += ["--validation", str(arguments.data / "held-out"), "-o", str(arguments.output), *OPTIONS]
    command += [word for word in more if word != "--"]
    print(f"$ teamlora-export {shlex.join(command)}", flush=True)
    sys.exit(subprocess.run([sys.executable, "-m", "teamlora_export", *command], check=False).returncode)


def make_rows(rng: random.Random) -> dict[str, dict[str, list[Example]]]:
    """The rows of each part and task; those to train on have other prompts than those that are held out."""
    held_out = {task: [make(rng) for _ in range(HELD_OUT)] for task, make in TASKS.items()}
    seen = {example.prompt for examples in held_out.values() for example in examples}
    trained = {task: [_unseen(make, rng, seen) for _ in range(ROWS)] for task, make in TASKS.items()}
    return {"train": trained, "held-out": held_out}


def _unseen(make: Callable[[random.Random], Example], rng: random.Random, seen: set[str]) -> Example:
    while (example := make(rng)).prompt in seen:
        pass
    return example


if __name__ == "__main__":
    main()
