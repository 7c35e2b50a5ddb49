"""Pods of a Deployment as processes of this machine, and a balancer in front of them: what a cluster does, in small.

A pod is a real Triton server with the arguments of its manifest. The balancer sends each request to the endpoints that
are ready, in turns, over a connection of its own.
"""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import subprocess
import sysconfig
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml
from get_triton_server import get_triton_server
from real_triton import SECONDS_TO_START, free_ports

_SECONDS_BETWEEN_PROBES = 0.2


class Pod:
    """A server of what `deploy kubernetes` has written into a folder; it is started, and not yet ready.

    Args:
        variables: of the environment, beside those that it needs here.

    Attributes:
        http, metrics: where it listens, as HOST:PORT.
    """

    def __init__(self, deployed: Path, scratch: Path, **variables: str) -> None:
        home = get_triton_server()
        triton = home / "server" / "pytriton" / "tritonserver"
        ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
        self.http, self.metrics = (f"127.0.0.1:{ports[name]}" for name in ("http", "metrics"))
        command = [triton / "bin" / "tritonserver", *_arguments(deployed), f"--backend-directory={triton / 'backends'}"]
        # Shared memory that a killed server leaves is known by its name.
        self._shared = f"pod_{ports['http']}_"
        command.append(f"--backend-config=python,shm-region-prefix-name={self._shared}")
        for name, port in ports.items():
            command += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
        environment = {
            # The back end finds Python there, and its library.
            "PATH": f"{home / 'python' / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
            "HOME": str(scratch),
            **variables,
        }
        self._log = scratch / f"{ports['http']}.log"
        with self._log.open("wb") as told:
            self.process = subprocess.Popen(command, stdout=told, stderr=told, env=environment, start_new_session=True)

    def kill(self) -> None:
        """As a container is killed: with the processes of its models and their memory, which would stay otherwise."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for region in Path("/dev/shm").glob(f"{self._shared}*"):
            region.unlink()

    def told(self) -> str:
        """What the server has written."""
        return self._log.read_text(errors="replace")

    def is_ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=60):
            return True
        return False

    def wait_until_ready(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while not self.is_ready():
            ends = self.process.poll() is not None or time.monotonic() > end
            assert not ends, f"The server is not ready:\n{self.told()[-3000:]}"
            time.sleep(_SECONDS_BETWEEN_PROBES)


class Balancer:
    """Inside of its block it listens, and looks at its pods.

    Attributes:
        endpoints: pods that are not being deleted; may be assigned to at any time. ready: those that last said so.
        address: where it listens, as HOST:PORT.
    """

    def __init__(self, endpoints: list[Pod]) -> None:
        self.endpoints, self.ready = endpoints, set(endpoints)
        self._turns, self._closed = itertools.count(), threading.Event()
        balancer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                status, body = balancer._forward(self.path, self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing is told."""

        class Front(ThreadingHTTPServer):
            # Connections that may wait to be taken.
            request_queue_size = 128

        self._server = Front(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Balancer:
        for work in (self._server.serve_forever, self._probe):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _probe(self) -> None:
        while not self._closed.wait(_SECONDS_BETWEEN_PROBES):
            self.ready = {pod for pod in self.endpoints if pod.is_ready()}

    def _forward(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The answer of a pod. A request that none could be given is given to the next; one that was, never again."""
        pods = [pod for pod in self.endpoints if pod in self.ready]
        first = next(self._turns)
        for turn in range(len(pods)):
            pod = pods[(first + turn) % len(pods)]
            connection = http.client.HTTPConnection(pod.http, timeout=60)
            try:
                connection.connect()
            except OSError:
                continue
            try:
                connection.request("POST", path, body)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException) as error:
                return 502, str(error).encode()
            finally:
                connection.close()
        return 503, b"No server is ready."


def _arguments(deployed: Path) -> list[str]:
    """Those of the manifest's server, with the repository where it is here."""
    pod = yaml.safe_load((deployed / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    arguments = [argument.replace("$(POD_UID)", "a-key") for argument in pod["containers"][0]["args"]]
    (place,) = (argument for argument in arguments if argument.startswith("--model-repository="))
    arguments[arguments.index(place)] = f"--model-repository={deployed / 'triton' / 'models'}"
    return arguments
