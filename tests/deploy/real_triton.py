"""A real Triton server with Python models, for as long as a block: on free ports of the loopback, stopped by its id."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as grpc
from get_triton_server import get_triton_server
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

# Only a hang reaches them, on however busy a machine.
SECONDS_TO_START = 300
# It waits for an answer to an idle connection, and for models to be unloaded.
_SECONDS_TO_STOP, _SECONDS_TO_EXIT = 90, 60


@dataclass(frozen=True)
class Addresses:
    """Where a server listens, as HOST:PORT, and its process id."""

    http: str
    grpc: str
    metrics: str
    process: int

    def counted(self, metric: str, model: str) -> int:
        """What the server's metrics count of a model's requests."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=60) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{metric}{{")]
        return sum(int(float(line.split()[-1])) for line in lines if f'model="{model}"' in line)

    def memory(self) -> int:
        """Bytes that the server and its models' processes hold."""
        server = psutil.Process(self.process)
        return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


@contextlib.contextmanager
def running(repository: Path, log: Path, python: Path | None = None) -> Iterator[Addresses]:
    """A server of the models in `repository`; what it says goes into `log`.

    Args:
        python: an environment in place of the server's own.

    Models are loaded and unloaded where a client asks for it; all of them are loaded at the start.

    Raises:
        RuntimeError: it is not ready in time, or does not stop in time, as one with a request that never ends.
    """
    home = get_triton_server()
    ports = free_ports(3)
    triton = home / "server" / "pytriton" / "tritonserver"
    options = {
        "model-repository": repository,
        "backend-directory": triton / "backends",
        "model-control-mode": "explicit",
        "load-model": "*",
        "http-address": "127.0.0.1",
        "grpc-address": "127.0.0.1",
        "metrics-address": "127.0.0.1",
        "http-port": ports[0],
        "grpc-port": ports[1],
        "metrics-port": ports[2],
        "exit-timeout-secs": _SECONDS_TO_EXIT,
    }
    environment = {
        # The back end finds Python there, and its library.
        "PATH": f"{(python or home / 'python') / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
        "HOME": os.environ.get("HOME", "/"),
        # As in its container.
        "TRITON_SERVER_VERSION": "2.51.0",
    }
    command = [triton / "bin" / "tritonserver", *(f"--{name}={value}" for name, value in options.items())]
    with log.open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
    try:
        addresses = Addresses(*(f"127.0.0.1:{port}" for port in ports), process.pid)
        _wait_until_ready(process, addresses.http, log)
        yield addresses
    finally:
        _stop(process, log)


class Connection:
    """A client over gRPC, for one request after another."""

    def __init__(self, server: Addresses) -> None:
        self._client = grpc.InferenceServerClient(server.grpc)
        self._answers: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: self._answers.put(error or result))

    def ask(self, model: str, **inputs: np.ndarray) -> Iterator[Any]:
        """The responses to a request, as they come; the last has nothing but the end."""
        given = [
            grpc.InferInput(name, list(values.shape), np_to_triton_dtype(values.dtype)).set_data_from_numpy(values)
            for name, values in inputs.items()
        ]
        self._client.async_stream_infer(model, given, enable_empty_final_response=True)
        while True:
            answer = self._answers.get(timeout=60)
            if isinstance(answer, InferenceServerException):
                raise answer
            if answer.get_response().parameters["triton_final_response"].bool_param:
                return
            yield answer

    def tokens(self, model: str, ids: list[int], count: int, stream: bool = True) -> Iterator[list[int]]:
        """Those of each response."""
        asked = {"max_tokens": np.array([[count]], np.int32), "stream": np.array([[stream]])}
        for answer in self.ask(model, input_ids=np.array([ids], np.int64), **asked):
            yield answer.as_numpy("token_ids")[0].tolist()

    def close(self, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/health/ready", timeout=5):
            return
        time.sleep(0.1)
    raise RuntimeError(f"The server is not ready:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process: subprocess.Popen[bytes], log: Path) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise RuntimeError(f"The server does not stop:\n{log.read_text(errors='replace')[-3000:]}") from None
    if "Exit timeout expired" in (told := log.read_text(errors="replace")):
        raise RuntimeError(f"The server stopped before its models did:\n{told[-3000:]}")


def free_ports(count: int) -> list[int]:
    """Ports of the loopback for a server that binds them later: none that the system gives to who asks for any, since
    it would give them away until then."""
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(min(10_000, first_given - 1), first_given)
    found: set[int] = set()
    # Other workers look for some at the same time, and may have been seeded alike.
    drawn = random.SystemRandom()
    while len(found) < count:
        port = drawn.choice(candidates) if len(candidates) > 1_000 else 0
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            found.add(one.getsockname()[1])
    return list(found)
