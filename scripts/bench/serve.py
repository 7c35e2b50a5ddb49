"""Many clients at once: continuous batching, in process and in a Triton server, beside what there is without it.

    python scripts/bench/serve.py                              SmolLM2-135M, random adapter; 1, 4, 16 and 64 clients
    python scripts/bench/serve.py --quick --json figures.json  fewer and shorter requests
    python scripts/bench/serve.py --clients 8 --rows scheduler triton --no-targets

Every client sends a request as soon as the one before it is answered: a random prompt of 8 to 128 tokens, 8 to 48
tokens to follow, the same for every row. Printed are tokens a second of all clients together, and the milliseconds to a
request's first token and between two: median, 95 and 99 per cent.

runner          `Model.stream` of the deployed program, a thread for each client: their steps are not shared
scheduler       the scheduler that `deploy triton` writes, in this process
triton          the same in a real Triton server, over gRPC
perf_analyzer   the same, asked and measured by Triton's own client, which may send a request more than once
implicit        `deploy triton --batching sequence`: a step of the model, its cache as Triton's state. The real server
                comes without an ONNX Runtime back end, so the tests' stand-in for that runs it, in this process: one
                request after another, as most are in the server, since steps of different lengths hardly ever meet
genai           onnxruntime-genai's own engine on the un-adapted base, where its package has one

After the table come targets, each beside what was measured; they have a load of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from method.command import run as run_command

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bundle import Bundle
from teamlora_export.deploy.pages import finish_large_pages
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.export import export_onnx
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "deploy")]
from genai_engine import GenaiEngine  # noqa: E402
from get_model import get_model  # noqa: E402
from get_perf_analyzer import get_perf_analyzer  # noqa: E402
from other_rows import genai_graph  # noqa: E402
from real_triton import Addresses, Connection, running  # noqa: E402
from triton_server import Server  # noqa: E402

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of a cache as Triton's state.
_CAPACITY = 256
# Gives the tokens after a prompt, as they come.
Ask = Callable[[list[int], int], Iterable[object]]
Request = tuple[list[int], int]
# Seconds that requests took together; of each, when it was sent, and when each of its tokens came.
Answered = tuple[float, list[list[float]]]


@dataclass(frozen=True)
class Result:
    """What a row did with a load.

    Attributes:
        first, between: seconds to a request's first token and between two: median, 95 and 99 per cent.
    """

    row: str
    clients: int
    tokens: int
    seconds: float
    first: tuple[float, ...]
    between: tuple[float, ...]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        first, between = (
            " / ".join(f"{1e3 * value:6.0f}" for value in values) for values in (self.first, self.between)
        )
        return f"{self.row:13} {self.clients:3} clients {self.rate:7.1f} tokens/s   {first} ms   {between} ms"


class Rows:
    """What opens each way to ask."""

    def __init__(self, folder: Path, rank: int, threads: int, spinning: bool) -> None:
        self._folder, self._threads, self._spinning = folder, threads, spinning
        self._base = get_model("smollm2")
        base = open_base(str(self._base))
        config = AdapterConfig(r=rank, lora_alpha=16.0, lora_nums=4, target_modules=_TARGETS)
        write_adapter(new_adapter(base.signature, config, seed=0, spread=0.02), folder / "adapter")
        self._bundle: Bundle = export_onnx(base.name, folder / "adapter", folder / "bundle", cache="in-place")

    def model(self) -> Model:
        model = Model(self._bundle.folder, check=False, threads=self._threads)
        finish_large_pages()
        return model

    def runner(self, _stack: ExitStack, _clients: int) -> Ask:
        return self.model().stream

    def scheduler(self, stack: ExitStack, clients: int) -> Ask:
        return stack.enter_context(Scheduler(self.model().slots(clients))).submit

    def triton(self, stack: ExitStack, clients: int) -> Ask:
        return self.served(stack, clients)[1]

    def served(self, stack: ExitStack, clients: int) -> tuple[Addresses, Ask]:
        out = deploy_triton(
            self._bundle,
            self._folder / f"triton{clients}",
            TritonOptions(name="m", batch=clients, sequences=2 * clients),
        )
        config = out / "models" / "m_text" / "config.pbtxt"
        text = config.read_text()
        for key, written, wanted in (
            ("threads", "0", str(self._threads)),
            ("spinning", "true", str(self._spinning).lower()),
        ):
            entry = 'key: "{}"\n  value {{\n    string_value: "{}"'
            assert entry.format(key, written) in text
            text = text.replace(entry.format(key, written), entry.format(key, wanted))
        config.write_text(text)
        server = stack.enter_context(running(out / "models", self._folder / f"log{clients}"))
        held = threading.local()

        def ask(prompt: list[int], count: int) -> Iterator[object]:
            if not hasattr(held, "connection"):
                held.connection = Connection(server)
                stack.callback(held.connection.close)
            for tokens in held.connection.tokens("m_text", prompt, count):
                yield from tokens

        return server, ask

    def analyzed(self, stack: ExitStack, requests: Sequence[Request], clients: int) -> Answered:
        """What NVIDIA's client measures of the row triton."""
        server, ask = self.served(stack, clients)
        for _ in ask(*requests[0]):
            pass
        rows = [
            {
                "input_ids": {"content": prompt, "shape": [len(prompt)]},
                "max_tokens": {"content": [count], "shape": [1]},
                "stream": {"content": [True], "shape": [1]},
            }
            for prompt, count in requests
        ]
        asked, told = self._folder / "asked.json", self._folder / "told.json"
        asked.write_text(json.dumps({"data": rows}))
        program = get_perf_analyzer()
        command = [program, "-m", "m_text", "-u", server.grpc, "-i", "grpc", "--streaming", "--async"]
        command += ["--input-data", asked, "--profile-export-file", told]
        command += ["--concurrency-range", str(clients), "--request-count", str(len(requests))]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        (experiment,) = json.loads(told.read_text())["experiments"]
        times = [[one["timestamp"], *one["response_timestamps"]] for one in experiment["requests"]]
        # The last response of each has no token.
        seconds = [[time / 1e9 for time in one[:-1]] for one in times]
        return max(one[-1] for one in seconds) - min(one[0] for one in seconds), seconds

    def implicit(self, _stack: ExitStack, clients: int) -> Ask:
        out = deploy_triton(
            self._bundle,
            self._folder / f"implicit{clients}",
            TritonOptions(name="m", batching="sequence", capacity=_CAPACITY, text=False),
        )
        server, turn, numbers = Server(out / "models"), threading.Lock(), itertools.count(1)
        takes = {value.name for value in server.models["m"].config.input}

        def ask(prompt: list[int], count: int) -> Iterator[object]:
            sequence, step, read = next(numbers), prompt, 0
            for left in reversed(range(count)):
                end = read + len(step)
                given = {
                    "input_ids": np.array([step]),
                    "attention_mask": (np.arange(_CAPACITY) < end)[None].astype(np.int64),
                    "position_ids": np.arange(read, end)[None],
                }
                with turn:
                    found = server.infer(
                        "m", {name: given[name] for name in given if name in takes}, sequence, read == 0, left == 0
                    )
                step, read = [int(found["logits"][0, -1].argmax())], end
                yield step[0]

        return ask

    def genai(self, stack: ExitStack, clients: int) -> Ask:
        return stack.enter_context(GenaiEngine(genai_graph(self._base), clients, self._threads)).ask


