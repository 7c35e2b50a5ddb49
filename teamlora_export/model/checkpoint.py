"""A base model's weights, read from its safetensors files one tensor at a time, without torch.

Files are read, not mapped, so that a tensor that has been written no longer counts as memory in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from teamlora_export.errors import ExportError
from teamlora_export.files import refuse_escape
from teamlora_export.model.source import BaseSource, read_weight_map

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class _Extent:
    """Where a tensor lies in a file."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SafetensorsWeights:
    """Tensors of one or several safetensors files, by the model's parameter names."""

    def __init__(self, extents: Mapping[str, _Extent]) -> None:
        self._extents = extents

    def __contains__(self, name: str) -> bool:
        return name in self._extents

    def read(self, name: str) -> np.ndarray:
        extent = self._extents[name]
        count = math.prod(extent.shape)
        array = np.fromfile(extent.path, extent.dtype, count, offset=extent.offset)
        if array.size != count:
            raise ExportError(f"{extent.path}: ends before {name} does. It may be truncated: copy it again.")
        return array.reshape(extent.shape)


def open_safetensors_weights(
    source: BaseSource, aliases: Mapping[str, Sequence[str]], body_prefix: str
) -> SafetensorsWeights | None:
    """The weights of `source` by the model's names, or None where they are not safetensors with such names.

    Args:
        aliases: every tensor of the model, with the names of all tensors that it is tied to (itself among them).
        body_prefix: what a checkpoint of the model without its head leaves out of each name.

    Raises:
        ExportError: a file is missing or damaged.
    """
    files = _safetensors_files(source)
    extents: dict[str, _Extent] = {}
    for path, names in files.items():
        refuse_escape(path, source.folder)
        found = _read_header(path)
        if missing := set(names) - set(found):
            raise ExportError(f"{path}: lacks {min(missing)}, which its index says it holds.")
        extents |= found if not names else {name: found[name] for name in names}
    keys = _match_names(aliases, extents, body_prefix)
    return SafetensorsWeights({name: extents[key] for name, key in keys.items()}) if keys and extents else None


def _safetensors_files(source: BaseSource) -> dict[Path, list[str]]:
    """Files, with the tensors that an index expects in each; no names means all that is there."""
    if source.gguf_file is not None:
        return {}
    index = source.folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[Path, list[str]] = {}
        for name, file in read_weight_map(index).items():
            files.setdefault(source.folder / file, []).append(name)
        return files
    single = source.folder / "model.safetensors"
    return {single: []} if single.is_file() else {}


def _read_header(path: Path) -> dict[str, _Extent]:
    """Every tensor of a safetensors file. The library checks the header against the file; offsets are its own."""
    try:
        with safe_open(path, framework="np"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {
            name: _Extent(path, 8 + size + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (SafetensorError, OSError, ValueError) as error:
        raise ExportError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated: copy it again."
        ) from None
    except KeyError as error:
        raise ExportError(f"{path}: holds tensors of type {error}, which are not supported.") from None


def _match_names(
    aliases: Mapping[str, Sequence[str]], keys: Mapping[str, object], body_prefix: str
) -> dict[str, str] | None:
    """Model name -> checkpoint key; None where some name has no counterpart."""
    prefix = f"{body_prefix}." if body_prefix else ""
    matched = {}
    for name, names in aliases.items():
        candidates = [c for n in names for c in (n, prefix + n, n.removeprefix(prefix))]
        key = next((c for c in candidates if c in keys), None)
        if key is None:
            return None
        matched[name] = key
    return matched
