"""Time and peak memory of whole export processes, beside optimum's and onnxruntime-genai's builder, in turns.

    python scripts/bench/export.py                 SmolLM2-135M: ours (traced, and with a kept graph) and both others
    python scripts/bench/export.py llama-1b        a checkpoint of Llama-3.2-1B's shapes, fp16, beside a plain copy
    python scripts/bench/export.py llama-7b        Llama-2-7B's shapes, 13.5 GB; needs 28 GB of disk
    python scripts/bench/export.py llama-70b       Llama-3-70B's shapes: the graph only, no data
    python scripts/bench/export.py depth           the graph of 8 and of 80 layers

Peak memory is the largest resident set of the process. The others run in environments of their own, made on the first
run. They export the base without an adapter; we export it with one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from method.command import run as run_command
from safetensors.numpy import save_file

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.cache import cache_folder
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
from get_model import get_model  # noqa: E402
from others import OTHERS, make_environment  # noqa: E402

COMMAND = (sys.executable, "-m", "teamlora_export")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16"}
SHAPES = {
    "llama-1b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        **_LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-70b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
_GRAPH_ONLY = """
import sys, torch
from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.graph.build import build_graph
from teamlora_export.model.base import open_base
from teamlora_export.progress import Reporter
base = open_base(sys.argv[1])
adapter = align_with_base(read_adapter(sys.argv[2]), base.signature)
print(len(build_graph(base, adapter, torch.float16, Reporter(quiet=True)).graph), "nodes")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="smollm2", choices=["smollm2", *SHAPES, "depth"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        bench = {"smollm2": bench_smollm2, "llama-70b": bench_graph, "depth": bench_depth}
        bench.get(arguments.what, bench_copy)(arguments.what, Path(folder), arguments.repeats)


def bench_smollm2(_what: str, folder: Path, repeats: int) -> None:
    model = get_model("smollm2")
    adapter = ROOT / "adapters" / "smollm2-teamlora"
    ours = [
        sys.executable,
        "-m",
        "teamlora_export",
        "onnx",
        str(model),
        "-a",
        str(adapter),
        "-o",
        str(folder / "ours"),
    ]
    subprocess.run(ours, check=True, capture_output=True)
    optimum, genai = (make_environment(name) / "bin" for name in OTHERS)
    by_optimum = f"{optimum}/optimum-cli export onnx --task text-generation-with-past --no-post-process"
    by_genai = f"{genai}/python -m onnxruntime_genai.models.builder -p fp32 -e cpu -c {folder}/genai-cache"
    run_in_turns(
        {
            "optimum, no adapter": lambda: measure([*by_optimum.split(), "--model", model, folder / "optimum"]),
            "onnxruntime-genai builder, no adapter": lambda: measure(
                [*by_genai.split(), "-i", model, "-o", folder / "genai"]
            ),
            "ours, nothing kept": lambda: measure([*ours, "--retrace"]),
            "ours, graph kept": lambda: measure(ours),
        },
        repeats,
    )


def bench_copy(what: str, folder: Path, repeats: int) -> None:
    model, adapter = folder / "model", folder / "adapter"
    write_checkpoint(SHAPES[what], model)
    write_random_adapter(model, adapter)
    command = [*COMMAND, "onnx", model, "-a", adapter, "-o", folder / "out", "--dtype", "fp16"]

    def copy() -> tuple[float, float]:
        code = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])"
        result = measure([sys.executable, "-c", code, model, folder / "copy"])
        shutil.rmtree(folder / "copy")
        return result

    def export(*options: str) -> tuple[float, float]:
        result = measure([*command, *options])
        shutil.rmtree(folder / "out")
        return result

    export()
    runs = {"plain copy": copy, "ours, nothing kept": lambda: export("--retrace"), "ours, graph kept": export}
    run_in_turns(runs, repeats)


def bench_graph(what: str, folder: Path, repeats: int) -> None:
    model, adapter = folder / "model", folder / "adapter"
    write_config(SHAPES[what], model)
    write_random_adapter(model, adapter)
    run_in_turns({"graph only": lambda: measure([sys.executable, "-c", _GRAPH_ONLY, model, adapter])}, repeats)


def bench_depth(_what: str, folder: Path, repeats: int) -> None:
    runs = {}
    for depth in (8, 80):
        model, adapter = folder / f"model{depth}", folder / f"adapter{depth}"
        write_config({**SHAPES["llama-1b"], "num_hidden_layers": depth}, model)
        write_random_adapter(model, adapter)
        command = [sys.executable, "-c", _GRAPH_ONLY, model, adapter]
        runs[f"graph of {depth} layers"] = lambda command=command: measure(command)
    run_in_turns(runs, repeats)


def run_in_turns(runs: dict[str, Callable[[], tuple[float, float]]], repeats: int) -> None:
    """Print medians of time and peak memory of each, and each time over the first's."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            results[name].append(run())
    first = statistics.median(seconds for seconds, _ in next(iter(results.values())))
    print(f"{'':<40}{'seconds':>9}{'(min - max)':>16}{'peak GB':>9}{'ratio':>8}")
    for name, figures in results.items():
        seconds = [figure[0] for figure in figures]
        median, memory = statistics.median(seconds), max(figure[1] for figure in figures)
        spread = f"({min(seconds):.1f} - {max(seconds):.1f})"
        print(f"{name:<40}{median:>9.1f}{spread:>16}{memory:>9.2f}{median / first:>8.2f}")


# A process inherits the peak of the one that started it, so a small one starts what is measured.
_LAUNCHER = """
import os, sys, time
started = time.perf_counter()
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9, status, file=open(int(os.environ["MEASURE"]), "w"))
"""


def measure(command: Sequence[object]) -> tuple[float, float]:
    """Seconds and peak resident gigabytes of a command."""
    # What the run before left to write is not this one's to pay for.
    os.sync()
    reading, writing = os.pipe()
    launcher = [sys.executable, "-S", "-c", _LAUNCHER, *map(str, command)]
    environment = {**os.environ, "MEASURE": str(writing)}
    result = subprocess.run(launcher, capture_output=True, text=True, env=environment, pass_fds=[writing])
    os.close(writing)
    with open(reading) as figures:
        seconds, memory, status = (float(figure) for figure in figures.read().split())
    if status:
        sys.exit(f"{command[0]} failed:\n{result.stdout[-1000:]}{result.stderr[-2000:]}")
    return seconds, memory


def write_config(fields: dict[str, object], folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))


def write_random_adapter(model: Path, folder: Path) -> None:
    config = AdapterConfig(r=8, lora_alpha=8.0, lora_nums=4, target_modules=TARGETS)
    write_adapter(new_adapter(open_base(str(model)).signature, config, seed=0), folder, np.dtype(np.float16))


def write_checkpoint(fields: dict[str, object], folder: Path) -> None:
    """A checkpoint of these shapes, fp16, one shard a layer. The numbers are of no account."""
    write_config(fields, folder)
    shapes = dict(open_base(str(folder)).signature.parameters)
    shards: dict[str, dict[str, np.ndarray]] = {}
    for name in shapes:
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = np.empty(0)
    for file, names in shards.items():
        tensors = {name: np.full(shapes[name], 0.01, np.float16) for name in names}
        save_file(tensors, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    run_command(main)
