"""The text model that batches continuously, in a real Triton server."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import list_again, poison_token, pytorch_greedy, until_stop
from get_triton_server import PACKAGE, get_triton_server
from shelves import COUNT, NAMES
from shelves import PROMPTS as SHELF_PROMPTS
from tritonclient.utils import InferenceServerException
from waiting import wait_until

sys.path.append(str(Path(__file__).parent))
from real_triton import Addresses, Connection, running

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.deploy.words import TextStream, encode_text
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter

# A token whose embedding is no number.
NAN = 7
# A model with one slot takes so long for a step, so that there is time to do something meanwhile.
STEP = 0.05
# Tokens of a text of that model which takes it longer than a client waits here: what it answers meanwhile had the slot.
ENDLESS = 4000
# The same of the one with a shelf, whose texts are to last until others have come.
SHORT_STEP = 0.01
# A text that begins so is read for as long as there is a folder, where it leaves a file of its name.
LONG, READING = "Long", "reading"
SUCCESSES, FAILURES = "nv_inference_request_success", "teamlora_requests_failed"
# In place of the ONNX Runtime back end, which the server lacks: the same model with the same configuration.
ENCODER = """
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = f"{args['model_repository']}/{args['model_version']}"
        self._session = ort.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, given)
        wanted = request.requested_output_names()
        tensors = [pb_utils.Tensor(n, value) for n, value in zip(names, found) if n in wanted]
        return pb_utils.InferenceResponse(output_tensors=tensors)
"""

READ_FOR_LONG = f"""

def _read_for_long(text, folder):
    import time

    while text.startswith({LONG!r}) and folder.exists():
        try:
            (folder / text).touch()
        except FileNotFoundError:
            return
        time.sleep(0.01)
