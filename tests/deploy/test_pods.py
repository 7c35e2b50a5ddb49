"""Several servers behind a balancer, as Kubernetes runs them: killed, drained and rolled under load."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import random_adapter
from get_triton_server import PACKAGE, get_triton_server

sys.path.append(str(Path(__file__).parent))
from pods import Balancer, Pod
from waiting import wait_until

from teamlora_export.adapter import write_adapter
from teamlora_export.deploy.kubernetes import deploy_kubernetes
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.export import export_onnx

TOKENS = 100
CLIENTS = 6
SLOTS = 4
# As Kubernetes' proxies need some time until they know that a pod is no endpoint any more; ours knows at once.
PRE_STOP = 0.3
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Version:
    """What runs an adapter, and what it answers to each of some prompts."""

    deployed: Path
    answers: dict[tuple[int, ...], list[int]]


@dataclass(frozen=True)
class Held:
    """What runs an adapter, and the file for whose sake its texts wait, or its calls fail."""

    version: Version
    file: Path


@pytest.fixture(scope="module")
def versions(make_bundle, make_base, tmp_path_factory) -> tuple[Version, Version]:
    """Two adapters of one base, by one name."""
    folder, base = tmp_path_factory.mktemp("versions"), make_base("llama")
    write_adapter(random_adapter(base, TARGETS, seed=5), folder / "adapter")
    other = export_onnx(base.name, folder / "adapter", folder / "bundle", cache="in-place")
    bundles = (make_bundle("llama", cache="in-place"), other)
    models = [Model(bundle.folder, threads=1) for bundle in bundles]
    prompts = [(number, 9, 10 + number) for number in range(3, 24)]
    answers = [{prompt: model.generate([prompt], TOKENS)[0] for prompt in prompts} for model in models]
    # Long, and the other adapter's are others.
    told = [
        one for one in prompts if answers[0][one] != answers[1][one] and min(len(a[one]) for a in answers) == TOKENS
    ]
    assert len(told) > 4
    made = (
        Version(
            deploy_kubernetes(bundle, folder / str(number), TritonOptions(name="m", batch=SLOTS), cpus=1),
            {prompt: answers[number][prompt] for prompt in told},
        )
        for number, bundle in enumerate(bundles)
    )
    return next(made), next(made)


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts servers that do not outlive the test."""
    try:
        get_triton_server()
    except subprocess.CalledProcessError:
        pytest.skip(f"{PACKAGE}, which has the server, cannot be fetched")
    started: list[Pod] = []

    def start(version: Version, count: int = 1, **variables: str) -> list[Pod]:
        pods = [Pod(version.deployed, tmp_path, **variables) for _ in range(count)]
        started.extend(pods)
        for pod in pods:
            pod.wait_until_ready()
        return pods

    yield start
    for pod in started:
        pod.kill()


def post(address: str, path: str, **fields: object) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://{address}/v2/{path}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@dataclass(frozen=True)
class Answered:
    """A request: how many were sent before it, and what it was answered."""

    number: int
    prompt: tuple[int, ...]
    status: int
    tokens: list[int]


@dataclass
class Load:
    """Clients that ask for answers to prompts, one after another, inside of its block.

    Attributes:
        answered: every request, as they were answered. sent: how many there were.
    """

    address: str
    prompts: list[tuple[int, ...]]
    answered: list[Answered] = field(default_factory=list)
    sent: int = 0

    def __enter__(self) -> Load:
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._clients = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(CLIENTS)]
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for client in self._clients:
            client.join()

    def wait_for(self, more: int) -> None:
        """Until so many more requests are answered; a busy machine may take long for all of them."""
        begin = len(self.answered)
        for wanted in range(begin + 1, begin + more + 1):
            wait_until(lambda wanted=wanted: len(self.answered) >= wanted)

    def _ask(self, seed: int) -> None:
        drawn = random.Random(seed)
        while not self._ended.is_set():
            prompt = drawn.choice(self.prompts)
            with self._lock:
                number, self.sent = self.sent, self.sent + 1
            status, body = post(self.address, "models/m_text/generate", input_ids=prompt, max_tokens=TOKENS)
            tokens = json.loads(body)["token_ids"] if status == 200 else []
            with self._lock:
                self.answered.append(Answered(number, prompt, status, tokens))


def stream(pod: Pod, prompt: tuple[int, ...]) -> Iterator[int]:
    """The tokens of an answer, as they come."""
    fields = {"input_ids": prompt, "max_tokens": TOKENS, "stream": True}
    url = f"http://{pod.http}/v2/models/m_text/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(fields).encode()), timeout=60) as answer:
        for line in answer:
            # The last has none.
            if line.startswith(b"data: ") and (token := json.loads(line.removeprefix(b"data: "))["token_ids"]) != []:
                yield token


def delete(pod: Pod, balancer: Balancer, version: Version) -> None:
    """As a cluster deletes a pod: it ends when what it has taken is answered, a stream among it."""
    prompt, answer = next(iter(version.answers.items()))
    balancer.endpoints = [other for other in balancer.endpoints if other is not pod]
    time.sleep(PRE_STOP)
    tokens = stream(pod, prompt)
    first = next(tokens)
    pod.process.send_signal(signal.SIGTERM)
    assert [first, *tokens] == answer
    assert pod.process.wait(60) == 0


