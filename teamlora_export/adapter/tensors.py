"""Opens checkpoint files without ever running anything in them.

safetensors through its own library; `.bin` through `torch.load(weights_only=True)`, the only place of this package
that imports torch. Names are resolved inside the folder that was given and may not leave it.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from teamlora_export.errors import ExportError
from teamlora_export.files import refuse_escape

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], Path]:
    """All tensors of the adapter in `folder`, and the file they came from (safetensors wins over `.bin`).

    Raises:
        ExportError: there is no such file, or it is damaged or not a plain tensor file.
    """
    for name, reader in ((SAFETENSORS_NAME, _read_safetensors), (PICKLE_NAME, _read_weights_only)):
        path = folder / name
        if path.is_file():
            refuse_escape(path, folder)
            return reader(path), path
    raise ExportError(f"{folder}: neither {SAFETENSORS_NAME} nor {PICKLE_NAME} in it. Give the adapter's own folder.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ExportError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated: copy it again."
        ) from None


def _read_weights_only(path: Path) -> dict[str, np.ndarray]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and for hostile files
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"{path}: refused or unreadable ({first_line}). Only plain tensors are read, nothing is unpickled: "
            f"copy it again, or save it as {SAFETENSORS_NAME}."
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ExportError(f"{path}: does not hold tensors by name. Save the adapter's state dict itself.")
    return {name: _to_numpy(value) for name, value in state.items()}


def _to_numpy(tensor) -> np.ndarray:  # type: ignore[no-untyped-def]
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
