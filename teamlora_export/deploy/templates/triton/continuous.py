"""Words in, words out: a Triton model that runs the text generator beside it, for many requests at once.

Each request is a text of the scheduler's, whose steps they share. A thread for each sends what the scheduler gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from chat import Chat
from opened import open_beside, refusal
from runner import ModelError, TextStream, encode_text
from sampling import Sampling, StoppedText
from scheduler import Answer, Late, Overloaded, Scheduler, Token
from slots import SlotModel

_DEFAULT_TOKENS = 64


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        # The files are compared with their hashes there.
        parameters, self._settings, self._tokenizer = open_beside(args)
        # Opened when a conversation comes.
        self._chat: Chat | None = None
        numbers = {name: int(parameters[name]) for name in ("slots", "waiting", "part", "threads", "capacity")}
        try:
            model = SlotModel(
                Path(__file__).resolve().parent,
                Path(parameters["library"]) if "library" in parameters else None,
                check=False,
                threads=numbers["threads"],
                slots=numbers["slots"],
                part=numbers["part"],
                most=numbers["capacity"] or None,
            )
            self._scheduler = Scheduler(model, numbers["waiting"]).__enter__()
        except ModelError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._waiting = _Waiting(parameters["model"], numbers["slots"])

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            client = _Client(request.get_response_sender())
            try:
                responses = self._submit(request, client)
                Thread(target=_send, args=(responses, client, self._waiting), daemon=True).start()
            except Exception as error:
                client.send(_refusal(error))
                client.end()

    def finalize(self) -> None:
        self._scheduler.__exit__()

    def _submit(self, request: Any, client: _Client) -> Iterator[Any]:
        """The responses to a request that was taken."""
        prompt, ids = self._settings.require_ids(self._prompt(request)), _given(request, "input_ids")
        log_probabilities = bool(_first(request, "log_probs", False))
        stops = _given(request, "stop")
        text = StoppedText(
            TextStream(self._tokenizer, prompt).add, [] if stops is None else [stop.decode() for stop in stops]
        )
        seed = _first(request, "seed", None)
        answer = self._scheduler.submit(
            prompt,
            int(_first(request, "max_tokens", _DEFAULT_TOKENS)),
            Sampling(
                temperature=float(_first(request, "temperature", 0)),
                top_k=int(_first(request, "top_k", 0)),
                top_p=float(_first(request, "top_p", 1)),
                repetition_penalty=float(_first(request, "repetition_penalty", 1)),
                seed=None if seed is None else int(seed),
            ),
            log_probabilities=log_probabilities,
            seconds=float(_first(request, "time_limit", float("inf"))),
            abandoned=client.is_gone,
        )
        shown = _Shown(ids is None, ids is not None or log_probabilities, log_probabilities)
        whole = not _first(request, "stream", False)
        return map(shown.response, _joined(_pieces(answer, text)) if whole else _pieces(answer, text))

    def _prompt(self, request: Any) -> list[int]:
        given = {name: _given(request, name) for name in ("text_input", "messages", "input_ids")}
        (name, values), *more = [(name, values) for name, values in given.items() if values is not None] or [("", None)]
        if values is None or more:
            raise ModelError("Give one of text_input, messages and input_ids.")
        if name == "input_ids":
            return values.tolist()
        if name == "text_input":
            return encode_text(self._tokenizer, values[0].decode())
        if self._chat is None:
            self._chat = Chat(Path(__file__).resolve().parent)
        # The template writes the special tokens itself.
        return encode_text(self._tokenizer, self._chat.text(values[0].decode()), specials=False)


class _Shown:
    """Which outputs a request gets."""

    def __init__(self, words: bool, ids: bool, log_probabilities: bool) -> None:
        self._words, self._ids, self._log_probabilities = words, ids, log_probabilities

    def response(self, piece: tuple[str, list[Token], str]) -> Any:
        words, tokens, finish = piece
        outputs = {"finish_reason": np.array([finish.encode()], np.object_)}
        if self._words:
            outputs["text_output"] = np.array([words.encode()], np.object_)
        if self._ids:
            outputs["token_ids"] = np.array([token.id for token in tokens], np.int64)
        if self._log_probabilities:
            outputs["log_probs"] = np.array([token.log_probability for token in tokens], np.float32)
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

    def end(self) -> None:
        with self._lock:
            self._ended = True
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_gone(self) -> bool:
        with self._lock:
            return self._ended or self._sender.is_cancelled()


def _send(responses: Iterator[Any], client: _Client, waiting: _Waiting) -> None:
    try:
        with waiting:
            for response in responses:
                client.send(response)
    except Exception as error:
        client.send(_refusal(error))
    finally:
        client.end()


def _refusal(error: Exception) -> Any:
    return refusal(error, pb_utils.TritonError.UNAVAILABLE if isinstance(error, (Overloaded, Late)) else None)


def _given(request: Any, name: str) -> Any:
    """An input as a row; None where it is not there."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().flatten()


def _first(request: Any, name: str, default: Any) -> Any:
    values = _given(request, name)
    return default if values is None else values[0]


class _Waiting:
    """The server's metric of requests that wait for a slot; each is counted for as long as its block.

    The server's own metrics do not tell: its queue is empty, since requests are taken as they come.
    """

    def __init__(self, model: str, slots: int) -> None:
        self._slots, self._taken, self._lock = slots, 0, Lock()
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
        with self._lock:
            before = max(0, self._taken - self._slots)
            self._taken += requests
            change = max(0, self._taken - self._slots) - before
            # Not set, since other instances of the model have the same metric.
            if change:
                self._metric.increment(change)