def test_a_server_that_is_killed_fails_its_own_requests_and_one_that_is_drained_none(versions, start):
    old, new = versions
    pods = start(old, 3)
    with Balancer(pods) as balancer, Load(balancer.address, list(old.answers)) as load:
        load.wait_for(30)
        pods[0].kill()
        killed = load.sent
        load.wait_for(30)
        wait_until(lambda: pods[0] not in balancer.ready)
        delete(pods[1], balancer, old)
        load.wait_for(30)
        rolled = len(load.answered)
        # A rolling update: a new one is ready before an old one goes.
        balancer.endpoints = [*balancer.endpoints, *start(new)]
        load.wait_for(30)
        delete(pods[2], balancer, old)
        updated = load.sent
        load.wait_for(30)
    # Everybody was answered.
    assert len(load.answered) == load.sent
    failed = [one.number for one in load.answered if one.status != 200]
    assert len(failed) <= CLIENTS and all(number < killed for number in failed)
    for place, one in enumerate(load.answered):
        if one.status == 200:
            expected = (old,) if place < rolled else (old, new) if one.number < updated else (new,)
            assert one.tokens in [version.answers[one.prompt] for version in expected], (place, one)


@pytest.fixture
def held(versions, tmp_path) -> Held:
    """The first version, whose texts do not go on while there is a file."""
    deployed, file = Path(shutil.copytree(versions[0].deployed, tmp_path / "deployed")), tmp_path / "held"
    program = deployed / "triton" / "models" / "m_text" / "1" / "scheduler.py"
    text = program.read_text()
    (step,) = re.findall(r"^ +self\._drop\(\)\n", text, re.MULTILINE)
    indent = step[: -len(step.lstrip())]
    waits = f"{indent}while __import__('os').path.exists({str(file)!r}):\n{indent}    time.sleep(0.01)\n"
    program.write_text(text.replace(step, waits + step))
    return Held(Version(deployed, versions[0].answers), file)


def test_a_server_that_stops_hangs_up_on_who_comes_anew(held, start):
    """Which is why a pod is told to stop when nobody is sent to it any more."""
    (pod,) = start(held.version)
    prompt, answer = next(iter(held.version.answers.items()))
    tokens = stream(pod, prompt)
    first = next(tokens)
    held.file.touch()

    def hangs_up() -> bool:
        """On a request that is refused without a step, as long as it is taken."""
        try:
            post(pod.http, "models/m_text/generate", input_ids=[-1])
        except (urllib.error.URLError, ConnectionError):
            return True
        return False

    assert not hangs_up()
    pod.process.send_signal(signal.SIGTERM)
    # While there is a text that it has not answered.
    wait_until(hangs_up)
    held.file.unlink()
    assert [first, *tokens] == answer


@pytest.fixture
def losable(versions, tmp_path) -> Held:
    """The first version, whose model is lost as soon as there is a file."""
    deployed, file = Path(shutil.copytree(versions[0].deployed, tmp_path / "deployed")), tmp_path / "lost"
    program = deployed / "triton" / "models" / "m_text" / "1" / "session.py"
    text, call = program.read_text(), "        self._session.onnx.run_with_iobinding(self.binding)\n"
    assert text.count(call) == 1
    lost = f"        if __import__('os').path.exists({str(file)!r}):\n"
    program.write_text(text.replace(call, f"{lost}            raise RuntimeError('CUDA error 700')\n{call}"))
    return Held(Version(deployed, versions[0].answers), file)


def test_a_metric_counts_who_waits_no_client_administers_and_a_lost_model_ends_its_server(versions, losable, start):
    (pod,) = start(losable.version, TEAMLORA_WHEN_BROKEN="end-server")
    rule = yaml.safe_load((versions[0].deployed / "adapter.yaml").read_text())["rules"]["custom"][0]
    series = rule["seriesQuery"].partition("{")[0]

    def waiting() -> float:
        with urllib.request.urlopen(f"http://{pod.metrics}/metrics") as answer:
            (line,) = (line for line in answer.read().decode().splitlines() if line.startswith(f"{series}{{"))
        return float(line.split()[-1])

    assert waiting() == 0
    threads = [
        threading.Thread(target=post, args=(pod.http, "models/m_text/generate"), kwargs=fields)
        for fields in [{"input_ids": [3, 4], "max_tokens": TOKENS}] * (SLOTS + 8)
    ]
    for thread in threads:
        thread.start()
    most = 0.0
    while any(thread.is_alive() for thread in threads):
        most = max(most, waiting())
    assert 0 < most <= 8
    assert waiting() == 0
    for path in ("repository/models/m_text/unload", "repository/index", "systemsharedmemory/region/x/register"):
        assert post(pod.http, path)[0] == 403
    assert post(pod.http, "models/m_text/generate", input_ids=[9], max_tokens=1)[0] == 200
    losable.file.touch()
    status, told = post(pod.http, "models/m_text/generate", input_ids=[9], max_tokens=1)
    assert status >= 400 and b"cannot be run any more (CUDA error 700)" in told, told
    # It was the server that the model's process has told to end, and it ended well, within its exit timeout.
    assert pod.process.wait(130) == 0
    logged = [pod.told().count(said) for said in ("What failed first: CUDA error 700", "the server is ended")]
    assert logged == [1, 1], pod.told()[-3000:]
