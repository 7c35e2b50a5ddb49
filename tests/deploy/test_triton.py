"""`deploy triton`: the repository read and driven by Triton's rules, and the clients over the wire."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ANSWER, GREEDY_TOKENS, PROMPT, PROMPTS, assert_names_no_place, poison_token, until_stop
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parent))
from triton_front import serve
from triton_server import LoadError, RequestError, Server, edit_config, words

from teamlora_export.bundle import Bundle
from teamlora_export.cli import app
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.triton import default_name, deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.deploy.words import TextStream, encode_text
from teamlora_export.engine.build import BuildOptions, build_engine
from teamlora_export.engine.profiles import make_profiles
from teamlora_export.errors import ExportError


def generate(server: Server, name: str, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Greedy tokens of sequences that run together, as the scheduler batches those that are equally long."""
    width = max(map(len, prompts))
    takes = {value.name for value in server.models[name].config.input}
    steps = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    # The first row is what a sequence's state starts with.
    masks = [[0] * (1 + width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for turn in range(count):
        requests = []
        for row, (step, mask) in enumerate(zip(steps, masks, strict=True)):
            positions = (np.cumsum(mask) - 1).clip(0)[-len(step) :]
            given = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
            tensors = {key: np.array([value], np.int64) for key, value in given.items() if key in takes}
            requests.append((tensors, row + 1, turn == 0, turn == count - 1))
        found = server.infer_together(name, requests)
        tokens = [int(answer["logits"][0, -1].argmax()) for answer in found]
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
        steps, masks = [[token] for token in tokens], [[*mask, 1] for mask in masks]
    return answers


@pytest.fixture(scope="module")
def deployed(smollm2, tmp_path_factory) -> Path:
    return deploy_triton(smollm2, tmp_path_factory.mktemp("triton") / "out", TritonOptions(name="smollm2"))


@pytest.fixture(scope="module")
def server(deployed) -> Server:
    return Server(deployed / "models")


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def numbers(line: str) -> list[float]:
    return [float(value) for value in line.split()]


def test_greedy_text_equals_pytorchs_with_the_cache_as_state(server, smollm2_greedy):
    prompts, answers = list(smollm2_greedy), list(smollm2_greedy.values())
    assert until_stop(generate(server, "smollm2", prompts[:1], GREEDY_TOKENS)[0]) == answers[0]
    together = generate(server, "smollm2", [*prompts, prompts[0]], GREEDY_TOKENS)
    assert [until_stop(row) for row in together] == [*answers, answers[0]]
    assert not server.models["smollm2"].states


def test_the_configuration_has_the_logits_that_the_graph_gives(server, smollm2, tmp_path):
    logits = next(value for value in server.models["smollm2"].config.output if value.name == "logits")
    assert list(logits.dims) == [1, 49152]
    every = Server(
        deploy_triton(smollm2, tmp_path / "all", TritonOptions(name="smollm2", text=False, logits="all")) / "models"
    )
    logits = next(value for value in every.models["smollm2"].config.output if value.name == "logits")
    assert list(logits.dims) == [-1, 49152]


@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_a_cache_in_place_is_one_buffer_and_texts_of_any_length_share_a_batch(model, make_bundle, tmp_path):
    bundle = make_bundle(model, cache="in-place")
    deployed = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", capacity=24, batching="sequence"))
    server = Server(deployed / "models")
    for state in server.models["m"].config.sequence_batching.state:
        assert state.use_same_buffer_for_input_output
        assert list(state.dims) == list(state.initial_state[0].dims) == [2, 24, 8]
    prompts, count = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15]], 9
    expected = [Model(bundle.folder).generate([prompt], count)[0] for prompt in prompts]

    def call(row: int, step: list[int], read: int, turn: int) -> tuple[dict[str, np.ndarray], int, bool, bool]:
        mask = [1] * (read + len(step)) + [0] * (24 - read - len(step))
        positions = list(range(read, read + len(step)))
        given = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
        return {k: np.array([v], np.int64) for k, v in given.items()}, row + 1, turn == 0, turn == count - 1

    # Prompts of different lengths are different shapes; the first one is read in parts.
    server.infer_together("m", [call(0, prompts[0][:5], 0, 0)])
    found = [server.infer_together("m", [call(0, prompts[0][5:], 5, 1)])[0]]
    found += [server.infer_together("m", [call(row, prompts[row], 0, 0)])[0] for row in (1, 2)]
    answers: list[list[int]] = [[int(answer["logits"][0, -1].argmax())] for answer in found]
    for turn in range(1, count):
        calls = [call(r, a[-1:], len(prompts[r]) + turn - 1, turn) for r, a in enumerate(answers)]
        for answer, logits in zip(answers, server.infer_together("m", calls), strict=True):
            answer.append(int(logits["logits"][0, -1].argmax()))
    assert [until_stop(row) for row in answers] == [until_stop(row) for row in expected]
    assert not server.models["m"].states


