"""Reads every file that comes from outside: the one place that decides what may be opened, and how much of it is read.

    open     inside the folder that was given, a regular file (no FIFO, no device), of a size that it can have
    decode   UTF-8; JSON of a depth that it can have
    check    against a dataclass: every field of its type

What fails is one `ExportError` that names the file. Nothing that is read here is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from teamlora_export.errors import ExportError

# The largest index of shards that is known has some 20 MB; configurations have a few kB.
LARGEST_JSON = 64 << 20
# Large vocabularies have some 60 MB; what training logged beside a model has more.
LARGEST_TEXT = 256 << 20
# Deeper than any configuration, and shallow enough for every walk over one.
_DEEPEST_JSON = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_CHUNK = 1 << 20
_T = TypeVar("_T")


def refuse_escape(path: Path, folder: Path) -> None:
    """Refuse a file that a link leads out of `folder` (Hugging Face's cache keeps blobs beside its snapshots)."""
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{path}: leads nowhere ({error}). Copy the file itself into the folder.") from None
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    blobs = _blobs(snapshots.parent) if snapshots is not None else root
    if not (real.is_relative_to(root) or real.is_relative_to(blobs)):
        raise ExportError(f"{path}: is a link to a file outside {folder}. Copy the file itself into the folder.")


def open_file(path: Path, folder: Path | None = None, largest: int | None = None) -> BufferedReader:
    """Open a regular file for reading.

    Args:
        folder: the folder that was given; a link may not lead out of it. Default: no folder was.
        largest: bytes that such a file has at most.

    Raises:
        FileNotFoundError: there is no such file.
        ExportError: it is something else than a file, is too large, leads out of `folder`, or may not be read.
    """
    if folder is not None:
        refuse_escape(path, folder)
    try:
        # Opening a FIFO would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error}).") from None
    found = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(found.st_mode):
        problem = "is not a regular file"
    elif largest is not None and found.st_size > largest:
        problem = f"has {found.st_size:,} bytes; such a file has {largest:,} at most"
    if problem is not None:
        os.close(descriptor)
        raise ExportError(f"{path}: {problem}.")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, folder: Path | None = None, largest: int | None = None) -> bytes:
    """The whole of a file; raises as `open_file` does."""
    with open_file(path, folder, largest) as file:
        return file.read()


def read_json(path: Path, advice: str, folder: Path | None = None, kind: type = dict) -> Any:
    """The JSON object (a dict) in a file, or what else `kind` says.

    Args:
        advice: what to do where it cannot be read: a sentence.
        folder: see `open_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ExportError: it cannot be read, or holds anything but one value of that kind, of reasonable size and depth, in
            UTF-8, each of its names once.
    """
    data = read_bytes(path, folder, LARGEST_JSON)
    try:
        fields = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_refuse_duplicates)
        if _SURROGATE.search(data):
            # An escape can name half of a character, which no other library takes.
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeError:
        raise ExportError(f"{path}: is not text in UTF-8. {advice}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read as JSON ({error}). {advice}") from None
    if not isinstance(fields, kind):
        found = _JSON_NAMES.get(type(fields), "a value")
        raise ExportError(f"{path}: holds {found}, expected {_JSON_NAMES[kind]}. {advice}")
    if _depth(fields) > _DEEPEST_JSON:
        raise ExportError(f"{path}: is nested more than {_DEEPEST_JSON} deep. {advice}")
    return fields


def read_record(
    path: Path, kind: type[_T], advice: str, folder: Path | None = None, newest: int | None = None, oldest: int = 1
) -> _T:
    """The JSON object in a file as the dataclass `kind`: fields that it does not have are passed over.

    Args:
        newest: the highest `format_version` that is known. Default: the file has none.
        oldest: the lowest that is read.

    Raises:
        FileNotFoundError: there is no such file.
        ExportError: as `read_json`; or a field is missing, of another type, or a newer or a much older tool wrote
            the file.
    """
    fields = read_json(path, advice, folder)
    version = fields.get("format_version")
    if newest is not None and not (type(version) is int and 1 <= version <= newest):
        if type(version) is int and version > newest:
            raise ExportError(
                f"{path}: has format version {version}, this tool reads up to {newest}. Upgrade teamlora-export."
            )
        raise ExportError(f"{path}: format_version is {version!r:.80}, expected 1 to {newest}. {advice}")
    if version is not None and newest is not None and version < oldest:
        raise ExportError(
            f"{path}: has format version {version}, of an older tool; this one reads from {oldest} on. "
            f"Remove {path.parent}, and make it again."
        )
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ExportError(f"{path}: {error}. {advice}") from None


def sha256_of(path: Path, folder: Path | None = None) -> str:
    """SHA-256 of a file's bytes, in hex.

    Args:
        folder: see `open_file`.

    Raises:
        FileNotFoundError: there is no such file.
        ExportError: it is something else than a file, leads out of `folder`, or may not be read.
    """
    with open_file(path, folder) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(path: Path, target: Path, folder: Path | None = None, largest: int | None = None) -> None:
    """Copy the bytes of a file, not what a link of that name is; raises as `open_file` does."""
    with open_file(path, folder, largest) as file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy, _CHUNK)


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file of ours, not a symbolic link to it, another name; a copy where that is on another file system, or on
    one without links."""
    try:
        os.link(os.path.realpath(path), target)
    except OSError:
        shutil.copyfile(path, target)


def _blobs(repository: Path) -> Path:
    """Where a repository in Hugging Face's cache keeps its files; in the user's own cache that may be a link."""
    blobs = repository / "blobs"
    if not blobs.is_symlink():
        return blobs
    from huggingface_hub.constants import HF_HUB_CACHE

    return blobs.resolve() if repository.parent == Path(HF_HUB_CACHE).resolve() else repository


_JSON_NAMES = {
    dict: "a JSON object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
}


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice!r:.80} twice")
    return fields


def _depth(value: Any) -> int:
    """Levels of lists and objects; stops where it is deeper than allowed."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST_JSON:
        level = [child for parent in level for child in _children(parent)]
        depth += 1
    return depth


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from (child for child in value.values() if isinstance(child, (dict, list)))
    elif isinstance(value, list):
        yield from (child for child in value if isinstance(child, (dict, list)))
