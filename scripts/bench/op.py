"""What the op costs in ONNX Runtime on a CPU: a bundle's graph with its op nodes bypassed, with their bodies, native.

    scripts/bench/op.py                       SmolLM2-135M with random adapters, r=8 and r=32, k=4, all projections
    scripts/bench/op.py --bundle FOLDER       a bundle of your own

All three run in one process, in strict turns, so that what else the machine does hits each alike. Printed are medians
of time and of the ratio within a turn, over the bypassed graph, with the ratios' quartiles, beside what the adapter
adds in weights: in bytes the floor of a decoding step, in products about that of a prefill.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.export import export_onnx
from teamlora_export.graph import op
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.progress import Reporter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
from get_model import get_model  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GRAPHS = ("bypassed", "body", "native")
BYPASSED_NAME = "bypassed.onnx"


@dataclass(frozen=True)
class Step:
    """One call of the model: so many new tokens after so many."""

    name: str
    tokens: int
    past: int
    turns: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", help="a bundle that generates text")
    parser.add_argument("--library", type=Path, help="the native library; default: the one built here")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=200, help="of decoding; a tenth of it for prefill")
    parser.add_argument("--past", type=int, default=64, help="tokens before the decoding step")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prefill")
    parser.add_argument("--json", type=Path, help="write every figure here")
    given = parser.parse_args()
    library = find_library(given.library, Reporter()).path
    steps = (
        Step("decode", 1, given.past, given.turns),
        Step("prefill", given.prefill, 0, max(given.turns // 10, 3)),
    )
    with tempfile.TemporaryDirectory() as folder:
        bundles = given.bundle or [_make_bundle(Path(folder), r) for r in (8, 32)]
        results = [
            {"bundle": bundle.name, "threads": threads, **result}
            for bundle in bundles
            for threads in given.threads
            for result in measure(bundle, library, threads, steps)
        ]
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(bundle: Path, library: Path, threads: int, steps: tuple[Step, ...]) -> list[dict[str, object]]:
    """Time every graph in every step; prints a line for each."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        floor = _write_bypassed(bundle, Path(folder))
        sessions = {
            "bypassed": _session(Path(folder) / BYPASSED_NAME, threads),
            "body": _session(bundle / "model.onnx", threads),
            "native": _session(bundle / "model.onnx", threads, library),
        }
    results: list[dict[str, object]] = []
    for step in steps:
        times = _take_turns(sessions, step)
        for name in GRAPHS:
            ratios = times[name] / times["bypassed"]
            low, middle, high = np.percentile(ratios, (25, 50, 75))
            median = float(np.median(times[name])) * 1e3
            results.append({"step": step.name, "graph": name, "ms": median, "ratio": middle, "quartiles": [low, high]})
            print(
                f"{bundle.name}, {threads} threads, {step.name} {step.tokens}: {name:8} {median:9.2f} ms, "
                f"ratio {middle:.3f} ({low:.3f} to {high:.3f}); floor {floor:.3f}",
                flush=True,
            )
    return results


def _take_turns(sessions: Mapping[str, ort.InferenceSession], step: Step) -> dict[str, np.ndarray]:
    """Seconds [turns] of each session, which run one after the other, in another order each turn."""
    feeds = {name: _feeds(session, step) for name, session in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(-2, step.turns):
        for name in np.roll(list(sessions), turn).tolist():
            begin = time.perf_counter()
            sessions[name].run(["logits"], feeds[name])
            if turn >= 0:
                times[name].append(time.perf_counter() - begin)
    return {name: np.array(values) for name, values in times.items()}


def _feeds(session: ort.InferenceSession, step: Step) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    given = {
        "input_ids": rng.integers(100, 5000, (1, step.tokens)),
        "attention_mask": np.ones((1, step.past + step.tokens), np.int64),
        "position_ids": np.arange(step.past, step.past + step.tokens)[None],
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            given[value.name] = rng.normal(size=(1, value.shape[1], step.past, value.shape[3])).astype(kind)
    return {value.name: given[value.name] for value in session.get_inputs()}


def _session(path: Path, threads: int, library: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Threads that spin while another session runs would slow it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(path, options, ["CPUExecutionProvider"])


def _write_bypassed(bundle: Path, folder: Path) -> float:
    """The graph with y = base in place of every op node, on the same weights; returns (base + adapter) / base."""
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    adapter = set()
    for node in model.graph.node:
        if node.domain == op.DOMAIN and node.op_type == op.NAME:
            adapter.update(node.input[2:])
            node.CopyFrom(onnx.helper.make_node("Identity", [node.input[1]], node.output, node.name))
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
    added = sum(size for name, size in sizes.items() if name in adapter)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in adapter]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    del model.functions[:]
    (folder / BYPASSED_NAME).write_bytes(model.SerializeToString())
    for data in bundle.glob("*.data"):
        (folder / data.name).hardlink_to(data)
    # A tied embedding is stored once; what a decoding step reads of it is the head.
    return sum(sizes.values()) / (sum(sizes.values()) - added)


def _make_bundle(folder: Path, rank: int) -> Path:
    base = open_base(str(get_model("smollm2")))
    config = AdapterConfig(r=rank, lora_alpha=16.0, lora_nums=4, target_modules=TARGETS)
    adapter, bundle = folder / f"adapter-{rank}", folder / f"smollm2-r{rank}"
    write_adapter(new_adapter(base.signature, config, seed=0, spread=0.02), adapter)
    export_onnx(base.name, adapter, bundle)
    return bundle


if __name__ == "__main__":
    main()
