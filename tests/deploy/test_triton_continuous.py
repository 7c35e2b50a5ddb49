"""The model of `deploy triton` that batches continuously, in the tests' stand-in for the server."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import lose_device

sys.path.append(str(Path(__file__).parent))
from triton_server import LoadError, RequestError, Server, edit_config, rows, words
from waiting import wait_until

from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions


@pytest.fixture(scope="module")
def continuous(make_bundle, tmp_path_factory) -> Path:
    bundle = make_bundle("llama", cache="in-place")
    return deploy_triton(
        bundle, tmp_path_factory.mktemp("triton") / "out", TritonOptions(name="m", batch=3, capacity=100)
    )


def test_texts_of_a_cache_in_place_are_batched_continuously(continuous, make_bundle):
    server, model = Server(continuous / "models"), Model(make_bundle("llama", cache="in-place").folder, threads=1)
    assert list(server.models) == ["m_text"]
    drawn = np.random.default_rng(3)
    prompts = [drawn.integers(3, 384, length) for length in drawn.integers(1, 60, 60)]

    def ask(prompt: np.ndarray, **options: np.ndarray) -> list[dict[str, np.ndarray]]:
        given = {"input_ids": prompt.astype(np.int64), "max_tokens": np.array([8], np.int32), **options}
        return [{name: row[0] for name, row in answer.items()} for answer in server.stream("m_text", rows(given))]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer["token_ids"].tolist() for (answer,) in pool.map(ask, prompts)]
    assert answers == [model.generate([prompt.tolist()], 8)[0] for prompt in prompts]
    *pieces, last = ask(prompts[0], stream=np.array([True]), log_probs=np.array([True]))
    assert [piece["token_ids"].tolist() for piece in pieces] == [[token] for token in answers[0]]
    assert all(piece["log_probs"] < 0 for piece in pieces)
    assert (last["finish_reason"][0], last["token_ids"].size) == (b"length", 0)
    # The capacity bounds prompt and answer together.
    (full,) = ask(np.full(97, 5), max_tokens=np.array([50], np.int32))
    assert full["token_ids"].size <= 3
    server.models["m_text"].unload()


def test_texts_of_a_growing_cache_are_batched_continuously_where_that_is_asked_for(make_bundle, tmp_path):
    bundle = make_bundle("mistral")
    server = Server(
        deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", batch=3, batching="continuous")) / "models"
    )
    drawn, model = np.random.default_rng(3), Model(bundle.folder, threads=1)
    prompts = [drawn.integers(3, 384, length) for length in drawn.integers(1, 60, 20)]

    def ask(prompt: np.ndarray) -> list[int]:
        given = {"input_ids": prompt.astype(np.int64), "max_tokens": np.array([8], np.int32)}
        (answer,) = server.stream("m_text", rows(given))
        return answer["token_ids"][0].tolist()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    assert answers == [model.generate([prompt.tolist()], 8)[0] for prompt in prompts]
    server.models["m_text"].unload()


def test_a_request_that_cannot_be_batched_is_refused_in_words(continuous):
    server = Server(continuous / "models")
    ids = np.array([5, 6, 7], np.int64)
    for message, given in {
        "INVALID_ARG: Give one of text_input, messages and input_ids": {},
        "INVALID_ARG: Give one of": {"text_input": words("a"), "input_ids": ids},
        "INVALID_ARG: Token 384 is not in": {"input_ids": np.array([384])},
        "INVALID_ARG: Token -1 is not in": {"input_ids": np.array([-1])},
        f"INVALID_ARG: Token {1 << 40} is not in": {"input_ids": np.array([1 << 40])},
        "INVALID_ARG: 100 tokens; the model takes 100, its answer included": {"input_ids": np.full(100, 5)},
        "INVALID_ARG: 0 tokens: give at least 1": {"input_ids": ids, "max_tokens": np.array([0], np.int32)},
        "INVALID_ARG: temperature -1.0: give": {"input_ids": ids, "temperature": np.array([-1], np.float32)},
        "INVALID_ARG: temperature nan: give": {"input_ids": ids, "temperature": np.array([np.nan], np.float32)},
        "INVALID_ARG: stop: give 16 strings": {"input_ids": ids, "stop": words("")},
        "INVALID_ARG: .*invalid start byte": {"text_input": np.array([b"\xff"], np.object_)},
        "INVALID_ARG: messages: give JSON": {"messages": words("[]")},
        "INVALID_ARG: The model has no chat template": {"messages": words('[{"role": "user", "content": "a"}]')},
        "INVALID_ARG: A time limit of -1.0": {"input_ids": ids, "time_limit": np.array([-1], np.float32)},
        "UNAVAILABLE: The request took longer": {"input_ids": ids, "time_limit": np.array([1e-9], np.float32)},
    }.items():
        with pytest.raises(RequestError, match=message):
            list(server.stream("m_text", rows(given)))
    server.models["m_text"].unload()
    with pytest.raises(RequestError, match="UNAVAILABLE: The server is closing"):
        list(server.stream("m_text", rows({"input_ids": ids})))


def test_every_failure_is_counted_by_its_reason(continuous):
    server = Server(continuous / "models")
    ids = np.array([5, 6, 7], np.int64)
    list(server.stream("m_text", rows({"input_ids": ids})))
    assert not server.metrics["teamlora_requests_failed", "m_text", "invalid"]
    for reason, given in {
        "invalid": {"input_ids": np.array([384])},
        "late": {"input_ids": ids, "time_limit": np.array([1e-9], np.float32)},
    }.items():
        with pytest.raises(RequestError):
            list(server.stream("m_text", rows(given)))
        assert server.metrics["teamlora_requests_failed", "m_text", reason] == 1
    left = server.stream(
        "m_text", rows({"input_ids": ids, "max_tokens": np.array([90], np.int32), "stream": np.array([True])})
    )
    next(left)
    left.close()
    wait_until(lambda: server.metrics["teamlora_requests_failed", "m_text", "cancelled"])
    server.models["m_text"].unload()
    with pytest.raises(RequestError):
        list(server.stream("m_text", rows({"input_ids": ids})))
    assert server.metrics["teamlora_requests_failed", "m_text", "overloaded"] == 1


def test_a_server_whose_gpu_has_failed_ends_at_the_first_request_where_that_is_asked_for(
    continuous, monkeypatch, capfd
):
    told, given, parent = [], rows({"input_ids": np.array([5, 6, 7], np.int64)}), os.getppid()

    def kill(*told_of: int) -> None:
        told.append(told_of)
        if len(told) == 1:
            raise PermissionError("not yet")

    monkeypatch.setattr(os, "kill", kill)
    # What a thread cannot do is told by Python.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    for wish in ("", "end-server"):
        monkeypatch.setenv("TEAMLORA_WHEN_BROKEN", wish)
        server = Server(continuous / "models")
        model = server.models["m_text"].model
        assert model.is_ready()
        with monkeypatch.context() as patch:
            lose_device(patch)
            # Once, however many fail. Where it could not be told, it is by whoever asks next, be it for a model that is
            # ready; nobody else is told, who is the parent behind its end.
            for code, seen, count in (("INTERNAL", parent, 1), ("UNAVAILABLE", 1, 1), ("UNAVAILABLE", parent, 2)):
                patch.setattr(os, "getppid", lambda seen=seen: seen)
                if count == 2:
                    assert not model.is_ready()
                    assert len(told) == (2 if wish else 0)
                with pytest.raises(RequestError, match=f"{code}: The model cannot be run any more .*CUDA error 700"):
                    list(server.stream("m_text", given))
                assert told == ([(parent, signal.SIGTERM)] * count if wish else [])
            assert not model.is_ready()
        counted = [server.metrics["teamlora_requests_failed", "m_text", reason] for reason in ("failed", "overloaded")]
        assert counted == [3, 0]
        server.models["m_text"].unload()
    logged = capfd.readouterr().err
    assert (logged.count("the server is ended"), logged.count("What failed first: CUDA error 700")) == (1, 2)


def test_an_unknown_wish_for_a_broken_server_keeps_the_model_from_being_loaded(continuous, monkeypatch):
    monkeypatch.setenv("TEAMLORA_WHEN_BROKEN", "end_server")
    with pytest.raises(LoadError, match=r"^TEAMLORA_WHEN_BROKEN is 'end_server': give end-server, or leave it out\.$"):
        Server(continuous / "models")


def test_what_neither_thread_nor_tokenizer_can_do_fails_alone_and_makes_room(make_bundle, tmp_path, monkeypatch):
    bundle = make_bundle("llama", cache="in-place")
    server = Server(deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", batch=1, sequences=2)) / "models")
    model, given = server.models["m_text"].model, rows({"text_input": words("The License")})

    class Panic(BaseException):
        """As the package tokenizers raises where its own code fails."""

    def panic(_: object) -> str:
        raise Panic

    def refuse(**_: object) -> None:
        raise RuntimeError("can't start new thread")

    known = model._tokenizer
    for message, change in {
        "INTERNAL: can't start new thread": lambda: monkeypatch.setitem(model.execute.__globals__, "Thread", refuse),
        "INVALID_ARG: .* cannot be written by the tokenizer": lambda: setattr(
            model, "_tokenizer", SimpleNamespace(encode=known.encode, decode=panic)
        ),
    }.items():
        change()
        # More than there are places.
        for _ in range(3):
            with pytest.raises(RequestError, match=message):
                list(server.stream("m_text", given))
        monkeypatch.undo()
        model._tokenizer = known
        assert len(list(server.stream("m_text", given))) == 1
    server.models["m_text"].unload()


def test_the_configuration_bounds_the_time_of_every_request(make_bundle, tmp_path):
    models = deploy_triton(make_bundle("llama", cache="in-place"), tmp_path / "out", TritonOptions(name="m")) / "models"
    edit_config(models / "m_text", change=lambda c: setattr(c.parameters["time_limit"], "string_value", "1e-9"))
    server = Server(models)
    for own in ({}, {"time_limit": np.array([60], np.float32)}):
        with pytest.raises(RequestError, match="UNAVAILABLE: The request took longer than its time limit"):
            list(server.stream("m_text", rows({"input_ids": np.array([5, 6, 7]), **own})))
    server.models["m_text"].unload()


def test_a_package_that_the_server_lacks_is_named(continuous, make_bundle, tmp_path, monkeypatch):
    growing = deploy_triton(make_bundle("llama"), tmp_path / "out", TritonOptions(name="m"))
    for folder, package in ((continuous, "tokenizers"), (continuous, "onnxruntime"), (growing, "tokenizers")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(LoadError, match=f"no package {package}, .*: pip install {package}"):
            Server(folder / "models")
        monkeypatch.undo()


def test_numpy_2_is_refused_by_servers_that_do_not_take_it(continuous, monkeypatch):
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.51.0")
    with pytest.raises(LoadError, match=r"Triton 2\.51\.0 cannot exchange words with NumPy 2.*: pip install 'numpy<2'"):
        Server(continuous / "models")
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.52.0")
    Server(continuous / "models").models["m_text"].unload()


def test_a_refusal_that_no_utf8_can_hold_is_sent_all_the_same(make_bundle, tmp_path):
    out = deploy_triton(
        make_bundle("llama", cache="in-place"), tmp_path / "out", TritonOptions(name="m", check_files=False)
    )
    (out / "models" / "m_text" / "1" / "chat_template.jinja").write_text("{{ raise_exception(messages[0].role) }}")
    server = Server(out / "models")
    with pytest.raises(RequestError, match=r"INVALID_ARG: .*\(\\ud800\)"):
        list(server.stream("m_text", rows({"messages": words('[{"role": "\\ud800", "content": ""}]')})))
    server.models["m_text"].unload()


def test_a_model_whose_files_changed_or_that_lacks_a_library_is_not_loaded(make_bundle, tmp_path):
    bundle = make_bundle("llama", cache="in-place")
    deployed = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", library="/nowhere/libops.so"))
    with pytest.raises(LoadError, match=r"/nowhere/libops\.so: cannot be loaded as a library"):
        Server(deployed / "models")
    folder = deployed / "models" / "m_text" / "1"
    # It would be run.
    (folder / "chat_template.jinja").write_text("Another one.")
    with pytest.raises(LoadError, match=r"its list of hashes lacks chat_template\.jinja"):
        Server(deployed / "models")
    (folder / "chat_template.jinja").unlink()
    with (folder / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(LoadError, match=r"config\.json: is not the file that belongs here"):
        Server(deployed / "models")


def test_the_readme_counts_the_requests_that_the_scheduler_takes(make_bundle, tmp_path):
    """One waits at least, also where fewer are asked for than are written at a time."""
    bundle = make_bundle("llama", cache="in-place")
    out = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", batch=3, sequences=2))
    assert "\n4 requests are taken at a time" in (out / "README.md").read_text()