NAMES = ("runner", "scheduler", "triton", "perf_analyzer", "implicit", "genai")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, help="of all clients together, at least (default: 64; --quick: 8)")
    parser.add_argument("--rows", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: every core")
    spinning_help = "of the row triton: its threads keep their cores for a moment while they wait for work"
    parser.add_argument("--spinning", action=argparse.BooleanOptionalAction, default=True, help=spinning_help)
    parser.add_argument("--quick", action="store_true", help="too little of everything, to see that it runs")
    parser.add_argument("--targets", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="write every figure here")
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder), given.rank, given.threads, given.spinning)
        print(f"{'':45}first token: 50, 95, 99 %   between: 50, 95, 99 %")
        for clients in given.clients:
            requests = _requests(max(clients, given.requests or (8 if given.quick else 64)))
            for name in given.rows:
                results.append(_measure(rows, name, requests, clients))
                print(results[-1], flush=True)
        targets = _targets(rows, given.quick) if given.targets else []
    if given.json is not None:
        fields = {"results": [asdict(result) for result in results], "targets": targets}
        given.json.write_text(json.dumps(fields, indent=2) + "\n")


def _requests(count: int, prompts: tuple[int, int] = (8, 128), answers: tuple[int, int] = (8, 48)) -> list[Request]:
    """The same ones each time; `prompts` and `answers` are the fewest and the most tokens."""
    drawn = np.random.default_rng(0)
    return [
        (
            drawn.integers(100, 40_000, drawn.integers(*prompts, endpoint=True)).tolist(),
            int(drawn.integers(*answers, endpoint=True)),
        )
        for _ in range(count)
    ]


