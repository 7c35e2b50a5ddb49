"""A base model's weights, read from its safetensors files one tensor at a time, without torch.

Files are read, not mapped, so that a tensor that has been written no longer counts as memory in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from teamlora_export.adapter.check import BaseSignature
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import open_file
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
# Integers of the same size, and the bits of the exponent.
_EXPONENTS: dict[np.dtype, tuple[Any, Any]] = {
    np.dtype(np.float64): (np.uint64, np.uint64(0x7FF0 << 48)),
    np.dtype(np.float32): (np.uint32, np.uint32(0xFF << 23)),
    np.dtype(np.float16): (np.uint16, np.uint16(0x7C00)),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, np.uint16(0x7F80)),
}
_PIECE = 1 << 17
NOT_FLOAT = "weights are float32, float16, bfloat16 or float64 here. Give the model as it was before it was quantised"


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

    def shape(self, name: str) -> tuple[int, ...]:
        return self._extents[name].shape

    def read_rows(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some rows of a matrix, in the dtype that it is stored in; the others are not read.

        Raises:
            ExportError: the file ends before them.
        """
        extent = self._extents[name]
        width = math.prod(extent.shape[1:])
        offsets = [extent.offset + int(row) * width * extent.dtype.itemsize for row in rows]
        found = [np.fromfile(extent.path, extent.dtype, width, offset=offset) for offset in offsets]
        if any(row.size != width for row in found):
            raise ExportError(f"{extent.path}: ends before {name} does. It may be truncated: copy it again.")
        return np.stack(found)

    def read(self, name: str) -> np.ndarray:
        """The tensor in the dtype that it is stored in.

        Raises:
            ExportError: the file ends before it, or it holds a NaN or an infinite number.
        """
        extent = self._extents[name]
        count = math.prod(extent.shape)
        array = np.fromfile(extent.path, extent.dtype, count, offset=extent.offset)
        if array.size != count:
            raise ExportError(f"{extent.path}: ends before {name} does. It may be truncated: copy it again.")
        refuse_not_finite(name, array)
        return array.reshape(extent.shape)


def open_safetensors_weights(
    source: BaseSource, aliases: Mapping[str, Sequence[str]], signature: BaseSignature, needed: Collection[str]
) -> SafetensorsWeights | None:
    """The weights of `source` by the model's names, or None where they are not safetensors with such names.

    Args:
        aliases: every tensor of the model, with the names of all tensors that it is tied to (itself among them).
        signature: of the model: what its parameters' shapes must be, and what a checkpoint of the model without its
            head leaves out of each name.
        needed: the tensors that must be there.

    Raises:
        ExportError: a file is missing or damaged, or a tensor has another shape or is no floating-point number; all
            are listed.
    """
    extents = read_extents(source)
    keys = _match_names(aliases, extents, signature.body_prefix)
    if not extents or not keys.keys() >= set(needed):
        return None
    found = {name: extents[key] for name, key in keys.items()}
    raise_findings(f"The weights of {source.name}", _check_extents(found, signature))
    _check_ties(aliases, extents, source)
    return SafetensorsWeights(found)


def read_extents(source: BaseSource) -> dict[str, _Extent]:
    """Where each tensor of the safetensors files lies, by its name there; nothing where there are no such files.

    Raises:
        ExportError: a file is missing or damaged.
    """
    extents: dict[str, _Extent] = {}
    for path, names in _safetensors_files(source).items():
        found = _read_header(path, source.folder)
        if missing := set(names) - set(found):
            raise ExportError(f"{path}: lacks {min(missing)}, which its index says it holds.")
        extents |= found if not names else {name: found[name] for name in names}
    return extents


def lacking_names(source: BaseSource, aliases: Mapping[str, Sequence[str]], signature: BaseSignature) -> set[str]:
    """Parameters that the safetensors files certainly lack; none where they hold tensors that transformers may rename.

    Raises:
        ExportError: a file is missing or damaged.
    """
    extents = read_extents(source)
    keys = _match_names(aliases, extents, signature.body_prefix)
    renamed = any(is_weight(name, signature) for name in set(extents) - set(keys.values()))
    return set() if renamed or not extents else set(signature.parameters) - set(keys)