"""

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def shelf(make_shelf, tmp_path_factory) -> Bundle:
    """One whose adapters come and go."""
    source = make_shelf(cache="in-place")
    return read_bundle(Path(shutil.copytree(source.folder, tmp_path_factory.mktemp("shelf") / "bundle")))


@pytest.fixture(scope="module")
def deployed(make_bundle, shelf, tmp_path_factory) -> Path:
    """Three models in one repository: `m` with four slots, `slow` with one, a place to wait, and the native op, and
    `shelf`, of whose five adapters three are in memory at a time."""
    source, folder = make_bundle("mistral", cache="in-place"), tmp_path_factory.mktemp("triton")
    bundle = Bundle(Path(shutil.copytree(source.folder, folder / "bundle")), source.manifest)
    (bundle.folder / "chat_template.jinja").write_text(TEMPLATE)
    bundle = list_again(bundle.folder)
    out = deploy_triton(bundle, folder / "m", TritonOptions(name="m", batch=4, check_files=False))
    poison_token(out / "models" / "m_text" / "1", NAN)
    library = str(build_library().path)
    slow = deploy_triton(bundle, folder / "slow", TritonOptions(name="slow", batch=1, sequences=2, library=library))
    path = slow / "models" / "slow_text" / "1" / "deploy.json"
    described = json.loads(path.read_text())
    described["tokens"] |= {"most": ENDLESS + 96, "stops": []}
    path.write_text(json.dumps(described))
    shelved = deploy_triton(shelf, folder / "shelf", TritonOptions(name="shelf", batch=4))
    for name, step, made in (("slow", STEP, slow), ("shelf", SHORT_STEP, shelved)):
        program = made / "models" / f"{name}_text" / "1" / "scheduler.py"
        text = program.read_text()
        text, count = re.subn(r"^( +)(self\._drop\(\)\n)", rf"\1time.sleep({step})\n\1\2", text, flags=re.MULTILINE)
        assert count == 1
        program.write_text(text)
        # The client and what `adapters publish` looks for stay where they were written.
        os.symlink(made / "models" / f"{name}_text", out / "models" / f"{name}_text")
    # Words that take long to be read.
    program = out / "models" / "m_text" / "1" / "words.py"
    text = program.read_text()
    assert "        text.encode()\n" in text
    waits = f"        _read_for_long(text, Path({str(out / READING)!r}))\n"
    program.write_text(text.replace("        text.encode()\n", f"{waits}        text.encode()\n") + READ_FOR_LONG)
    _add_encoder(make_bundle("bert"), source, folder / "encoder", out)
    return out


def _add_encoder(source: Bundle, words: Bundle, folder: Path, out: Path) -> None:
    """Args:
    words: has a tokenizer with as many tokens.
    """
    bundle = Bundle(Path(shutil.copytree(source.folder, folder / "bundle")), source.manifest)
    shutil.copyfile(words.folder / "tokenizer.json", bundle.folder / "tokenizer.json")
    encoder = deploy_triton(list_again(bundle.folder), folder / "encoder", TritonOptions(name="encoder", batch=4))
    for part in (encoder / "models").iterdir():
        part.rename(out / "models" / part.name)
    config = out / "models" / "encoder" / "config.pbtxt"
    text = config.read_text()
    assert 'backend: "onnxruntime"' in text and 'default_model_filename: "model.onnx"\n' in text
    text = text.replace('"onnxruntime"', '"python"').replace('default_model_filename: "model.onnx"\n', "")
    config.write_text(text)
    (out / "models" / "encoder" / "1" / "model.py").write_text(ENCODER)


@pytest.fixture(scope="module")
def server(deployed, tmp_path_factory) -> Iterator[Addresses]:
    try:
        get_triton_server()
    except subprocess.CalledProcessError:
        pytest.skip(f"{PACKAGE}, which has the server, cannot be fetched")
    with running(deployed / "models", tmp_path_factory.mktemp("log") / "log") as addresses:
        yield addresses


@pytest.fixture(scope="module")
def model(make_bundle) -> Model:
    return Model(make_bundle("mistral", cache="in-place").folder, threads=1)


def post(server: Addresses, path: str, **fields: object) -> tuple[int, Any]:
    """Status and JSON of an answer over HTTP."""
    request = urllib.request.Request(f"http://{server.http}/v2/{path}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read() or "{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def generate(server: Addresses, name: str = "m", **fields: object) -> tuple[int, Any]:
    return post(server, f"models/{name}_text/generate", **fields)


def ask_shelf(server: Addresses, i: int, name: str | None) -> tuple[int, Any]:
    named = {} if name is None else {"adapter": name}
    return generate(server, "shelf", input_ids=SHELF_PROMPTS[i], max_tokens=COUNT, **named)


def test_eight_clients_of_any_length_at_once_get_the_runners_tokens_and_bad_ones_fail_alone(server, model, rng):
    drawn = [rng.integers(8, 384, length).tolist() for length in rng.integers(1, 90, 60)]
    answered = [(prompt, model.generate([prompt], 30)[0]) for prompt in drawn]
    # An answer that holds the token would be spoilt too.
    prompts, expected = zip(*(pair for pair in answered if NAN not in pair[1]), strict=True)
    assert len(prompts) > 42
    bad = {3: [NAN, 9], 17: [384], 30: [9, NAN], 41: [9, 999]}
    asked = [bad.get(number, prompt) for number, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: generate(server, input_ids=prompt, max_tokens=30), asked))
    for number, (status, answer) in enumerate(answers):
        if number not in bad:
            # Its JSON has a single number in place of a list of one.
            assert (status, np.atleast_1d(answer.get("token_ids")).tolist()) == (200, expected[number]), answer
            assert answer["finish_reason"] == ("length" if len(expected[number]) == 30 else "stop")
        elif NAN in asked[number]:
            assert (status, answer["error"]) == (400, "The model's answer to this is no number (NaN)."), answer
        else:
            assert (status, "not in the model's vocabulary of 384" in answer["error"]) == (400, True), answer


def test_words_come_whole_and_as_a_stream_from_its_own_clients(server, deployed, model):
    prompt = "Unless required by law"
    ids = encode_text(model.tokenizer, prompt)
    text = TextStream(model.tokenizer, ids)
    expected = "".join(map(text.add, model.generate([ids], 20)[0]))
    assert generate(server, text_input=prompt, max_tokens=20)[1]["text_output"] == expected
    stop = expected[len(expected) // 2 :][:3]
    status, stopped = generate(server, text_input=prompt, max_tokens=20, stop=["\0", stop])
    assert (status, stopped["text_output"]) == (200, expected[: expected.index(stop)])
    assert stopped["finish_reason"] == "stop"
    command = [sys.executable, deployed / "client.py", "--url", server.grpc, "--tokens", "20"]
    told = subprocess.run([*command, prompt], capture_output=True, text=True, timeout=60)
    assert told.stdout == f"{prompt}{expected}\n", told.stderr
    told = subprocess.run([*command, "--ids", "9", "10"], capture_output=True, text=True, timeout=60)
    assert [int(token) for token in told.stdout.split()] == model.generate([[9, 10]], 20)[0], told.stderr
    connection = Connection(server)
    pieces = list(connection.tokens("m_text", [9, 10], 20))
    connection.close()
    assert [token for piece in pieces for token in piece] == model.generate([[9, 10]], 20)[0]
    assert max(map(len, pieces)) == 1


def test_curl_is_answered_as_its_script_says(server, deployed, model):
    environment = {**os.environ, "SERVER": server.http}
    told = subprocess.run(["sh", deployed / "client.sh"], env=environment, capture_output=True, text=True, timeout=60)
    whole, *events = [json.loads(line.removeprefix("data: ")) for line in told.stdout.splitlines() if line.strip()]
    assert events[-1]["finish_reason"] == whole["finish_reason"] == "length", told
    assert "".join(event["text_output"] for event in events) == whole["text_output"]
    assert whole["text_output"]


def test_a_conversation_is_gone_on_with_by_the_models_own_template(server, model):
    ids = encode_text(model.tokenizer, "user: Who may copy\nassistant:", specials=False)
    text = TextStream(model.tokenizer, ids)
    expected = "".join(map(text.add, model.generate([ids], 10)[0]))
    messages = json.dumps([{"role": "user", "content": "Who may copy"}])
    status, answer = generate(server, messages=messages, max_tokens=10)
    assert (status, answer.get("text_output")) == (200, expected), answer
    status, refused = generate(server, messages="Who may copy")
    assert (status, refused["error"].startswith("messages: give JSON")) == (400, True), refused


def test_a_seed_draws_the_same_and_log_probabilities_come_along(server):
    drawn = {
        "input_ids": [9, 10, 11],
        "max_tokens": 12,
        "temperature": 1.2,
        "top_k": 40,
        "top_p": 0.9,
        "log_probs": True,
    }
    answers = [generate(server, **drawn, seed=seed)[1] for seed in (4, 4, 5)]
    assert answers[0] == answers[1] != answers[2]
    assert len(answers[0]["log_probs"]) == len(answers[0]["token_ids"])
    assert max(answers[0]["log_probs"]) < 0
    status, refused = generate(server, **{**drawn, "top_p": 2.0})
    assert (status, refused["error"]) == (400, "top_p 2.0: give a number above 0, up to 1.")


def test_a_request_too_many_is_refused_and_one_that_is_cancelled_makes_room(server, model):
    first = Connection(server)
    assert next(first.tokens("slow_text", [9], ENDLESS))
    with ThreadPoolExecutor(2) as pool:
        # There is room for one of them to wait.
        asked = {pool.submit(generate, server, "slow", input_ids=[id_], max_tokens=4): id_ for id_ in (10, 11)}
        (refused,), (waiting,) = wait(asked, return_when=FIRST_COMPLETED)
        assert refused.result() == (400, {"error": "1 requests wait already. Try again later."})
        first.close(cancel=True)
        assert waiting.result()[1]["token_ids"] == model.generate([[asked[waiting]]], 4)[0]


def test_a_client_that_is_gone_frees_its_slot(server, deployed, model):
    client = deployed.parent / "slow" / "client.py"
    command = [sys.executable, client, "--url", server.grpc, "--tokens", str(ENDLESS), "The License"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(len("The License") + 1)
    process.kill()
    process.communicate()
    assert generate(server, "slow", input_ids=[10], max_tokens=4)[1]["token_ids"] == model.generate([[10]], 4)[0]


@pytest.mark.parametrize(("path", "limit"), [("generate_stream", 1000.0), ("generate", 8 * STEP)])
def test_a_connection_that_is_dropped_frees_its_slot(path, limit, server, model):
    """The server notices it when it writes; where it writes all at the end, the request's time limit does it."""
    fields = {"input_ids": [9], "max_tokens": ENDLESS, "stream": path == "generate_stream", "time_limit": limit}
    address, port = server.http.split(":")
    connection = http.client.HTTPConnection(address, int(port), timeout=60)
    connection.request("POST", f"/v2/models/slow_text/{path}", json.dumps(fields))
    if path == "generate_stream":
        assert connection.getresponse().read(1)
    else:
        # Nothing tells a client that its text is being written.
        time.sleep(4 * STEP)
    connection.close()
    assert generate(server, "slow", input_ids=[10], max_tokens=4)[1]["token_ids"] == model.generate([[10]], 4)[0]


