"""TensorRT or TensorRT-RTX, whichever the machine has: two packages with one interface.

| | tensorrt | rtx |
|---|---|---|
| builds | on the GPU that it builds for | anywhere, for the GPUs that are named |
| the op | our plugin, or its body inlined | its body inlined: it takes no plugins |
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from teamlora_export.engine.gpu import Gpu, find_gpu
from teamlora_export.errors import ExportError

RUNTIMES = ("auto", "tensorrt", "rtx")
_MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
_INSTALL = {"tensorrt": "pip install 'teamlora-export[tensorrt]'", "rtx": "pip install 'teamlora-export[rtx]'"}


@dataclass
class Messages:
    """What TensorRT logged: errors, kept for our own message, and warnings, each once."""

    errors: list[str] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)

    def notable_warnings(self) -> list[str]:
        """Without those that every graph with integer inputs causes."""
        return [message for message in self.warnings if "has Int64 binding" not in message]

    def reason(self) -> str:
        """The first error, which the others follow from."""
        return self.errors[0] if self.errors else "no reason was given"


@dataclass(frozen=True)
class TensorRT:
    """A TensorRT package.

    Attributes:
        name: "tensorrt" or "rtx".
        trt: the module.
        version: as the package gives it.
        gpu: the machine's, or None.
    """

    name: str
    trt: Any
    version: str
    gpu: Gpu | None

    @property
    def takes_plugins(self) -> bool:
        return self.name == "tensorrt"

    def logger(self, messages: Messages) -> Any:
        """A logger of this package that fills `messages`."""
        return _logger_class(self.trt)(messages)


def open_runtime(wanted: str, say: Callable[[str], None] = lambda _: None) -> TensorRT:
    """The package `wanted`; "auto" is TensorRT where it and a GPU are there, else TensorRT-RTX, and says which.

    Raises:
        ExportError: it is not installed, or needs a GPU that is not there.
    """
    if wanted not in RUNTIMES:
        raise ExportError(f"--runtime {wanted}: unknown. Use {', '.join(RUNTIMES)}.")
    gpu = find_gpu()
    name = wanted
    if wanted == "auto":
        name = "tensorrt" if gpu is not None and _installed("tensorrt") else "rtx"
        if not _installed(name):
            raise ExportError(
                f"Neither TensorRT (which needs a GPU to build) nor TensorRT-RTX is installed: {_INSTALL['tensorrt']}, "
                f"or {_INSTALL['rtx']}."
            )
    if not _installed(name):
        raise ExportError(f"{_MODULES[name]} is not installed: {_INSTALL[name]}")
    if name == "tensorrt" and gpu is None:
        raise ExportError("TensorRT builds engines on a GPU, and there is none here. --runtime rtx needs none.")
    try:
        module = importlib.import_module(_MODULES[name])
    except Exception as error:
        raise ExportError(
            f"{_MODULES[name]} cannot be imported ({error}). Install it again: {_INSTALL[name]}"
        ) from None
    runtime = TensorRT(name, module, module.__version__, gpu)
    if wanted == "auto":
        label = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}[name]
        say(f"Runtime: {label} {runtime.version}, {gpu.name if gpu else 'no GPU here'}")
    return runtime


def _installed(name: str) -> bool:
    return importlib.util.find_spec(_MODULES[name]) is not None


def _logger_class(trt: Any) -> type:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self, messages: Messages) -> None:
            trt.ILogger.__init__(self)
            self._messages = messages

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._messages.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self._messages.warnings.setdefault(message)

    return Logger
