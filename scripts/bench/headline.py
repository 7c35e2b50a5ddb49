"""The paper's headline on a CPU: LLaMA-2-7B's sizes, r=128, k=4 on gate, up and down, two layers of random weights.

    python scripts/bench/headline.py                       what `teamlora-export bench` measures, after 256 tokens
    python scripts/bench/headline.py --dtype fp32 --turns 20 --json figures.json

The head is a quarter of what a step reads there, in place of a fiftieth among 32 layers. Takes 8 GB of memory.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from method.command import run
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bench.report import benchmark_fields, print_benchmark
from teamlora_export.bench.run import BenchOptions, bench_bundle
from teamlora_export.cli_output import write_json
from teamlora_export.export import export_onnx
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter

_TARGETS = ("gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of all weights")
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256], help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=24, help="tokens that are timed after each prompt")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="of every row; 0: every core")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = open_base(str(_save_base(Path(folder) / "base")))
        config = AdapterConfig(r=given.rank, lora_alpha=2.0 * given.rank, lora_nums=4, target_modules=_TARGETS)
        write_adapter(new_adapter(base.signature, config, seed=0, spread=0.02), Path(folder) / "adapter")
        bundle = export_onnx(
            base.name, Path(folder) / "adapter", Path(folder) / "bundle", dtype=given.dtype, cache="in-place"
        )
        options = BenchOptions(tuple(given.lengths), (1,), given.count, given.turns, given.threads, memory=False)
        benchmark = bench_bundle(bundle, options)
    name = f"LLaMA-2-7B's sizes, two layers, {given.dtype}, r={given.rank}"
    print_benchmark(benchmark, name, Console(width=132))
    write_json(benchmark_fields(benchmark, name), given.json)


def _save_base(folder: Path) -> Path:
    """Sizes are those of meta-llama/Llama-2-7b-hf's configuration."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_attention_heads": 32}
    config = LlamaConfig(**sizes, num_key_value_heads=32, num_hidden_layers=2, max_position_embeddings=4_096)
    torch.set_default_dtype(torch.float16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


if __name__ == "__main__":
    run(main)
