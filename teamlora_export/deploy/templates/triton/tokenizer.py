"""Words to tokens: the first step of the ensemble around a model that does not generate text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from opened import Failures, is_given, open_beside, refusal
from words import encode_text

# Rows are padded to a multiple, so that requests of about the same length can share a batch.
_MULTIPLE = 16


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        _, self._settings, self._tokenizer = open_beside(args)
        self._failures = Failures(args["model_name"])
        self._outputs = [output["name"] for output in json.loads(args["model_config"])["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        texts = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().flatten()
        try:
            rows = [self._settings.require_ids(encode_text(self._tokenizer, text.decode())) for text in texts]
            self._settings.require_room(rows)
        except Exception as error:
            self._failures.count("invalid" if is_given(error) else "failed")
            return refusal(error)
        width = -(-max(map(len, rows)) // _MULTIPLE) * _MULTIPLE
        if self._settings.most is not None:
            width = min(width, self._settings.most)
        given = {
            "input_ids": [[*row, *[self._settings.padding] * (width - len(row))] for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
            "token_type_ids": [[0] * width for _ in rows],
        }
        tensors = [pb_utils.Tensor(name, np.array(given[name], np.int64)) for name in self._outputs]
        return pb_utils.InferenceResponse(output_tensors=tensors)