def test_a_time_limit_ends_a_request_and_frees_its_slot(server, model):
    status, late = generate(server, "slow", input_ids=[9], max_tokens=ENDLESS, time_limit=6 * STEP)
    assert (status, late["error"]) == (400, "The request took longer than its time limit.")
    assert generate(server, "slow", input_ids=[10], max_tokens=4)[1]["token_ids"] == model.generate([[10]], 4)[0]


def test_requests_are_taken_in_the_form_of_tritons_openai_front_end(server, model):
    """Names, types and shapes as in `_create_trtllm_generate_request` of the server's python/openai, 2.63 to 2.71."""
    prompt = "Unless required by law"
    ids = encode_text(model.tokenizer, prompt)
    text = TextStream(model.tokenizer, ids)
    tokens = model.generate([ids], 20)[0]
    expected = "".join(map(text.add, tokens))

    def ask(stream: bool, **inputs: np.ndarray) -> list[Any]:
        connection = Connection(server)
        answers = connection.ask(
            "m_text",
            text_input=np.array([[prompt.encode()]], np.object_),
            stream=np.array([[stream]]),
            max_tokens=np.array([[20]], np.int32),
            top_p=np.array([[1.0]], np.float32),
            frequency_penalty=np.array([[0.0]], np.float32),
            presence_penalty=np.array([[0.0]], np.float32),
            return_num_input_tokens=np.array([[True]]),
            return_num_output_tokens=np.array([[True]]),
            **inputs,
        )
        found = list(answers)
        connection.close()
        return found

    def words(answers: list[Any]) -> str:
        # It takes a string as it is in memory, so there must be one.
        assert all(answer.as_numpy("text_output").size == 1 for answer in answers)
        return "".join(answer.as_numpy("text_output").item().decode() for answer in answers)

    greedy = {"temperature": np.array([[0.0]], np.float32)}
    (whole,) = ask(False, **greedy)
    pieces = ask(True, **greedy)
    assert words([whole]) == words(pieces) == expected
    for answers in ([whole], pieces):
        assert {int(answer.as_numpy("num_input_tokens").item()) for answer in answers} == {len(ids)}
        assert sum(int(answer.as_numpy("num_output_tokens").item()) for answer in answers) == len(tokens)
    stops = np.array([[b"\0", expected[8:11].encode()]], np.object_)
    assert words(ask(True, **greedy, stop_words=stops)) == expected[: expected.index(expected[8:11])]
    drawn = {"temperature": np.array([[1.0]], np.float32), "seed": np.array([[1 << 63]], np.uint64)}
    assert words(ask(False, **drawn)) == words(ask(True, **drawn)) != expected


