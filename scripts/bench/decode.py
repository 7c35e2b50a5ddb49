"""Decoding and prefill of deployed text generators, beside onnxruntime-genai's un-adapted model with its own generator.

    scripts/bench/decode.py                     SmolLM2-135M, random adapter, r=8, k=4, all projections
    scripts/bench/decode.py --others            with PyTorch, and with optimum's graph of the un-adapted model
    scripts/bench/decode.py --neighbour         the same with another process that keeps one core busy
    scripts/bench/decode.py --memory            the most memory of each, in a process of its own

Everything runs in one process, in strict turns: in a turn, each reads the prompt and then makes tokens one by one, in
another order each turn. Printed are medians over the turns, and the median of the ratio within a turn to genai's on as
many threads as ours, with its quartiles: above 1 is faster than genai for tokens a second, slower for a prefill.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import torch
import transformers

from teamlora_export.adapter import AdapterConfig, align_with_base, read_adapter, write_adapter
from teamlora_export.cache import cache_folder
from teamlora_export.deploy import runner
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.export import export_onnx
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.model.inject import inject
from teamlora_export.progress import Reporter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
from get_model import get_model  # noqa: E402
from others import make_environment  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GENAI = "genai, un-adapted"
# Left to itself, onnxruntime-genai 0.18 ran one thread on a machine of two cores.
GENAI_ALONE = "genai, its threads"
# What reads a prompt (its ids, tokens to follow) and returns what makes one more token.
Opened = Callable[[list[int], int], Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1500], help="tokens before those that are timed"
    )
    parser.add_argument("--count", type=int, default=32, help="tokens that are timed in a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of our programs; 0: their default")
    parser.add_argument("--rows", nargs="+", help="only rows whose names hold one of these")
    parser.add_argument("--others", action="store_true", help="PyTorch and optimum too, whose graph is made once")
    parser.add_argument("--neighbour", action="store_true", help="beside a process that keeps one core busy")
    parser.add_argument(
        "--memory", action="store_true", help="the most memory at the longest length, in place of times"
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(Path(folder), given.rank, given.threads)
        if given.others:
            rows |= _other_rows(Path(folder))
        if given.rows:
            rows = {name: row for name, row in rows.items() if any(part in name for part in given.rows)}
        if given.memory:
            results = [_measure_memory(rows, name, max(given.lengths)) for name in rows]
        else:
            opened = {name: row() for name, row in rows.items()}
            with _neighbour() if given.neighbour else _nobody():
                results = [r for length in given.lengths for r in _measure(opened, length, given.count, given.turns)]
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def _rows(folder: Path, rank: int, threads: int) -> dict[str, Callable[[], Opened]]:
    """What opens each model, by the name of its row."""
    base = open_base(str(get_model("smollm2")))
    config = AdapterConfig(r=rank, lora_alpha=16.0, lora_nums=4, target_modules=TARGETS)
    write_adapter(new_adapter(base.signature, config, seed=0, spread=0.02), folder / "adapter")
    for form in ("growing", "in-place"):
        export_onnx(base.name, folder / "adapter", folder / form, cache=form)
    library = find_library(None, Reporter()).path
    genai = _genai_model(base.name)
    threaded = _with_threads(genai, folder / "genai", threads or len(os.sched_getaffinity(0)))
    return {
        GENAI: lambda: _open_genai(threaded),
        GENAI_ALONE: lambda: _open_genai(genai),
        "growing, body": lambda: _open_ours(folder / "growing", None, threads),
        "in place, body": lambda: _open_ours(folder / "in-place", None, threads),
        "in place, native": lambda: _open_ours(folder / "in-place", library, threads),
    }


def _genai_model(base: str) -> Path:
    """onnxruntime-genai's own graph of the base, kept in the user's cache."""
    folder = cache_folder() / "bench" / "genai-smollm2"
    if not (folder / "genai_config.json").is_file():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", base, "-i", base, "-o", str(folder)]
        subprocess.run([*builder, "-p", "fp32", "-e", "cpu"], check=True, capture_output=True)
    return folder


def _other_rows(folder: Path) -> dict[str, Callable[[], Opened]]:
    """PyTorch with the published layer, in eager mode, and optimum's graph of the base as optimum runs it on a CPU."""
    base = get_model("smollm2")
    graph = cache_folder() / "bench" / "optimum-smollm2"
    if not (graph / "model.onnx").is_file():
        command = [make_environment("optimum") / "bin" / "optimum-cli", "export", "onnx", "--model", base]
        options = ["--task", "text-generation-with-past", "--no-post-process", graph]
        subprocess.run([*command, *options], check=True, capture_output=True)
    return {
        "PyTorch, adapted": lambda: _open_torch(base, folder / "adapter"),
        "optimum, un-adapted": lambda: _open_optimum(graph / "model.onnx"),
    }


