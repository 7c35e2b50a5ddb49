"""What the Triton models that take words open when they are loaded: the tokenizer of the model beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from session import ModelError, Settings, check_files, read_settings
from words import open_tokenizer


def open_beside(args: dict[str, str]) -> tuple[dict[str, str], Settings, Any]:
    """The parameters in config.pbtxt, then settings and tokenizer of the model that they name."""
    parameters = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
    folder = Path(__file__).resolve().parents[2] / parameters["model"] / "1"
    try:
        settings = read_settings(folder)
        # Once for all instances, since it reads every byte of the model.
        if parameters["check_files"] == "true" and args["model_instance_name"].endswith("_0"):
            check_files(folder, settings.hashes)
        return parameters, settings, open_tokenizer(folder, settings.cut)
    except ModelError as error:
        raise pb_utils.TritonModelException(str(error)) from None


def refusal(error: Exception, code: int | None = None) -> pb_utils.InferenceResponse:
    """The answer to a request that cannot be answered: whose fault it is, in a sentence."""
    if code is None:
        given = isinstance(error, (ModelError, UnicodeError))
        code = pb_utils.TritonError.INVALID_ARG if given else pb_utils.TritonError.INTERNAL
    # JSON and templates may bring halves of characters, which the server cannot send.
    message = (str(error) or type(error).__name__).encode(errors="backslashreplace").decode()
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
