"""Opens checkpoint files without ever running anything in them.

safetensors through its own library; `.bin` through `torch.load(weights_only=True)`, the only place of this package
that imports torch. Names are resolved inside the folder that was given and may not leave it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import open_file

SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def read_tensors(folder: Path) -> tuple[dict[str, np.ndarray], Path]:
    """All tensors of the adapter in `folder`, and the file they came from (safetensors wins over `.bin`).

    Raises:
        ExportError: there is no such file, or it is damaged or not a plain tensor file.
    """
    for name, reader in ((SAFETENSORS_NAME, _read_safetensors), (PICKLE_NAME, _read_pickle)):
        path = folder / name
        if path.exists():
            # Refuses what is no regular file, or lies elsewhere.
            open_file(path, folder).close()
            return reader(path), path
    raise ExportError(f"{folder}: neither {SAFETENSORS_NAME} nor {PICKLE_NAME} in it. Give the adapter's own folder.")


def read_pickled_tensors(path: Path) -> dict[str, Any]:
    """The tensors (`torch.Tensor`) of a `.bin` file by name, mapped, not read; nothing is unpickled.

    Raises:
        ExportError: it is damaged, holds anything but plain tensors by name, or one that is larger than the file.
    """
    import torch

    try:
        _refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises many kinds for damaged and for hostile files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"{path}: refused or unreadable ({reason:.300}). Only plain tensors are read, nothing is unpickled: "
            "copy it again, or save it as safetensors."
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise ExportError(f"{path}: does not hold tensors by name. Save the state dict itself.")
    raise_findings(str(path), [f"{name} {why}" for name, value in state.items() if (why := _why_not_plain(value))])
    return state


def common_dtype(arrays: Iterable[np.ndarray]) -> np.dtype:
    """The narrowest dtype that holds every number of all of `arrays`."""
    dtypes = {array.dtype for array in arrays}
    # bfloat16 and float16 have no common dtype to ml_dtypes; float32 holds both.
    return np.result_type(*(np.float32 if len(dtypes) > 1 and dtype == _BFLOAT16 else dtype for dtype in dtypes))


def to_numpy(tensor: Any) -> np.ndarray:
    """A plain tensor as an array of its dtype, bfloat16 included; shares memory where it can."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except MemoryError:
        raise
    except Exception as error:  # the library, and NumPy for types that it lacks, raise many kinds
        raise ExportError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated: copy it again."
        ) from None


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    return {name: to_numpy(value) for name, value in read_pickled_tensors(path).items()}


def _refuse_compressed(path: Path) -> None:
    """torch stores, and never compresses: a small file cannot fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")


def _why_not_plain(tensor: Any) -> str | None:
    import torch

    if tensor.is_nested or tensor.layout != torch.strided:
        return "is sparse or nested, expected a plain tensor"
    if tensor.is_quantized:
        return "is quantised, expected a plain tensor"
    if tensor.device.type != "cpu":
        return "holds no values (it was saved from a meta device)"
    if tensor.is_complex() or (tensor.is_floating_point() and tensor.element_size() == 1):
        return f"is {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16, bfloat16 or float64"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"is {list(tensor.shape)}, more values than the file has"
    return None