def missing_text(name: str) -> str:
    return f"{name} is missing, and nothing in config.json says where else it comes from"


def refuse_not_finite(name: str, array: np.ndarray) -> None:
    """Refuse a weight with a NaN or an infinite number: an exponent of ones only. Looks at it in pieces that stay in
    the processor's cache.

    Raises:
        ExportError: it has one.
    """
    if array.dtype not in _EXPONENTS:
        return
    kind, exponent = _EXPONENTS[array.dtype]
    bits: Any = array.reshape(-1).view(kind)
    scratch = np.empty(min(_PIECE, bits.size), kind)
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE]
        if np.bitwise_and(piece, exponent, out=scratch[: piece.size]).max() == exponent:
            raise ExportError(
                f"{name}: holds NaN or infinite numbers. The base's weights are damaged: copy them again."
            )


def is_weight(name: str, signature: BaseSignature) -> bool:
    """Whether a tensor of that name in a checkpoint is a weight (of this model, or renamed), not a table or mask."""
    prefix = f"{signature.body_prefix}."
    return name.endswith(".weight") or any(
        candidate in signature.parameters for candidate in (name, prefix + name, name.removeprefix(prefix))
    )


def _check_extents(found: Mapping[str, _Extent], signature: BaseSignature) -> list[str]:
    findings = []
    for name, shape in signature.parameters.items():
        extent = found.get(name)
        if extent is None:
            continue
        if extent.dtype not in _EXPONENTS:
            findings.append(f"{name} is {extent.dtype}: {NOT_FLOAT}")
        elif extent.shape != shape:
            findings.append(
                f"{name} is {list(extent.shape)}, the model's code expects {list(shape)}. "
                "Does config.json belong to these weights?"
            )
    return findings


def _check_ties(aliases: Mapping[str, Sequence[str]], extents: Mapping[str, _Extent], source: BaseSource) -> None:
    """Tensors that the configuration ties but that the files hold twice must be equal.

    Raises:
        ExportError: they differ.
    """
    for group in {tuple(names) for names in aliases.values() if len(names) > 1}:
        copies = [name for name in group if name in extents]
        contents = SafetensorsWeights({name: extents[name] for name in copies})
        for other in copies[1:]:
            if not np.array_equal(contents.read(copies[0]), contents.read(other)):
                raise ExportError(
                    f"{source.name}: {copies[0]} and {other} differ, but config.json ties them. "
                    "Set tie_word_embeddings to false there, or export the model that was trained."
                )


def _safetensors_files(source: BaseSource) -> dict[Path, list[str]]:
    """Files, with the tensors that an index expects in each; no names means all that is there."""
    if source.gguf_file is not None:
        return {}
    single = source.folder / "model.safetensors"
    if single.is_file():
        return {single: []}
    index = source.folder / "model.safetensors.index.json"
    if index.is_file():
        files: dict[Path, list[str]] = {}
        for name, file in read_weight_map(index).items():
            files.setdefault(source.folder / file, []).append(name)
        return files
    return {}


def _read_header(path: Path, folder: Path) -> dict[str, _Extent]:
    """Every tensor of a safetensors file. The library checks the header against the file; offsets are its own."""
    try:
        with open_file(path, folder) as file, safe_open(path, framework="np"):
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        return {
            name: _Extent(path, 8 + size + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in header.items()
        }
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path}: not a readable safetensors file ({error}). It may be truncated: copy it again."
        ) from None
    except KeyError as error:
        raise ExportError(f"{path}: holds tensors of type {error}: {NOT_FLOAT}.") from None


def _match_names(aliases: Mapping[str, Sequence[str]], keys: Mapping[str, object], body_prefix: str) -> dict[str, str]:
    """Model name -> checkpoint key, of those that have one."""
    prefix = f"{body_prefix}." if body_prefix else ""
    matched = {}
    for name, names in aliases.items():
        candidates = [c for n in (name, *names) for c in (n, prefix + n, n.removeprefix(prefix))]
        key = next((c for c in candidates if c in keys), None)
        if key is not None:
            matched[name] = key
    return matched