@pytest.mark.parametrize("start", [[], [2, 0, 8]])
def test_a_state_without_memory_to_start_with_fails_at_the_first_request(start, make_bundle, tmp_path):
    """As in the real server, which loads the model."""
    models = deploy_triton(make_bundle("llama"), tmp_path / "out", TritonOptions(name="m", text=False)) / "models"

    def change(config: pb.ModelConfig) -> None:
        state = config.sequence_batching.state[0]
        (state.initial_state[0].dims.__setitem__(slice(None), start)) if start else state.ClearField("initial_state")

    edit_config(models / "m", change=change)
    server = Server(models)
    with pytest.raises(RequestError, match="no memory to start with"):
        generate(server, "m", [[5, 6]], 2)


def test_how_texts_are_batched_follows_from_the_model_or_is_refused(make_bundle, tmp_path):
    in_place, growing = make_bundle("llama", cache="in-place"), make_bundle("llama")

    def models(number: int, bundle: Bundle, **options: object) -> set[str]:
        out = deploy_triton(bundle, tmp_path / str(number), TritonOptions(name="m", **options))
        return {path.name for path in (out / "models").iterdir()}

    assert models(0, in_place) == {"m_text"}
    assert models(1, in_place, batching="sequence") == models(2, growing) == {"m", "m_text"}
    assert models(3, in_place, text=False) == {"m"}
    assert models(4, in_place, gpu=True) == {"m_text"}
    assert "kind: KIND_GPU" in (tmp_path / "4" / "models" / "m_text" / "config.pbtxt").read_text()
    assert (
        'pip install "onnxruntime-gpu[cuda,cudnn]"' in (told := (tmp_path / "4" / "README.md").read_text())
        and "--gpus all" in told
    )
    assert models(5, growing, batching="continuous") == {"m_text"}
    for number, (message, bundle, options) in enumerate(
        (
            ("does not generate text", make_bundle("bert"), {}),
            ("no bfloat16", make_bundle("llama", dtype="bf16"), {"gpu": True}),
            ("no --no-text", in_place, {"text": False}),
            ("texts share the steps of an engine", growing, {"engine": "fp16"}),
            ("--batching continuously: unknown", in_place, {"batching": "continuously"}),
        )
    ):
        with pytest.raises(ExportError, match=message):
            models(10 + number, bundle, **{"batching": "continuous", **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "4", "5"]


def test_words_for_a_cache_in_place_are_read_in_parts_and_a_full_cache_is_refused(make_bundle, tmp_path):
    bundle = make_bundle("llama", cache="in-place")
    deployed = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", capacity=40, batching="sequence"))
    source = deployed / "models" / "m_text" / "1" / "model.py"
    source.write_text(source.read_text().replace("_PART = 512", "_PART = 5"))
    server = Server(deployed / "models")
    model = Model(bundle.folder)
    prompt = model.tokenizer.decode(list(range(40, 53)))
    ids = model.tokenizer.encode(prompt).ids
    assert 10 < len(ids) < 40
    (whole,) = server.stream("m_text", {"text_input": words(prompt), "max_tokens": np.array([999], np.int32)})
    answer = model.generate([ids], 40 - len(ids))[0]
    assert (
        whole["text_output"][0].decode() == model.tokenizer.decode([*ids, *answer])[len(model.tokenizer.decode(ids)) :]
    )
    long = words("a b c d e f g h " * 9)
    with pytest.raises(RequestError, match=r"INVALID_ARG: \d+ tokens; the model takes 40"):
        list(server.stream("m_text", {"text_input": long}))
    assert not server.models["m"].states
    with serve(server) as (http, grpc):
        told = run(sys.executable, deployed / "client.py", "--url", grpc, "--tokens", 6, "--ids", 5, 6, 7)
        assert [int(token) for token in told.stdout.split()] == model.generate([[5, 6, 7]], 6)[0], told.stderr
        refused = run(sys.executable, deployed / "client.py", "--url", grpc, "--ids", *["7"] * 40)
        assert (refused.returncode, "40 tokens; the model takes 40" in refused.stderr) == (2, True), refused.stderr
        curl = run("sh", deployed / "client.sh", SERVER=http)
        assert curl.returncode == 0, curl.stderr


def test_a_capacity_that_cannot_be_and_an_engine_with_a_cache_in_place_are_refused(make_bundle, tmp_path):
    in_place, growing = make_bundle("llama", cache="in-place"), make_bundle("llama")
    for message, bundle, options in (
        ("--capacity 8: .* keeps no cache in place", growing, {"capacity": 8}),
        ("--capacity 129: the model takes 128 tokens", in_place, {"capacity": 129}),
        ("Triton's TensorRT back end", in_place, {"engine": "fp16-tensorrt", "batching": "sequence"}),
    ):
        with pytest.raises(ExportError, match=message):
            deploy_triton(bundle, tmp_path / "out", TritonOptions(**options))
    assert not (tmp_path / "out").exists()


def test_words_are_answered_whole_or_as_a_stream(server, deployed, smollm2_greedy):
    tokenizer = Model(deployed / "models" / "smollm2" / "1").tokenizer
    for prompt, answer in zip(PROMPTS, smollm2_greedy.values(), strict=True):
        given = {"text_input": words(prompt), "max_tokens": np.array([GREEDY_TOKENS], np.int32)}
        (whole,) = server.stream("smollm2_text", given)
        assert whole["text_output"][0].decode() == tokenizer.decode(answer)
        pieces = list(server.stream("smollm2_text", {**given, "stream": np.array([True])}))
        assert len(pieces) >= len(answer) > 1
        assert "".join(piece["text_output"][0].decode() for piece in pieces) == tokenizer.decode(answer)
    # Stop tokens and the last token alike end the sequence.
    assert not server.models["smollm2"].states


def test_requests_that_cannot_be_are_refused_in_words(server):
    with pytest.raises(RequestError, match="INVALID_ARG: An empty prompt"):
        list(server.stream("smollm2_text", {"text_input": words("")}))
    with pytest.raises(RequestError, match=r"INVALID_ARG: .*invalid start byte"):
        list(server.stream("smollm2_text", {"text_input": np.array([b"\xff"], np.object_)}))
    with pytest.raises(RequestError, match="INVALID_ARG: 9000 tokens; the model takes 8192"):
        list(server.stream("smollm2_text", {"text_input": words(" a" * 9000)}))
    for count in (0, -3):
        given = {"text_input": words("a"), "max_tokens": np.array([count], np.int32)}
        with pytest.raises(RequestError, match=f"INVALID_ARG: {count} tokens: give at least 1"):
            list(server.stream("smollm2_text", given))
    with pytest.raises(RequestError, match="unexpected inference input"):
        list(server.stream("smollm2_text", {"prompt": words("a")}))
    ids = {name: np.ones((1, 1), np.int64) for name in ("input_ids", "attention_mask", "position_ids")}
    with pytest.raises(RequestError, match="START flag"):
        server.infer("smollm2", ids, sequence=77)


def test_its_clients_work_over_grpc_and_http(server, deployed, smollm2_greedy):
    ids, answer = next(iter(smollm2_greedy.items()))
    with serve(server) as (http, grpc):

        def client(*arguments: object) -> subprocess.CompletedProcess[str]:
            return run(sys.executable, deployed / "client.py", "--url", grpc, *arguments)

        told = client(PROMPT)
        assert told.stdout == f"{PROMPT}{ANSWER}\n", told.stderr
        found = client("--tokens", GREEDY_TOKENS, "--ids", *ids)
        assert [int(token) for token in found.stdout.split()] == answer, found.stderr
        assert not server.models["smollm2"].states, "the sequence was ended"
        for message, arguments in {
            "9000 tokens; the model takes 8192": (" a" * 9000,),
            "8192 tokens; the model takes 8192, its answer included": ("--ids", *["7"] * 8192),
            "'-3': give a whole number from 1": ("--tokens", -3, "word"),
            "'-1': give a whole number from 0 to 49151": ("--ids", -1),
            "'49152': give a whole number from 0 to 49151": ("--ids", 49152),
            "'1.5': give a whole number": ("--ids", 1.5),
            "not text in UTF-8": (os.fsdecode(b"\xff"),),
        }.items():
            refused = client(*arguments)
            assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
            assert "Traceback" not in refused.stderr
        assert not server.models["smollm2"].states
        curl = run("sh", deployed / "client.sh", SERVER=http)
        assert curl.returncode == 0, curl.stderr
        whole, *events = [line for line in curl.stdout.splitlines() if line]
        pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in events]
        assert json.loads(whole)["text_output"] == "".join(pieces) != ""
        assert server.cancelled_streams == 0


