"""The native op for ONNX Runtime in a deployment: a copy beside the model, hashed as the model's own files are."""

from __future__ import annotations

from pathlib import Path

from teamlora_export.deploy.folder import Deployment
from teamlora_export.engine.onnxruntime_library import LIBRARY_NAME, find_library
from teamlora_export.progress import Reporter


def add_library(made: Deployment, path: Path) -> str:
    """Add the library at `path`; its name there.

    Raises:
        ExportError: it is no library of ours, or does not fit the op, ONNX Runtime or the processor.
    """
    made.add(LIBRARY_NAME, find_library(path, Reporter()).path)
    return LIBRARY_NAME
