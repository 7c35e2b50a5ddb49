"""What the Triton models that take words open when they are loaded: the tokenizer of the model beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from runner import ModelError, Settings, check_files, open_tokenizer, read_settings


def open_beside(args: dict[str, str]) -> tuple[dict[str, str], Settings, Any]:
    """The parameters in config.pbtxt, then settings and tokenizer of the model that they name."""
    parameters = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
    folder = Path(__file__).resolve().parents[2] / parameters["model"] / "1"
    try:
        # Once for all instances, since it reads every byte of the model.
        if parameters["check_files"] == "true" and args["model_instance_name"].endswith("_0"):
            check_files(folder)
        return parameters, read_settings(folder), open_tokenizer(folder)
    except ModelError as error:
        raise pb_utils.TritonModelException(str(error)) from None
