"""Words in, words out: a Triton model that asks the one beside it for a token at a time.

The KV cache is that model's state, which Triton keeps: each answer is a sequence of requests of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from opened import open_beside
from runner import ModelError, TextStream

_DEFAULT_TOKENS = 64


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters, self._settings, self._tokenizer = open_beside(args)
        self._model, self._takes_positions = parameters["model"], parameters["takes_positions"] == "true"

    def execute(self, requests: Sequence[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except (ModelError, UnicodeError, pb_utils.TritonModelException) as error:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
            finally:
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        prompt = _given(request, "text_input", b"").decode()
        count = int(_given(request, "max_tokens", _DEFAULT_TOKENS))
        ids = self._tokenizer.encode(prompt).ids
        if not ids or count < 1:
            raise ModelError("Give a prompt, and max_tokens of at least 1.")
        self._settings.require_room(len(ids), count)
        text = TextStream(self._tokenizer)
        pieces = map(text.add, self._tokens(ids, count, sender))
        whole = not _given(request, "stream", False)
        for piece in ["".join(pieces)] if whole else pieces:
            answer = pb_utils.Tensor("text_output", np.array([piece.encode()], np.object_))
            sender.send(pb_utils.InferenceResponse(output_tensors=[answer]))

    def _tokens(self, ids: Sequence[int], count: int, sender: Any) -> Iterator[int]:
        """The answer, greedily, until a stop token or until nobody listens any more."""
        sequence = int.from_bytes(os.urandom(8), "little") | 1
        # The state that Triton starts with is a cache of one row, which is masked out.
        mask = [0] + [1] * len(ids)
        step, flags = list(ids), pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
        for left in reversed(range(count)):
            if left == 0:
                flags |= pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END
            token = self._next(step, mask, sequence, flags)
            step, mask, flags = [token], [*mask, 1], 0
            if token in self._settings.stops or sender.is_cancelled():
                if left > 0:
                    self._next(step, mask, sequence, pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)
                return
            yield token

    def _next(self, step: list[int], mask: list[int], sequence: int, flags: int) -> int:
        first = sum(mask) - len(step)
        given = {"input_ids": step, "attention_mask": mask}
        if self._takes_positions:
            given["position_ids"] = list(range(first, first + len(step)))
        request = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=["logits"],
            inputs=[pb_utils.Tensor(name, np.array([values], np.int64)) for name, values in given.items()],
            correlation_id=sequence,
            flags=flags,
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        return int(pb_utils.get_output_tensor_by_name(response, "logits").as_numpy()[0, -1].argmax())


def _given(request: Any, name: str, default: Any) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return default if tensor is None else tensor.as_numpy().flatten()[0]