def test_texts_that_eight_threads_ask_for_at_once_are_those_of_the_runner(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    server = Server(deploy_triton(bundle, tmp_path / "out", TritonOptions(name="llama")) / "models")
    model, drawn = Model(bundle.folder, threads=1), np.random.default_rng(3)
    texts = ["".join(map(chr, drawn.integers(32, 127, drawn.integers(1, 40)))) for _ in range(400)]

    def ask(text: str) -> str:
        (answer,) = server.stream("llama_text", {"text_input": words(text), "max_tokens": np.array([4], np.int32)})
        return answer["text_output"][0].decode()

    def expect(text: str) -> str:
        ids = encode_text(model.tokenizer, text)
        stream = TextStream(model.tokenizer, ids)
        return "".join(map(stream.add, model.generate([ids], 4)[0]))

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, texts))
    assert not server.models["llama"].states
    assert together == list(map(expect, texts))


def test_a_nan_in_one_sequence_is_refused_and_reaches_no_other(make_bundle, tmp_path):
    deployed = deploy_triton(make_bundle("mistral"), tmp_path / "out", TritonOptions(name="m", check_files=False))
    poison_token(deployed / "models" / "m" / "1", 7)
    server = Server(deployed / "models")
    prompts = [[9, 10, 11], [12, 13, 14]]
    expected = generate(server, "m", prompts, 8)
    # In one batch with a sequence that has become NaN, and after it.
    assert generate(server, "m", [prompts[0], [9, 7, 11], prompts[1]], 8)[::2] == expected
    assert generate(server, "m", prompts, 8) == expected
    tokenizer = Model(deployed / "models" / "m" / "1", check=False).tokenizer
    asked = {"text_input": words(tokenizer.decode([9, 7]))}
    with pytest.raises(RequestError, match=r"INTERNAL: .*no number \(NaN\)"):
        list(server.stream("m_text", asked))
    assert not server.models["m"].states, "the sequence was ended"