def test_words_that_take_long_to_be_read_hold_up_nobody(server, deployed, tmp_path):
    reading, names = deployed / READING, [f"{LONG} {n}" for n in range(2)]
    reading.mkdir()
    with ThreadPoolExecutor(2) as pool:
        try:
            long = [pool.submit(generate, server, text_input=name, max_tokens=1) for name in names]
            wait_until(lambda: sorted(path.name for path in reading.iterdir()) == names)
            assert generate(server, input_ids=[9, 10], max_tokens=4)[0] == 200
            assert not any(answer.done() for answer in long)
        finally:
            reading.rename(tmp_path / READING)
        assert [answer.result()[0] for answer in long] == [200, 200]


def test_a_thousand_requests_over_http_and_grpc_are_right_counted_and_leave_nothing(server, model, rng):
    drawn = [rng.integers(8, 384, length).tolist() for length in rng.integers(1, 30, 24)]
    expected = {tuple(prompt): model.generate([prompt], 3)[0] for prompt in drawn}
    right = [prompt for prompt in drawn if NAN not in expected[tuple(prompt)]]
    before, failed = (server.counted(name, "m_text") for name in (SUCCESSES, FAILURES))
    held: list[int] = []

    def client(number: int) -> None:
        asked, connection = random.Random(number), Connection(server)
        address, port = server.http.split(":")
        http_client = http.client.HTTPConnection(address, int(port), timeout=60)
        for turn in range(126):
            prompt = asked.choice(right)
            if turn % 25 == 24:
                # One that fails, for each way in.
                with pytest.raises(InferenceServerException, match="not in the model's vocabulary"):
                    list(connection.tokens("m_text", [384], 3))
            elif turn % 2:
                body = json.dumps({"input_ids": prompt, "max_tokens": 3})
                http_client.request("POST", "/v2/models/m_text/generate", body)
                answer = json.loads(http_client.getresponse().read())
                assert np.atleast_1d(answer.get("token_ids")).tolist() == expected[tuple(prompt)], answer
            else:
                (tokens,) = connection.tokens("m_text", prompt, 3, stream=False)
                assert tokens == expected[tuple(prompt)]
            if number == 0 and turn in (30, 125):
                held.append(server.memory())
        http_client.close()
        connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    # The server's own metric has those that failed as well: a model that answers later is done with a request when it
    # has taken it.
    assert server.counted(SUCCESSES, "m_text") - before == 8 * 126
    assert server.counted(FAILURES, "m_text") - failed == 8 * 5
    # Of threads that come and go, of clients that are behind the first, and of the metrics; the caches of these
    # requests alone would be 60 MB.
    assert held[1] - held[0] < 30e6, held


