"""What it costs how long PyTorch's threads spin while they wait for each other: `validate` in three ways, in turns.

    python scripts/bench/spinning.py                               alone, and beside one and two busy processes
    python scripts/bench/spinning.py --neighbours 1 --turns 6 --json figures.json

The command has them spin for 1,000 rounds, and sleep then. Left to themselves (libgomp's, which PyTorch has on Linux)
they spin for 300,000, and by OMP_WAIT_POLICY=passive for none; the same command is told of each. The model has
SmolLM2-135M's sizes and four layers, so that a turn does not take minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from method.command import run
from neighbours import neighbours
from transformers import LlamaConfig, LlamaForCausalLM

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bench.measure import this_machine
from teamlora_export.cli_output import refuse_foreign_result, write_json
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter

OURS = "1,000 rounds"
# Long as libgomp has it where there are no more threads than processors.
_WAYS = {OURS: {}, "300,000 rounds": {"GOMP_SPINCOUNT": "300000"}, "none": {"OMP_WAIT_POLICY": "passive"}}
_READ = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2], help="processes that keep a core busy")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.turns < 1 or min(given.neighbours) < 0:
        raise ExportError("--turns: give 1 or more; --neighbours: none or more.")
    if "libgomp" not in Path("/proc/self/maps").read_text():
        raise ExportError("PyTorch's threads are not libgomp's here, and it is not known how they wait.")
    if given.json is not None:
        refuse_foreign_result(given.json)
    machine = this_machine()
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = _export(Path(folder))
        for count in dict.fromkeys(given.neighbours):
            seconds = found[str(count)] = {way: [] for way in _WAYS}
            with neighbours(count):
                for turn in range(given.turns):
                    for way in list(_WAYS)[:: -1 if turn % 2 else 1]:
                        seconds[way].append(_validate(bundle, way))
            print(f"beside {count} busy processes: {told(seconds)}", flush=True)
    write_json({"turns": given.turns, "machine": dataclasses.asdict(machine), "seconds": found}, given.json)


def told(seconds: dict[str, list[float]]) -> str:
    """Of `validate`: medians of its seconds, and of the ratios turn by turn to our way, with their quartiles."""
    found = [f"{statistics.median(seconds[OURS]):.1f} s with {OURS}"]
    for way in list(_WAYS)[1:]:
        low, middle, high = np.percentile(np.divide(seconds[way], seconds[OURS]), (25, 50, 75))
        found.append(f"{way} {middle:.2f} ({low:.2f} - {high:.2f}) times as long")
    return ", ".join(found)


def _export(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    base = open_base(str(folder / "model"))
    adapter = AdapterConfig(r=32, lora_alpha=16.0, lora_nums=4, target_modules=_TARGETS)
    write_adapter(new_adapter(base.signature, adapter, seed=0, spread=0.02), folder / "adapter")
    return export_onnx(str(folder / "model"), folder / "adapter", folder / "bundle").folder


def _validate(bundle: Path, way: str) -> float:
    """Seconds of the command as a whole."""
    kept = {name: value for name, value in os.environ.items() if name not in _READ}
    command = [sys.executable, "-m", "teamlora_export", "validate", str(bundle)]
    started = time.perf_counter()
    ended = subprocess.run(command, env={**kept, **_WAYS[way]}, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if ended.returncode:
        raise ExportError(f"validate ended with {ended.returncode}: {(ended.stderr or ended.stdout).strip()[-300:]}")
    return seconds


if __name__ == "__main__":
    run(main)
