"""Words in, words out: a Triton model that runs the text generator beside it, for many requests at once.

Each request is a text of the scheduler's, whose steps they share. A thread for each reads its words, and sends what the
scheduler gives; there are no more of them than requests that are taken at a time.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock, Semaphore, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from answers import Answer, Broken, Late, Overloaded, Token
from chat import Chat
from engine_session import open_session
from failure import ModelError
from opened import COUNTING, Failures, is_given, open_beside, refusal, told_when_loaded
from sampling import Sampling
from scheduler import Scheduler
from slots import open_slots
from words import StoppedText, TextStream, encode_prompt, encode_text

_DEFAULT_TOKENS = 64
# A variable of the server's environment, and its one value: the server ends when the model cannot be run any more.
_WHEN_BROKEN, _END_SERVER = "TEAMLORA_WHEN_BROKEN", "end-server"
# Inputs that are fields of `Sampling` as they are.
_SAMPLING = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}
# A request's inputs, each as a row.
Given = Mapping[str, np.ndarray]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        with told_when_loaded():
            # The process that has started this one, until it is told to end; 0: it is not to be.
            self._server = os.getppid() if _is_to_end_server() else 0
        # The files are compared with their hashes there, but for those of adapters.
        parameters, self._settings, self._tokenizer = open_beside(args)
        folder = Path(__file__).resolve().parent
        self._chat = Chat(folder)
        numbers = {name: int(parameters[name]) for name in ("slots", "waiting", "part", "threads", "capacity")}
        self._most_waiting = numbers["waiting"]
        self._places = Semaphore(numbers["slots"] + numbers["waiting"])
        self._longest = float(parameters["time_limit"]) or float("inf")
        with told_when_loaded():
            session = open_session(
                folder,
                Path(parameters["library"]) if "library" in parameters else None,
                check=False,
                threads=numbers["threads"],
                spinning=parameters["spinning"] == "true",
                device=f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu",
                check_adapters=parameters["check_files"] == "true",
            )
            self._adapters = session.adapters
            slots = open_slots(session, numbers["slots"], numbers["part"], numbers["capacity"] or None)
            # There is room for all that have a place; those that are late in a call that does not come back have none.
            self._scheduler = Scheduler(slots, numbers["slots"] + numbers["waiting"]).__enter__()
        self._waiting = _Waiting(parameters["model"], numbers["slots"])
        self._failures = Failures(parameters["model"])
        self._ending = Lock()

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            client = _Client(request.get_response_sender())
            if not self._places.acquire(blocking=False):
                self._end(client, Overloaded(f"{self._most_waiting} requests wait already. Try again later."))
                continue
            try:
                # A copy: Triton's own is there for as long as this call.
                given = {tensor.name(): tensor.as_numpy().flatten() for tensor in request.inputs()}
                Thread(target=self._answer, args=(given, client), daemon=True).start()
            except Exception as error:
                self._places.release()
                self._end(client, error)

    def is_ready(self) -> bool:
        """Servers from 26.04 on ask this for /v2/health/ready; no request is sent to a pod that is not."""
        if is_broken := bool(self._scheduler.broken):
            self._end_server()
        return not is_broken

    def finalize(self) -> None:
        self._scheduler.__exit__()
        self._chat.close()

    def _answer(self, given: Given, client: _Client) -> None:
        failure = None
        try:
            with self._waiting:
                for response in self._responses(given, client):
                    client.send(response)
        except Exception as error:
            failure = error
        # Before the client knows: it may ask again at once. A server that is to end still sends what it has taken.
        self._places.release()
        try:
            if self._scheduler.broken:
                self._end_server()
        finally:
            self._end(client, failure)

    def _end(self, client: _Client, failure: Exception | None) -> None:
        if failure is not None:
            busy = {Overloaded: "overloaded", Late: "late"}.get(type(failure))
            self._failures.count(busy or ("invalid" if is_given(failure) else "failed"))
        client.end(failure)

    def _end_server(self) -> None:
        """Where a supervisor starts it anew, as in a pod: a GPU that has failed does nothing more for this process. It
        is told once; whoever became this process's parent after its end is not."""
        with self._ending:
            if self._server and self._server == os.getppid():
                os.kill(self._server, signal.SIGTERM)
                self._server = 0
                told = f"{self._scheduler.broken} {_WHEN_BROKEN} is {_END_SERVER}: the server is ended."
                print(told, file=sys.stderr, flush=True)

    def _responses(self, given: Given, client: _Client) -> Iterator[Any]:
        if self._adapters is not None and _first(given, "list_adapters", False):
            names = np.array([[name.encode() for name in self._adapters.names]], np.object_)
            yield pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("adapters", names)])
            return
        shown, stops = _Shown(given), [*given.get("stop", ()), *given.get("stop_words", ())]
        prompt = self._settings.require_ids(self._prompt(given))
        text = StoppedText(TextStream(self._tokenizer, prompt).add, [stop.decode() for stop in stops])
        answer = self._scheduler.submit(
            prompt,
            int(_first(given, "max_tokens", _DEFAULT_TOKENS)),
            Sampling(**{name: kind(given[name][0]) for name, kind in _SAMPLING.items() if name in given}),
            log_probabilities=shown.log_probabilities,
            seconds=min(float(_first(given, "time_limit", self._longest)), self._longest),
            abandoned=client.is_gone,
            adapter=given["adapter"][0].decode() if "adapter" in given else None,
        )
        pieces = _pieces(answer, text)
        for piece in pieces if _first(given, "stream", False) else _joined(pieces):
            yield shown.response(piece, len(prompt))
        if answer.finish == "cancelled" and not text.stopped:
            self._failures.count("cancelled")

    def _prompt(self, given: Given) -> list[int]:
        names = [name for name in ("text_input", "messages", "input_ids") if name in given]
        if len(names) != 1:
            raise ModelError("Give one of text_input, messages and input_ids.")
        values = given[names[0]]
        if names == ["input_ids"]:
            return values.tolist()
        if names == ["text_input"]:
            return encode_prompt(self._tokenizer, values[0].decode())
        # The template writes the special tokens itself.
        return encode_text(self._tokenizer, self._chat.text(values[0].decode()), specials=False)