@pytest.mark.parametrize("architecture", ["mistral", "opt", "gpt2"])
def test_a_cache_that_starts_with_a_masked_row_changes_nothing(architecture, make_bundle, tmp_path):
    bundle = make_bundle(architecture)
    server = Server(deploy_triton(bundle, tmp_path / "out", TritonOptions(name="model")) / "models")
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14]]
    stops = Model(bundle.folder).settings.stops
    expected = Model(bundle.folder).generate(prompts, 20)
    found = generate(server, "model", prompts, 20)
    for row, answer in zip(found, expected, strict=True):
        stop = next((i for i, token in enumerate(row) if token in stops), len(row))
        assert row[:stop] == answer


@pytest.mark.parametrize(("architecture", "output"), [("bert", "logits"), ("roberta", "last_hidden_state")])
def test_encoders_are_batched_and_warmed_up(architecture, output, make_bundle, tmp_path):
    bundle = make_bundle(architecture)
    deployed = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="encoder", batch=4))
    server = Server(deployed / "models")
    config = server.models["encoder"].config
    assert [sample.batch_size for sample in config.model_warmup] == [1, 4]
    assert config.HasField("dynamic_batching")
    inputs = {
        name: np.array([values], np.int64)
        for name, values in (("input_ids", [5, 6, 7]), ("attention_mask", [1, 1, 1]), ("token_type_ids", [0, 0, 0]))
        if name in {value.name for value in config.input}
    }
    expected = Model(bundle.folder).encode([[5, 6, 7]])
    for answer in server.infer_together("encoder", [(inputs, 0, False, False)] * 4):
        assert np.allclose(answer[output], expected, atol=1e-5)
    with serve(server) as (http, grpc):
        command = [sys.executable, deployed / "client.py", "--url", grpc, "--ids", "5", "6", "7"]
        found = subprocess.run(command, capture_output=True, text=True)
        assert np.allclose([float(value) for value in found.stdout.split()], np.ravel(expected), atol=1e-5), (
            found.stderr
        )
        refused = run(*command[:-3], *["7"] * 131)
        takes = {"bert": 130, "roberta": 128}[architecture]
        assert (refused.returncode, refused.stderr) == (2, f"Error: 131 tokens; the model takes {takes}.\n")
        curl = run("sh", deployed / "client.sh", SERVER=http)
        assert np.allclose(json.loads(curl.stdout)["outputs"][0]["data"], np.ravel(expected), atol=1e-5), curl.stderr