def test_a_model_is_unloaded_under_load_and_loaded_again(server, model):
    expected, stop = model.generate([[9, 10]], 6)[0], threading.Event()
    # Of each client those of its requests, one after another.
    statuses: list[list[int]] = [[] for _ in range(8)]

    def client(told: list[int]) -> None:
        while not stop.is_set():
            status, answer = generate(server, input_ids=[9, 10], max_tokens=6)
            assert status != 200 or answer["token_ids"] == expected
            told.append(status)
            if status != 200:
                time.sleep(0.02)

    with ThreadPoolExecutor(8) as pool:
        try:
            clients = [pool.submit(client, told) for told in statuses]
            wait_until(lambda: all(statuses), lambda: statuses)
            assert post(server, "repository/models/m_text/unload")[0] == 200
            wait_until(lambda: generate(server, input_ids=[9])[0] != 200)
            refused = generate(server, input_ids=[9])[0]
            wait_until(lambda: any(refused in told for told in statuses), lambda: statuses)
            loaded = post(server, "repository/models/m_text/load")[0]
            # The second of two was sent when the model was there again.
            wanted = [len(told) + 2 for told in statuses]
            wait_until(lambda: all(len(told) >= n for told, n in zip(statuses, wanted, strict=True)), lambda: statuses)
        finally:
            stop.set()
        for one in clients:
            one.result()
    assert (refused >= 400, loaded) == (True, 200)
    # All were answered before and after; between the two they were told that there is no such model, unless their
    # connection shared one of the server's threads with the one that loads.
    assert all(told[0] == told[-1] == 200 and {*told} <= {200, refused} for told in statuses)


def test_an_encoders_words_are_read_and_its_steps_are_wired(server, deployed):
    """All of the repository is the server's own work but the encoder's back end."""
    model = Model(deployed / "models" / "encoder" / "1")
    texts = ["The License", "Unless required by applicable law or agreed to in writing, software"]
    expected = model.encode([encode_text(model.tokenizer, text) for text in texts])

    def ask(rows: list[list[str]]) -> tuple[int, Any]:
        given = {"name": "text_input", "shape": [len(rows), 1], "datatype": "BYTES", "data": rows}
        return post(server, "models/encoder_text/infer", inputs=[given])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [[[text] for text in texts], [[texts[0]]], [[texts[1]]]] * 8))
    for number, (status, answer) in enumerate(answers):
        assert status == 200, answer
        (output,) = answer["outputs"]
        rows = [expected, expected[:1], expected[1:]][number % 3]
        assert (output["name"], output["shape"]) == ("logits", list(rows.shape))
        assert np.allclose(output["data"], np.ravel(rows), atol=1e-5)
    failed = server.counted(FAILURES, "encoder_tokenizer")
    status, refused = ask([["word " * 1000]])
    assert (status, "tokens; the model takes 130" in refused["error"]) == (400, True), refused
    assert server.counted(FAILURES, "encoder_tokenizer") == failed + 1
    assert ask([[text] for text in texts])[0] == 200


