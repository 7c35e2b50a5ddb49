"""What the Triton models that take words open when they are loaded: the tokenizer of the model beside them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from failure import ModelError
from model_folder import Settings, check_files, read_settings
from words import open_tokenizer

# Triton 2.51 dies where two threads change its metrics at the same time.
COUNTING = Lock()
# The release 24.11; see triton-inference-server/python_backend#384.
_FIRST_WITH_NUMPY_2 = (2, 52)


def open_beside(args: dict[str, str]) -> tuple[dict[str, str], Settings, Any]:
    """The parameters in config.pbtxt, then settings and tokenizer of the model that they name."""
    _require_numpy()
    parameters = {name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()}
    folder = Path(__file__).resolve().parents[2] / parameters["model"] / "1"
    with told_when_loaded():
        settings = read_settings(folder)
        # Once for all instances, since it reads every byte of the model.
        if parameters["check_files"] == "true" and args["model_instance_name"].endswith("_0"):
            check_files(folder, settings.own_hashes)
        return parameters, settings, open_tokenizer(folder, settings.cut)


def _require_numpy() -> None:
    """Older servers die at the first string that they exchange with NumPy 2. Their containers say which they are."""
    server = os.environ.get("TRITON_SERVER_VERSION", "")
    version = re.match(r"(\d+)\.(\d+)", server)
    if version and (int(version[1]), int(version[2])) < _FIRST_WITH_NUMPY_2 and not np.__version__.startswith("1."):
        raise pb_utils.TritonModelException(
            f"Triton {server} cannot exchange words with NumPy {np.__version__}: pip install 'numpy<2'"
        )


@contextmanager
def told_when_loaded() -> Iterator[None]:
    """What keeps a model from being loaded, in a sentence."""
    try:
        yield
    except ModelError as error:
        raise pb_utils.TritonModelException(str(error)) from None
    except ModuleNotFoundError as error:
        raise pb_utils.TritonModelException(
            f"The server's Python has no package {error.name}, which this model needs: pip install {error.name}"
        ) from None


class Failures:
    """The server's metric of requests that failed, by the reason: each of `REASONS` from the start.

    The server counts them as successes: to it, a Python model that has taken a request, or answers it in words, has
    not failed.
    """

    REASONS = ("invalid", "overloaded", "late", "cancelled", "failed")

    def __init__(self, model: str) -> None:
        # The server forgets a family that nobody holds.
        self._family = pb_utils.MetricFamily(
            name="teamlora_requests_failed",
            description="Requests that failed, or that nobody waited for",
            kind=pb_utils.MetricFamily.COUNTER,
        )
        self._metrics = {
            reason: self._family.Metric(labels={"model": model, "reason": reason}) for reason in self.REASONS
        }

    def count(self, reason: str) -> None:
        with COUNTING:
            self._metrics[reason].increment(1)


def is_given(error: Exception) -> bool:
    """Whether the fault is the request's."""
    return isinstance(error, (ModelError, UnicodeError))


def refusal(error: Exception, code: int | None = None) -> pb_utils.InferenceResponse:
    """The answer to a request that cannot be answered: whose fault it is, in a sentence."""
    if code is None:
        code = pb_utils.TritonError.INVALID_ARG if is_given(error) else pb_utils.TritonError.INTERNAL
    # JSON and templates may bring halves of characters, which the server cannot send.
    message = (str(error) or type(error).__name__).encode(errors="backslashreplace").decode()
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
