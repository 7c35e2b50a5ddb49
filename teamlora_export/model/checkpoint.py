"""A base model's weights, read from its files one tensor at a time, past PyTorch where the files allow it.

Most checkpoints are safetensors whose names are the model's own, give or take the name of its body. Where a
checkpoint needs
more than that (GGUF, `.bin`, names that transformers converts while loading), transformers loads it whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from teamlora_export.adapter.files import refuse_escape, sha256_of
from teamlora_export.errors import ExportError
from teamlora_export.model.base import BaseModel

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class SafetensorsWeights:
    """Tensors of one or several safetensors files, by the model's parameter names."""

    def __init__(self, files: Mapping[str, Path], keys: Mapping[str, str]) -> None:
        self._files = files
        self._keys = keys
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> np.ndarray:
        key = self._keys[name]
        path = self._files[key]
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path].get_tensor(key)


class LoadedWeights:
    """Tensors of a model that transformers has loaded."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._state = model.state_dict()

    def read(self, name: str) -> np.ndarray:
        tensor = self._state[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def open_weights(base: BaseModel, skeleton: torch.nn.Module) -> SafetensorsWeights | LoadedWeights:
    """The weights of `base` for every parameter of `skeleton`.

    Raises:
        ExportError: a file is missing or damaged.
    """
    files = _safetensors_files(base.folder) if base.gguf_file is None else {}
    keys = _match_names(_aliases(skeleton), files, getattr(skeleton, "base_model_prefix", ""))
    if keys is not None:
        return SafetensorsWeights(files, keys)
    return LoadedWeights(base.load(torch.float32))


def weights_sha256(base: BaseModel) -> dict[str, str]:
    """SHA-256 of each of the files that hold the weights of `base`, by file name."""
    if base.gguf_file is not None:
        paths: Iterable[Path] = [base.folder / base.gguf_file]
    else:
        paths = sorted(set(_safetensors_files(base.folder).values())) or sorted(base.folder.glob("*.bin"))
    return {path.name: sha256_of(path) for path in paths}


def _safetensors_files(folder: Path) -> dict[str, Path]:
    """Checkpoint key -> file, from the index or the single file; empty where there is neither."""
    index = folder / _INDEX
    if index.is_file():
        return _indexed_files(index, folder)
    single = folder / _SINGLE
    if not single.is_file():
        return {}
    refuse_escape(single, folder)
    return dict.fromkeys(_open_safetensors(single).keys(), single)


def _indexed_files(index: Path, folder: Path) -> dict[str, Path]:
    try:
        pairs = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{index}: not a readable index of shards ({error}).") from None
    files = {}
    for key, name in pairs.items():
        path = folder / str(name)
        if Path(str(name)).name != name:
            raise ExportError(f"{index}: names {name!r}, which is not a file of this folder.")
        if not path.is_file():
            raise ExportError(f"{index}: names {name}, which is missing. Download the checkpoint again.")
        files[key] = path
    for path in sorted(set(files.values())):
        refuse_escape(path, folder)
        missing = {key for key, file in files.items() if file == path} - set(_open_safetensors(path).keys())
        if missing:
            raise ExportError(f"{path}: lacks {min(missing)}, which {index.name} says it holds.")
    return files


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice} twice")
    return fields


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated: copy it again."
        ) from None


def _aliases(skeleton: torch.nn.Module) -> dict[str, list[str]]:
    """Every parameter and persistent buffer by name, with the names of all tensors that it is tied to."""
    groups: dict[int, list[str]] = {}
    tensors = skeleton.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: groups[id(tensor)] for name, tensor in tensors.items()}


def _match_names(
    aliases: Mapping[str, list[str]], files: Mapping[str, Path], body_prefix: str
) -> dict[str, str] | None:
    """Model name -> checkpoint key; None where some name has no counterpart."""
    prefix = f"{body_prefix}." if body_prefix else ""
    keys = {}
    for name, names in aliases.items():
        candidates = [c for n in names for c in (n, prefix + n, n.removeprefix(prefix))]
        key = next((c for c in candidates if c in files), None)
        if key is None:
            return None
        keys[name] = key
    return keys
