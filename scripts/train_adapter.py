"""Trains the adapter of this repository: TeamLoRA on SmolLM2-135M-Instruct, on the training part of the benchmark.

Writes the tasks (scripts/bench/tasks, seeded) as JSON Lines and asks `teamlora-export train` for the rest; prints its
command. What follows `--` goes to it as well.

    python scripts/train_adapter.py [-o out/smollm2-teamlora] [--data out/tasks] [-- --steps 40 --family lora ...]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from get_model import get_model

sys.path.append(str(Path(__file__).parent / "bench"))
from method.command import run as run_command
from write_tasks import write_tasks

# Examples of each kind: those of the benchmark.
COUNTS = {"train": 400, "validation": 10, "test": 100}
OPTIONS = (
    *("--rank", "8", "--experts", "4", "--alpha", "20", "--dtype", "bf16", "--save-dtype", "fp16"),
    *("--steps", "300", "--batch", "16", "--learning-rate", "1.5e-3", "--warmup", "0.1"),
    *("--evaluate-every", "100", "--patience", "0", "--seed", "0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/smollm2-teamlora"))
    parser.add_argument("--data", type=Path, default=Path("out/tasks"), help="folder for the tasks")
    arguments, more = parser.parse_known_args()

    write_tasks(arguments.data, COUNTS)
    command = ["train", str(get_model("smollm2")), "--data", str(arguments.data / "train.jsonl")]
    command += ["--validation", str(arguments.data / "validation.jsonl"), "-o", str(arguments.output), *OPTIONS]
    command += [word for word in more if word != "--"]
    print(f"$ teamlora-export {shlex.join(command)}", flush=True)
    sys.exit(subprocess.run([sys.executable, "-m", "teamlora_export", *command], check=False).returncode)


if __name__ == "__main__":
    run_command(main)