def test_numpy_2_is_refused_where_the_server_would_die_of_it(deployed, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m_text").symlink_to(deployed / "models" / "m_text")
    assert np.__version__.startswith("2.")
    with (
        pytest.raises(RuntimeError, match="not ready"),
        running(tmp_path / "models", tmp_path / "log", Path(sys.prefix)),
    ):
        pass
    told = (tmp_path / "log").read_text()
    assert f"Triton 2.51.0 cannot exchange words with NumPy {np.__version__}: pip install 'numpy<2'" in told


def test_its_tokens_are_pytorchs(server, make_base, make_adapter):
    prompt = [9, 10, 11, 12]
    expected = pytorch_greedy(make_base("mistral"), make_adapter("mistral"), prompt, 30)
    found = generate(server, input_ids=prompt, max_tokens=30)[1]["token_ids"]
    assert found == expected[: len(found)] and len(found) > 1


def test_a_native_library_runs_the_op_there(server, model):
    name, library = "slow", build_library().path
    opened = [Path(f"/proc/{child.pid}/maps") for child in psutil.Process(server.process).children(recursive=True)]
    assert any(str(library) in maps.read_text() for maps in opened)
    prompt = [11, 12, 13]
    assert generate(server, name, input_ids=prompt, max_tokens=12)[1]["token_ids"] == model.generate([prompt], 12)[0]


def names_on_shelf(server: Addresses) -> tuple[int, list[str]]:
    status, answer = generate(server, "shelf", list_adapters=True)
    return status, np.atleast_1d(answer["adapters"]).tolist()


def test_its_clients_ask_for_the_adapters_that_there_are_and_for_one_of_them(server, deployed, shelf_answers):
    names = ["hydra", "lora", "moe", "small", "team"]
    assert names_on_shelf(server) == (200, names)

    def client(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, deployed.parent / "shelf" / "client.py", "--url", server.grpc, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    told = client("--list-adapters")
    assert told.stdout.split() == names, told.stderr
    told = client("--adapter", "lora", "--tokens", COUNT, "--ids", *SHELF_PROMPTS[3])
    assert told.stdout.split() == list(map(str, until_stop(shelf_answers["lora", tuple(SHELF_PROMPTS[3])])))
    script = ["sh", deployed.parent / "shelf" / "client.sh"]
    told = subprocess.run(script, env={**os.environ, "SERVER": server.http}, capture_output=True, text=True, timeout=60)
    *_, listed, by_adapter = [line for line in told.stdout.splitlines() if line.strip()]
    assert json.loads(listed)["adapters"] == names, told
    assert json.loads(by_adapter)["finish_reason"]


def test_eight_clients_each_get_their_adapters_tokens_and_an_unknown_name_is_an_error_of_its_own(server, shelf_answers):
    """Three slots in memory, five adapters, and some requests without one."""
    asked = [None if number % 9 == 8 else number % len(NAMES) for number in range(56)]

    def ask(i: int | None) -> tuple[int, Any]:
        return ask_shelf(server, 0, "nobody") if i is None else ask_shelf(server, i, NAMES[i])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, asked))
    for i, (status, answer) in zip(asked, answers, strict=True):
        if i is None:
            known = "There is no adapter 'nobody'; there are hydra, lora, moe, small, team."
            assert (status, answer["error"]) == (400, known)
        else:
            right = until_stop(shelf_answers[NAMES[i], tuple(SHELF_PROMPTS[i])])
            assert (status, np.atleast_1d(answer.get("token_ids")).tolist()) == (200, right), answer
    connection = Connection(server)
    given = {"input_ids": np.array([SHELF_PROMPTS[3]]), "max_tokens": np.array([[COUNT]], np.int32)}
    (answer,) = connection.ask("shelf_text", adapter=np.array([[b"lora"]], np.object_), **given)
    assert answer.as_numpy("token_ids")[0].tolist() == until_stop(shelf_answers["lora", tuple(SHELF_PROMPTS[3])])
    with pytest.raises(InferenceServerException, match="There is no adapter 'nobody'"):
        list(connection.ask("shelf_text", adapter=np.array([[b"nobody"]], np.object_), **given))
    connection.close()