def _with_threads(genai: Path, folder: Path, threads: int) -> Path:
    """The same model in `folder`, to be run by so many threads."""
    folder.mkdir()
    for file in genai.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((genai / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (folder / "genai_config.json").unlink()
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


def _open_genai(folder: Path) -> Opened:
    model = og.Model(str(folder))

    def read(prompt: list[int], count: int) -> Callable[[], object]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + count + 1, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        return generator.generate_next_token

    return read


def _open_ours(folder: Path, library: Path | None, threads: int) -> Opened:
    model = runner.Model(folder, library, check=False, threads=threads)

    def read(prompt: list[int], count: int) -> Callable[[], object]:
        tokens = model.stream(prompt, count + 1)
        next(tokens)
        return lambda: next(tokens)

    return read


def _open_torch(base_folder: Path, adapter: Path) -> Opened:
    base = open_base(str(base_folder))
    model = base.load(torch.float32)
    inject(model, align_with_base(read_adapter(adapter), base.signature))
    model.eval()

    def read(prompt: list[int], _count: int) -> Callable[[], object]:
        ids, cache = torch.tensor([prompt]), transformers.DynamicCache()

        @torch.inference_mode()
        def step() -> object:
            nonlocal ids
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            return ids

        step()
        return step

    return read


def _open_optimum(path: Path) -> Opened:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    caches = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values")}
    outputs = [output.name for output in session.get_outputs()]

    def read(prompt: list[int], _count: int) -> Callable[[], object]:
        ids, done = np.array([prompt]), 0
        past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in caches.items()}

        def step() -> object:
            nonlocal ids, done, past
            done += ids.shape[1]
            places = np.arange(done - ids.shape[1], done)[None]
            feeds = {"input_ids": ids, "attention_mask": np.ones((1, done), np.int64), "position_ids": places, **past}
            made = dict(zip(outputs, session.run(outputs, feeds), strict=True))
            ids = made["logits"][:, -1:].argmax(-1)
            past = {name: made[name.replace("past_key_values", "present")] for name in caches}
            return ids

        step()
        return step

    return read


def _measure(opened: dict[str, Opened], length: int, count: int, turns: int) -> list[dict[str, object]]:
    prompt = [int(token) for token in np.random.default_rng(0).integers(100, 40_000, length)]
    prefill: dict[str, list[float]] = {name: [] for name in opened}
    decode: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(-1, turns):
        for name in np.roll(list(opened), turn).tolist():
            begin = time.perf_counter()
            more = opened[name](prompt, count)
            middle = time.perf_counter()
            for _ in range(count):
                more()
            if turn >= 0:
                prefill[name].append(middle - begin)
                decode[name].append(count / (time.perf_counter() - middle))
    results = []
    for name in opened:
        results.append({"row": name, "length": length, **_judged(decode, name), "kind": "tokens a second"})
        results.append({"row": name, "length": length, **_judged(prefill, name), "kind": "prefill, seconds"})
    for result in sorted(results, key=lambda found: str(found["kind"])):
        low, high = result["quartiles"]  # type: ignore[misc]
        print(
            f"{result['row']:19} {length:5} tokens: {result['median']:8.3f} {result['kind']:17} "
            f"ratio {result['ratio']:.3f} ({low:.3f} to {high:.3f})",
            flush=True,
        )
    return results


def _judged(figures: dict[str, list[float]], name: str) -> dict[str, object]:
    ratios = np.array(figures[name]) / np.array(figures.get(GENAI, figures[name]))
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return {"median": float(np.median(figures[name])), "ratio": float(middle), "quartiles": [float(low), float(high)]}


def _measure_memory(rows: dict[str, Callable[[], Opened]], name: str, length: int) -> dict[str, object]:
    # Forked, so that what opens a model need not be sent; nothing that has threads runs before it.
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(_most_memory(rows[name], length)))
    child.start()
    most = results.get()
    child.join()
    print(f"{name:19} {length:5} tokens: {most / 1e6:.0f} MB at the most, over the interpreter's", flush=True)
    return {"row": name, "length": length, "bytes": most}


def _most_memory(row: Callable[[], Opened], length: int) -> int:
    """Bytes, over what this process has before a model is opened."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = row()([100 + index % 1000 for index in range(length)], 8)
    for _ in range(8):
        more()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


@contextmanager
def _neighbour() -> Iterator[None]:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


@contextmanager
def _nobody() -> Iterator[None]:
    yield


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
