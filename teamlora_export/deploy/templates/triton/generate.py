"""Words in, words out: a Triton model that asks the one beside it for a token at a time.

The KV cache is that model's state, which Triton keeps: each answer is a sequence of requests of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from opened import Failures, is_given, open_beside, refusal
from words import TextStream, encode_text

_DEFAULT_TOKENS = 64
# Where the cache is in place, a longer prompt is read in parts of so many tokens.
_PART = 512


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters, self._settings, self._tokenizer = open_beside(args)
        self._model, self._takes_positions = parameters["model"], parameters["takes_positions"] == "true"
        # Of a cache in place; 0: it grows.
        self._capacity = int(parameters["capacity"])
        self._failures = Failures(args["model_name"])

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Exception as error:
                self._failures.count("invalid" if is_given(error) else "failed")
                sender.send(refusal(error))
            finally:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        prompt = _given(request, "text_input", b"").decode()
        count = int(_given(request, "max_tokens", _DEFAULT_TOKENS))
        ids = self._settings.require_ids(encode_text(self._tokenizer, prompt))
        count = self._settings.room([ids], count)
        text = TextStream(self._tokenizer, ids)
        pieces = map(text.add, self._tokens(ids, count, sender))
        whole = not _given(request, "stream", False)
        for piece in ["".join(pieces)] if whole else pieces:
            answer = pb_utils.Tensor("text_output", np.array([piece.encode()], np.object_))
            sender.send(pb_utils.InferenceResponse(output_tensors=[answer]))

    def _tokens(self, ids: Sequence[int], count: int, sender: Any) -> Iterator[int]:
        """The answer, greedily, until a stop token or until nobody listens any more."""
        sequence = int.from_bytes(os.urandom(8), "little") | 1
        *parts, step = self._parts(ids)
        read, flags, ended = 0, pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, False
        try:
            for part in parts:
                _best(self._run(part, read, sequence, flags))
                read, flags = read + len(part), 0
            for left in reversed(range(count)):
                ended = left == 0
                if ended:
                    flags |= pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
                response = self._run(step, read, sequence, flags)
                # What a further request looks like, should there be no token to go on from.
                read, step, flags = read + len(step), step[-1:], 0
                token = _best(response)
                if token in self._settings.stops:
                    return
                if sender.is_cancelled():
                    self._failures.count("cancelled")
                    return
                yield token
                step = [token]
        finally:
            # A sequence that is not ended keeps its place, and its cache, until it has been idle for a while.
            if not ended:
                self._run(step[-1:], read, sequence, pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)

    def _parts(self, ids: Sequence[int]) -> list[list[int]]:
        length = _PART if self._capacity else len(ids)
        return [list(ids[start : start + length]) for start in range(0, len(ids), length)]

    def _run(self, step: list[int], read: int, sequence: int, flags: int) -> Any:
        """Read more tokens, after the `read` ones before them."""
        given = {"input_ids": step, "attention_mask": self._mask(read + len(step))}
        if self._takes_positions:
            given["position_ids"] = list(range(read, read + len(step)))
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor(name, np.array([values], np.int64)) for name, values in given.items()],
            correlation_id=sequence,
            flags=flags,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        return request.exec()

    def _mask(self, total: int) -> list[int]:
        if self._capacity:
            # Over all of the buffer, so that texts of any length share a batch.
            return [1] * total + [0] * (self._capacity - total)
        # The state that Triton starts with is a cache of one row, which is masked out.
        return [0] + [1] * total


def _best(response: Any) -> int:
    """The token that the model's answer holds most likely."""
    if response.has_error():
        raise pb_utils.TritonModelException(response.error().message())
    logits = pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()[0, -1]
    if np.isnan(logits).any():
        raise pb_utils.TritonModelException("The model's answer to this is no number (NaN).")
    return int(logits.argmax())


def _given(request: Any, name: str, default: Any) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().flatten()[0]