def test_an_ensemble_takes_words_and_gives_the_same_vectors(minilm, tmp_path):
    deployed = deploy_triton(minilm, tmp_path / "out", TritonOptions(name="minilm"))
    server = Server(deployed / "models")
    texts = ["A sentence.", "Another one, which is a little longer than the first."]
    model = Model(minilm.folder)
    expected = model.encode([model.tokenizer.encode(text).ids for text in texts])
    found = server.infer("minilm_text", {"text_input": words(*texts).reshape(2, 1)})
    assert np.allclose(found["sentence_embedding"], expected, atol=1e-5)
    limit = json.loads((minilm.folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    long = server.infer("minilm_text", {"text_input": words("A word " * 1000).reshape(1, 1)})
    cut = model.tokenizer.encode("A word " * 1000).ids
    assert len(cut) == limit
    assert np.allclose(long["sentence_embedding"], model.encode([cut]), atol=1e-5)
    with pytest.raises(RequestError, match=r"INVALID_ARG: .*invalid start byte"):
        server.infer("minilm_text", {"text_input": np.array([[b"\xff"]], np.object_)})
    with serve(server) as (http, grpc):
        told = run(sys.executable, deployed / "client.py", "--url", grpc, *texts)
        assert np.allclose([numbers(line) for line in told.stdout.splitlines()], expected, atol=1e-5), told.stderr
        curl = run("sh", deployed / "client.sh", SERVER=http)
        assert json.loads(curl.stdout)["outputs"][0]["shape"] == [2, 384], curl.stderr


def test_a_changed_file_keeps_the_model_from_loading_unless_the_check_is_left_out(deployed, tmp_path):
    models = Path(shutil.copytree(deployed / "models", tmp_path / "models"))
    with (models / "smollm2" / "1" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(LoadError, match=r"config\.json: is not the file that belongs here"):
        Server(models)
    edit_config(models / "smollm2_text", change=lambda c: setattr(c.parameters["check_files"], "string_value", "false"))
    Server(models)


def test_the_stand_in_refuses_what_the_server_would(deployed, tmp_path):
    faults: Mapping[str, object] = {
        "other inputs": lambda config: config.input.pop(),
        "has no": lambda config: setattr(config.input[0], "name", "ids"),
        "is tensor": lambda config: setattr(config.input[0], "data_type", pb.TYPE_INT32),
        "the configuration": lambda config: config.output[0].dims.append(1),
        "initial_state": lambda config: config.sequence_batching.state[0].initial_state[0].dims.append(1),
        "no state to write": lambda config: config.model_warmup.add(name="x", batch_size=1),
        "is of other": lambda config: setattr(config, "name", "other"),
    }
    for message, fault in faults.items():
        models = tmp_path / message.replace(" ", "_")
        shutil.copytree(deployed / "models", models, copy_function=os.link)
        path = models / "smollm2" / "config.pbtxt"
        content = path.read_text()
        path.unlink()
        path.write_text(content)
        edit_config(models / "smollm2", change=fault)
        with pytest.raises(LoadError, match=message):
            Server(models)


def test_an_engine_is_deployed_with_its_plugin_and_both_profiles(make_bundle, plugin, tmp_path):
    source = make_bundle("llama")
    bundle = Bundle(Path(shutil.copytree(source.folder, tmp_path / "bundle")), source.manifest)
    engine, _ = build_engine(bundle, BuildOptions(dtype="fp16", runtime="rtx", capabilities=("8.9",)), None)
    with pytest.raises(ExportError, match="TensorRT-RTX"):
        deploy_triton(bundle, tmp_path / "out", TritonOptions(engine="fp16-rtx"))
    # What TensorRT would have written: none can be built without a GPU, and Triton's part does not look inside.
    facts = json.loads(engine.with_suffix(".json").read_text())
    described = {name: getattr(plugin, name) for name in ("op", "op_version", "build", "sha256", "tensorrt")}
    engine.with_suffix(".json").write_text(
        json.dumps({**facts, "runtime": "tensorrt", "runtime_version": plugin.tensorrt, "plugin": described})
    )
    out = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="llama", engine="fp16-rtx", plugin=plugin.path))
    folder = out / "models" / "llama"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.backend, config.platform, config.max_batch_size) == ("tensorrt", "tensorrt_plan", 4)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert config.sequence_batching.state[0].data_type == config.output[0].data_type == pb.TYPE_FP16
    assert not (folder / "1" / "model.onnx").exists()
    files = json.loads((folder / "1" / "deploy.json").read_text())["files"]
    assert {"model.plan", "model.json", "plugins/libteamlora_tensorrt.so"} <= set(files)
    assert "plugins=/models/llama/1/plugins/libteamlora_tensorrt.so" in (out / "README.md").read_text()
    # A sequence's first request fits into the prefill profile, which begins with Triton's one row of cache.
    prefill, decode = make_profiles(bundle, None)
    first = {"input_ids": (1, 5), "attention_mask": (1, 6), "position_ids": (1, 5)}
    states = {state.input_name: (1, *state.initial_state[0].dims) for state in config.sequence_batching.state}
    assert prefill.refusal({**first, **states}) is None
    later = {"input_ids": (1, 1), "attention_mask": (1, 7), "position_ids": (1, 1)}
    assert decode.refusal({**later, **{name: (*shape[:2], 6, shape[3]) for name, shape in states.items()}}) is None
    with pytest.raises(ExportError, match="takes 4 at most"):
        deploy_triton(bundle, tmp_path / "more", TritonOptions(engine="fp16-rtx", plugin=plugin.path, batch=16))