def _measure(rows: Rows, name: str, requests: Sequence[Request], clients: int) -> Result:
    with ExitStack() as stack:
        if name == "perf_analyzer":
            return _result(name, clients, [rows.analyzed(stack, requests, clients)])
        return _load(name, getattr(rows, name)(stack, clients), requests, clients)


def _load(name: str, ask: Ask, requests: Sequence[Request], clients: int) -> Result:
    for _ in ask(*requests[0]):
        pass
    return _result(name, clients, [_answer(ask, requests, clients)])


def _answer(ask: Ask, requests: Sequence[Request], clients: int) -> Answered:
    def client(share: Sequence[Request]) -> list[list[float]]:
        return [[time.perf_counter(), *(time.perf_counter() for _ in ask(*request))] for request in share]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = [t for share in pool.map(client, [requests[n::clients] for n in range(clients)]) for t in share]
    return time.perf_counter() - began, times


def _result(name: str, clients: int, parts: Sequence[Answered]) -> Result:
    times = [one for _, some in parts for one in some]
    first = [one[1] - one[0] for one in times if len(one) > 1]
    between = np.concatenate([np.diff(one[1:]) for one in times])
    return Result(
        name,
        clients,
        sum(len(one) - 1 for one in times),
        sum(seconds for seconds, _ in parts),
        _percentiles(first),
        _percentiles(between.tolist()),
    )


def _percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """Median, 95 and 99 per cent; of answers of one token, nothing is between two."""
    return tuple(np.percentile(values, (50, 95, 99)).tolist()) if values else (float("nan"),) * 3


def _targets(rows: Rows, quick: bool) -> list[dict[str, object]]:
    """Of short requests: what the row triton promises, beside what was measured."""
    told: list[dict[str, object]] = []

    def tell(what: str, sense: str, target: float, measured: float) -> None:
        met = measured <= target if sense == "at most" else measured >= target
        told.append({"what": what, "target": f"{sense} {target:.3g}", "measured": measured, "met": met})
        print(f"{what}: {measured:.2f}; target {sense} {target:.3g}: {'met' if met else 'MISSED'}", flush=True)

    short = _requests(16 if quick else 800, (4, 16), (4, 16))
    parts = [short[n : n + 100] for n in range(0, len(short), 100)]
    with ExitStack() as stack:
        server, served = rows.served(stack, 8)
        ways: dict[str, tuple[Ask, int]] = {
            "triton": (served, 8),
            "implicit": (rows.implicit(stack, 8), 8),
            "triton, alone": (served, 1),
            "runner": (rows.model().stream, 1),
        }
        answered: dict[str, list[Answered]] = {name: [] for name in ways}
        # In turns: the machine is not as fast at one time as at another.
        for part in parts:
            for name, (ask, clients) in ways.items():
                answered[name].append(_answer(ask, part if clients > 1 else part[: len(part) // 4], clients))
        loaded, implicit, alone, runner = (_result(name, ways[name][1], answered[name]) for name in ways)
        tell(
            "8 clients' short requests: time over implicit state's", "at most", 1 / 3, loaded.seconds / implicit.seconds
        )
        tell("tokens a second of 8 clients over 1's", "at least", 2.5, loaded.rate / alone.rate)
        tell("time of one client over the runner's", "at most", 1.1, runner.rate / alone.rate)
        # In one piece, since clients that begin together wait for one another's prompts; one client before and after.
        ends = [_answer(served, short[:50], 1)]
        load = _result("triton", 8, [_answer(served, short, 8)])
        single = _result("triton, alone", 1, [*ends, _answer(served, short[:50], 1)])
        tell("first token of 8 clients, 99 %, in 1's median", "at most", 4, load.first[2] / single.first[0])
        held = []
        # All that it will ever hold is there after the first thousand.
        for count in (40, 80) if quick else (1_000, 10_000):
            asked = [(prompt, 1) for prompt, _ in itertools.islice(itertools.cycle(short), count)]
            _answer(served, asked, 8)
            held.append(server.memory() / 1e6)
        tell("MB more after 10,000 requests", "at most", 10, held[1] - held[0])
    return told


if __name__ == "__main__":
    run_command(main)
