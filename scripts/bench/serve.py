"""Many clients at once: continuous batching, in process and in a Triton server, beside the runner without it.

    scripts/bench/serve.py                      SmolLM2-135M, random adapter, 8 clients with 8 requests each
    scripts/bench/serve.py --clients 16 --requests 4 --json figures.json

Every client sends a request as soon as the one before it is answered: a random prompt of 8 to 128 tokens, 8 to 48
tokens to follow, the same for every row. The rows: `runner.py` with one request at a time, and with a thread for each
client; the scheduler that `deploy triton` writes, and that in a real server, over gRPC. Printed are tokens a second of
all clients together, and the milliseconds to a request's first token and between two: median, 95 and 99 per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bundle import Bundle
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.slots import SlotModel
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.export import export_onnx
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "deploy")]
from get_model import get_model  # noqa: E402
from real_triton import Stream, running  # noqa: E402

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Gives the tokens after a prompt, as they come.
Ask = Callable[[list[int], int], Iterable[object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8, help="of each client")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: every core")
    parser.add_argument("--json", type=Path, help="write every figure here")
    given = parser.parse_args()
    drawn = np.random.default_rng(0)
    requests = [
        (drawn.integers(100, 40_000, drawn.integers(8, 129)).tolist(), int(drawn.integers(8, 49)))
        for _ in range(given.clients * given.requests)
    ]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = _bundle(Path(folder), given.rank)
        for name, row in _rows(bundle, Path(folder), given.clients, given.threads).items():
            with ExitStack() as stack:
                results.append({"row": name, **_measure(row(stack), requests, given.clients)})
            _print(results[-1])
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


def _bundle(folder: Path, rank: int) -> Bundle:
    base = open_base(str(get_model("smollm2")))
    config = AdapterConfig(r=rank, lora_alpha=16.0, lora_nums=4, target_modules=TARGETS)
    write_adapter(new_adapter(base.signature, config, seed=0, spread=0.02), folder / "adapter")
    return export_onnx(base.name, folder / "adapter", folder / "bundle", cache="in-place")


def _rows(bundle: Bundle, folder: Path, clients: int, threads: int) -> dict[str, Callable[[ExitStack], Ask]]:
    """What opens each way to ask, by the name of its row."""

    def one_at_a_time(_: ExitStack) -> Ask:
        model, turn = Model(bundle.folder, check=False, threads=threads), threading.Lock()

        def ask(prompt: list[int], count: int) -> Iterator[object]:
            with turn:
                yield from model.stream(prompt, count)

        return ask

    def threaded(_: ExitStack) -> Ask:
        return Model(bundle.folder, check=False, threads=threads).stream

    def scheduled(stack: ExitStack) -> Ask:
        model = SlotModel(bundle.folder, check=False, threads=threads, slots=clients)
        return stack.enter_context(Scheduler(model)).submit

    def served(stack: ExitStack) -> Ask:
        out = deploy_triton(bundle, folder / "triton", name="m", batch=clients, sequences=2 * clients)
        server = stack.enter_context(running(out / "models", folder / "log"))
        return lambda prompt, count: Stream(server, "m", prompt, count).tokens()

    return {
        "runner, one at a time": one_at_a_time,
        "runner, a thread each": threaded,
        "scheduler": scheduled,
        "scheduler in Triton": served,
    }


def _measure(ask: Ask, requests: list[tuple[list[int], int]], clients: int) -> dict[str, object]:
    def client(share: list[tuple[list[int], int]]) -> list[list[float]]:
        """When each request was sent, and when each of its tokens came."""
        return [[time.perf_counter(), *(time.perf_counter() for _ in ask(*request))] for request in share]

    for _ in ask(*requests[0]):
        pass
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [t for share in pool.map(client, [requests[n::clients] for n in range(clients)]) for t in share]
    seconds = time.perf_counter() - began
    tokens = sum(len(one) - 1 for one in times)
    first = [one[1] - one[0] for one in times if len(one) > 1]
    between = np.concatenate([np.diff(one[1:]) for one in times])
    return {
        "tokens": tokens,
        "seconds": seconds,
        "first": np.percentile(first, (50, 95, 99)).tolist(),
        "between": np.percentile(between, (50, 95, 99)).tolist(),
    }


def _print(result: dict[str, object]) -> None:
    first, between = (
        " / ".join(f"{1e3 * value:.0f}" for value in result[key])  # type: ignore[attr-defined]
        for key in ("first", "between")
    )
    rate = result["tokens"] / result["seconds"]  # type: ignore[operator]
    print(f"{result['row']:22} {rate:7.1f} tokens/s   first {first} ms   between {between} ms", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
