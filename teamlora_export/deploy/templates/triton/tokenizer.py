"""Words to tokens: the first step of the ensemble around a model that does not generate text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from opened import open_beside
from runner import ModelError

# Rows are padded to a multiple, so that requests of about the same length can share a batch.
_MULTIPLE = 16


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        _, self._settings, self._tokenizer = open_beside(args)
        self._outputs = [output["name"] for output in json.loads(args["model_config"])["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        texts = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().flatten()
        try:
            rows = [self._tokenizer.encode(text.decode()).ids for text in texts]
            longest = max(map(len, rows))
            if min(map(len, rows)) == 0:
                raise ModelError("An empty text has nothing to encode.")
            self._settings.require_room(longest, 0)
        except (ModelError, UnicodeError) as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        width = -(-longest // _MULTIPLE) * _MULTIPLE
        if self._settings.positions:
            width = max(longest, min(width, self._settings.positions))
        given = {
            "input_ids": [[*row, *[self._settings.padding] * (width - len(row))] for row in rows],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows],
            "token_type_ids": [[0] * width for _ in rows],
        }
        tensors = [pb_utils.Tensor(name, np.array(given[name], np.int64)) for name in self._outputs]
        return pb_utils.InferenceResponse(output_tensors=tensors)