def test_options_reach_the_configuration(make_bundle, tmp_path):
    bundle = make_bundle("llama")
    out = deploy_triton(
        bundle,
        tmp_path / "out",
        TritonOptions(name="m", library="/ops/libops.so", gpu=True, instances=3, batch=2, sequences=5),
    )
    config = text_format.Parse((out / "models" / "m" / "config.pbtxt").read_text(), pb.ModelConfig())
    assert list(config.model_operations.op_library_filename) == ["/ops/libops.so"]
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert (config.instance_group[0].count, config.max_batch_size) == (3, 2)
    assert config.sequence_batching.oldest.max_candidate_sequences == 5
    assert config.version_policy.latest.num_versions == 1
    with pytest.raises(ExportError, match="--name"):
        deploy_triton(bundle, tmp_path / "other", TritonOptions(name="../up"))
    with pytest.raises(ExportError, match="goes with an engine"):
        deploy_triton(bundle, tmp_path / "other", TritonOptions(plugin=Path("libteamlora_tensorrt.so")))
    with pytest.raises(ExportError, match="an engine takes --plugin"):
        deploy_triton(bundle, tmp_path / "other", TritonOptions(engine="fp16", library="libops.so"))
    with pytest.raises(ExportError, match="give the path at which the server will find"):
        deploy_triton(bundle, tmp_path / "other", TritonOptions(library="auto"))
    with pytest.raises(ExportError, match="has the op for a CPU, and --gpu"):
        deploy_triton(bundle, tmp_path / "other", TritonOptions(library="/ops/libteamlora_onnxruntime.so", gpu=True))
    with pytest.raises(ExportError, match="add --gpu"):
        deploy_triton(make_bundle("llama", "bf16"), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_missing_tritonclient_is_one_sentence_with_the_command_that_installs_it(make_bundle, tmp_path):
    (tmp_path / "tritonclient.py").write_text("raise ModuleNotFoundError('No module', name='tritonclient')")
    command = (sys.executable, "-m", "teamlora_export.cli", "deploy", "triton", make_bundle("llama").folder)
    done = run(*command, "-o", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "pip install 'teamlora-export[triton]'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_it_without_a_path_of_this_machine(make_bundle, tmp_path):
    bundle, out = make_bundle("llama"), tmp_path / "out"
    done = run(sys.executable, "-m", "teamlora_export.cli", "deploy", "triton", bundle.folder, "-o", out, "--no-text")
    assert done.returncode == 0, done.stderr
    name = default_name(bundle)
    assert [path.name for path in (out / "models").iterdir()] == [name]
    sources = (bundle.manifest.base["source"], bundle.manifest.adapter["source"])
    assert name == "-".join(Path(source).name for source in sources) != bundle.folder.name
    assert_names_no_place(out, bundle)
    assert f"{name}_text" not in (out / "README.md").read_text()


@pytest.mark.parametrize("option", ["instances", "batch", "sequences", "capacity"])
def test_numbers_that_no_server_takes_are_refused(option, make_bundle, tmp_path):
    words = ["deploy", "triton", str(make_bundle("llama").folder), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, f"--{option}", "9" * 20])
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", " ").split())
    assert f"'--{option}': Input should be less than or equal to" in said
    assert not (tmp_path / "out").exists()