def _is_to_end_server() -> bool:
    """When the model cannot be run any more."""
    wish = os.environ.get(_WHEN_BROKEN, "")
    if wish not in ("", _END_SERVER):
        raise ModelError(f"{_WHEN_BROKEN} is {wish!r:.40}: give {_END_SERVER}, or leave it out.")
    return wish == _END_SERVER


class _Shown:
    """Which outputs a request gets."""

    def __init__(self, given: Given) -> None:
        self.log_probabilities = bool(_first(given, "log_probs", False))
        self._words, self._ids = "input_ids" not in given, "input_ids" in given or self.log_probabilities
        self._read, self._written = (
            bool(_first(given, f"return_num_{which}_tokens", False)) for which in ("input", "output")
        )

    def response(self, piece: tuple[str, list[Token], str], read: int) -> Any:
        """Args:
        read: tokens of the prompt.
        """
        words, tokens, finish = piece
        outputs = {"finish_reason": np.array([[finish.encode()]], np.object_)}
        if self._words:
            outputs["text_output"] = np.array([[words.encode()]], np.object_)
        if self._ids:
            outputs["token_ids"] = np.array([[token.id for token in tokens]], np.int64)
        if self.log_probabilities:
            outputs["log_probs"] = np.array([[token.log_probability for token in tokens]], np.float32)
        if self._read:
            outputs["num_input_tokens"] = np.array([[read]], np.int32)
        if self._written:
            outputs["num_output_tokens"] = np.array([[len(tokens)]], np.int32)
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, values) for name, values in outputs.items()]
        )


def _pieces(answer: Answer, text: StoppedText) -> Iterator[tuple[str, list[Token], str]]:
    """What each token adds: words, itself, nothing; at the end what was held back, and why it ended."""
    for token in answer:
        words = text.add(token.id)
        if text.stopped:
            answer.cancel()
            yield words, [token], "stop"
            return
        yield words, [token], ""
    yield text.rest(), [], answer.finish


def _joined(pieces: Iterator[tuple[str, list[Token], str]]) -> Iterator[tuple[str, list[Token], str]]:
    words, tokens, finish = zip(*pieces, strict=True)
    yield "".join(words), [token for some in tokens for token in some], finish[-1]


class _Client:
    """Who gets the responses to a request.

    Triton 2.51 dies where it is asked whether a request was cancelled after that request's end, so one waits for the
    other here.
    """

    def __init__(self, sender: Any) -> None:
        self._sender = sender
        self._lock = Lock()
        self._ended = False

    def send(self, response: Any) -> None:
        self._sender.send(response)

    def end(self, failure: Exception | None) -> None:
        """No more responses come; the last one says what failed."""
        with self._lock:
            self._ended = True
            last = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            if failure is None:
                self._sender.send(flags=last)
                return
            busy = isinstance(failure, (Broken, Overloaded, Late))
            self._sender.send(refusal(failure, pb_utils.TritonError.UNAVAILABLE if busy else None), flags=last)

    def is_gone(self) -> bool:
        with self._lock:
            return self._ended or self._sender.is_cancelled()


def _first(given: Given, name: str, default: Any) -> Any:
    return given[name][0] if name in given else default


class _Waiting:
    """The server's metric of requests that wait for a slot; each is counted for as long as its block.

    The server's own metrics do not tell: its queue is empty, since requests are taken as they come.
    """

    def __init__(self, model: str, slots: int) -> None:
        self._slots, self._taken = slots, 0
        # The server forgets a family that nobody holds.
        self._family = pb_utils.MetricFamily(
            name="teamlora_requests_waiting",
            description="Requests that wait for a slot",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self._metric = self._family.Metric(labels={"model": model})

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *_: object) -> None:
        self._add(-1)

    def _add(self, requests: int) -> None:
        with COUNTING:
            before = max(0, self._taken - self._slots)
            self._taken += requests
            change = max(0, self._taken - self._slots) - before
            # Not set, since other instances of the model have the same metric.
            if change:
                self._metric.increment(change)