def test_a_shelf_changes_under_load_and_a_text_at_work_keeps_its_adapter(
    server, deployed, shelf, shelf_adapters, shelf_answers
):
    """`adapters publish` while clients ask: each answer is the old adapter's or the new one's, and none fails."""
    out, prompts = deployed.parent / "shelf", {i: tuple(SHELF_PROMPTS[i]) for i in (0, 1)}
    (long,) = Model(shelf.folder).generate([SHELF_PROMPTS[0]], 100, adapters=["team"])
    assert len(long) > 60, "no text that lasts"
    # Of each request for the name that comes to stand for another adapter: its status, and whose tokens they are.
    told: list[tuple[int, str]] = []
    stop = threading.Event()
    old, new = (until_stop(shelf_answers["team", prompts[0]]), until_stop(shelf_answers["small", prompts[1]]))

    def client(number: int) -> None:
        while not stop.is_set():
            status, answer = ask_shelf(server, 3, "lora")
            assert (status, answer["token_ids"]) == (200, until_stop(shelf_answers["lora", (5, 6, 7)]))
            for i in prompts:
                status, answer = ask_shelf(server, i, "team")
                found = np.atleast_1d(answer.get("token_ids")).tolist()
                if i == 0 and found == old:
                    told.append((status, "old"))
                elif i == 1 and found == new:
                    told.append((status, "new"))
                else:
                    told.append((status, "other"))

    def answered_by(whose: str) -> bool:
        return (200, whose) in told

    with ThreadPoolExecutor(8) as pool:
        try:
            clients = [pool.submit(client, number) for number in range(8)]
            wait_until(lambda: answered_by("old"), lambda: told)
            connection = Connection(server)
            given = {"input_ids": np.array([SHELF_PROMPTS[0]]), "max_tokens": np.array([[100]], np.int32)}
            working = connection.ask(
                "shelf_text", adapter=np.array([[b"team"]], np.object_), stream=np.array([[True]]), **given
            )
            first = next(working).as_numpy("token_ids")[0].tolist()
            replace_adapter(shelf.folder, "team", shelf_adapters["small"])
            add_adapter(shelf.folder, "late", shelf_adapters["lora"])
            remove_adapter(shelf.folder, "moe")
            assert not answered_by("new")
            before = len(told)
            assert publish_shelf(read_bundle(shelf.folder), out) == ["hydra", "late", "lora", "small", "team"]
            wait_until(lambda: answered_by("new") and len(told) >= before + 40, lambda: told)
            rest = [token for answer in working for token in answer.as_numpy("token_ids")[0].tolist()]
            connection.close()
        finally:
            stop.set()
        for one in clients:
            one.result()
    assert first + rest == long, "it had begun with the old one"
    assert {status for status, _ in told} == {200}
    assert ask_shelf(server, 1, "team")[1]["token_ids"] == new
    assert ask_shelf(server, 3, "late")[1]["token_ids"] == until_stop(shelf_answers["lora", (5, 6, 7)])
    assert ask_shelf(server, 5, "moe")[0] == 400
    assert names_on_shelf(server) == (200, ["hydra", "late", "lora", "small", "team"])


def test_a_shelf_is_unloaded_and_loaded_again_and_a_damaged_adapter_fails_its_own_requests(
    server, deployed, shelf, shelf_answers
):
    """What was published is there; what is not whole keeps neither the model nor others from being used."""
    folder = deployed.parent / "shelf" / "models" / "shelf_text" / "1"
    assert post(server, "repository/models/shelf_text/unload")[0] == 200
    wait_until(lambda: ask_shelf(server, 0, None)[0] >= 400)
    damaged = folder / json.loads((folder / "deploy.json").read_text())["shelf"]["adapters"]["hydra"]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert post(server, "repository/models/shelf_text/load")[0] == 200
    with ThreadPoolExecutor(8) as pool:
        names = ["lora", "hydra"] * 8
        answers = list(pool.map(lambda name: ask_shelf(server, 3 if name == "lora" else 4, name), names))
    for name, (status, answer) in zip(names, answers, strict=True):
        if name == "lora":
            assert (status, answer["token_ids"]) == (200, until_stop(shelf_answers["lora", (5, 6, 7)]))
        else:
            assert (status, "its SHA-256 differs" in answer["error"]) == (400, True), answer
    for name in read_bundle(shelf.folder).manifest.shelf["adapters"]:
        remove_adapter(shelf.folder, name)
    assert publish_shelf(read_bundle(shelf.folder), deployed.parent / "shelf") == []
    assert names_on_shelf(server) == (200, [])
