"""A model's folder as its programs read it: what describes it, its files' hashes, and the adapters on its shelf.

    settings = read_settings(folder)                deploy.json, or a bundle's manifest.json
    check_files(folder, settings.own_hashes)        every file of the model is the one that was written
    open_adapters(folder, settings, ...)            its shelf, which is looked at again whenever it has changed

Whatever runs the model begins here, as does what reads words alone. It needs numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import Adapters, open_regular
    from teamlora_export.deploy.failure import ModelError, brief
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import Adapters, open_regular
    from failure import ModelError, brief

# What describes a folder: which of its fields has the hashes, and the newest format that is known.
_DESCRIPTIONS = {"deploy.json": ("files", 2), "manifest.json": ("sha256", 3)}
# What is opened here or by a server, so that a list of hashes without one of them is not whole.
_OPENED = (
    *("model.onnx", "model.onnx.data", "adapter.onnx.data"),
    *("model.plan", "model.json", "plugins/libteamlora_tensorrt.so"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
# What adapters of a shelf are for.
_MODEL = ("model.onnx", "model.onnx.data", "model.plan")
_LARGEST_TEXT = 512 << 20
_MOST_SLOTS = 4096
# Of an adapter's hash, in the name of its file.
_NAMED_DIGITS = 16


@dataclass(frozen=True)
class Settings:
    """What describes the model.

    Attributes:
        hashes: SHA-256 of its files.
        vocabulary: ids are below it; None where that is not known. padding: the id that fills a row.
        stops: the ids that end a text.
        most: tokens that the model takes at most, prompt and answer together; None where there is no limit.
        cut: words are cut to so many tokens; None where a longer input is refused.
        padded: rows of one batch may have padding in front.
        shelf: the adapters that rows can have, with the file and the SHA-256 of each; None where the model has one of
            its own. slots: how many of them are to be in memory at a time.
    """

    hashes: Mapping[str, str]
    vocabulary: int | None
    padding: int
    stops: tuple[int, ...]
    most: int | None
    cut: int | None
    padded: bool = True
    shelf: Mapping[str, tuple[str, str]] | None = None
    slots: int = 0

    @property
    def own_hashes(self) -> dict[str, str]:
        """Of all files but those of a shelf's adapters. Each of these is looked at when it is needed: there may be
        many, and they come and go."""
        shelved = {file for file, _ in (self.shelf or {}).values()}
        return {name: sha for name, sha in self.hashes.items() if name not in shelved}

    def require_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids of one input, all of which must exist."""
        ids = list(ids)
        if not ids:
            raise ModelError("An empty prompt has nothing to go on from.")
        for id_ in ids:
            if not isinstance(id_, (int, np.integer)) or not 0 <= id_ < (self.vocabulary or 1 << 31):
                known = f"vocabulary of {self.vocabulary}" if self.vocabulary else "vocabulary"
                raise ModelError(f"Token {id_!r:.40} is not in the model's {known}.")
        return ids

    def require_room(self, inputs: Sequence[Sequence[int]]) -> None:
        """Refuse inputs that are longer than the model takes."""
        if not inputs:
            raise ModelError("There is no prompt.")
        longest = max(map(len, inputs))
        if self.most is not None and longest > self.most:
            raise ModelError(f"{longest} tokens; the model takes {self.most}.")

    def room(self, prompts: Sequence[Sequence[int]], count: int) -> int:
        """How many tokens can follow the prompts, `count` at most."""
        if count < 1:
            raise ModelError(f"{count} tokens: give at least 1.")
        self.require_room(prompts)
        longest = max(map(len, prompts))
        if longest == self.most:
            raise ModelError(f"{longest} tokens; the model takes {self.most}, its answer included.")
        return count if self.most is None else min(count, self.most - longest)


def open_adapters(
    folder: Path,
    settings: Settings,
    inputs: Mapping[str, tuple[tuple[int, ...], type]],
    check: bool,
    make: Callable[[tuple[int, ...], type], Any] = np.zeros,
    where: str = "cpu",
) -> Adapters:
    """The shelf of the model in a folder.

    Args:
        settings: of the folder, as the model was opened. inputs, check, make: see `Adapters`. where: it makes them.

    Raises:
        ModelError: there is not so much memory.
    """

    def listed() -> Mapping[str, tuple[str, str]]:
        now = read_settings(folder)
        if any(now.hashes.get(name) != settings.hashes.get(name) for name in _MODEL):
            raise ModelError(f"{folder}: holds another model by now, and adapters of that. Open it anew.")
        return now.shelf or {}

    stamp = _stamp_of(_description(folder))
    try:
        return Adapters(folder, inputs, settings.slots, listed, stamp, check, make)
    except Exception as error:
        needed = settings.slots * sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in inputs.values())
        raise ModelError(
            f"{folder}: no {needed >> 20} MiB of {where} memory for {settings.slots} adapters "
            f"({brief(error)}). Export it with fewer --slots."
        ) from None


def read_settings(folder: Path) -> Settings:
    """From the deploy.json in the model's folder, or from a bundle's manifest.json.

    Raises:
        ModelError: there is none, a newer tool wrote it, or a field is missing or of another type.
    """
    path = _description(folder)
    entry, newest = _DESCRIPTIONS[path.name]
    fields = read_json(path)
    version = fields.get("format_version")
    if type(version) is int and version > newest:
        raise ModelError(f"{path}: was written by a newer teamlora-export. Use that version's program.")
    hashes: Any = fields.get(entry)
    tokens: Any = fields.get("tokens")

    def fits(name: str, least: int) -> bool:
        return name in tokens and (tokens[name] is None or _is_whole(tokens[name], least))

    if not (
        _is_whole(version, 1)
        and isinstance(hashes, dict)
        and all(isinstance(value, str) for value in hashes.values())
        and isinstance(tokens, dict)
        and all(fits(name, 1) for name in ("vocabulary", "most", "cut"))
        and _is_whole(tokens.get("padding"), 0)
        and isinstance(tokens.get("stops"), list)
        and all(_is_whole(stop, 0) for stop in tokens["stops"])
    ):
        raise ModelError(f"{path}: format_version, {entry} or tokens are not as they should be. Copy it again.")
    shelf, slots = _read_shelf(path, fields.get("shelf"), hashes)
    return Settings(
        hashes,
        tokens["vocabulary"],
        tokens["padding"],
        tuple(tokens["stops"]),
        tokens["most"],
        tokens["cut"],
        tokens.get("padded") is not False,
        shelf,
        slots,
    )


def _description(folder: Path) -> Path:
    name = next((name for name in _DESCRIPTIONS if os.path.lexists(folder / name)), None)
    if name is None:
        raise ModelError(f"{folder}: holds neither deploy.json nor manifest.json. Is it a model's folder?")
    return folder / name


def _read_shelf(path: Path, shelf: Any, hashes: Mapping[str, str]) -> tuple[dict[str, tuple[str, str]] | None, int]:
    """The adapters that a description lists, and the slots that it asks for."""
    if shelf is None:
        return None, 0
    slots, adapters = (shelf.get(name) for name in ("slots", "adapters")) if isinstance(shelf, dict) else (None, None)
    if type(slots) is not int or not 1 <= slots <= _MOST_SLOTS or not isinstance(adapters, dict):
        raise ModelError(f"{path}: its shelf of adapters is not as it should be. Copy it again.")
    found = {}
    for name, fields in adapters.items():
        file = fields.get("file") if isinstance(fields, dict) else None
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts or file not in hashes:
            raise ModelError(f"{path}: its adapter {name!r:.80} is not as it should be. Copy it again.")
        sha256 = hashes[file]
        # What is in memory is known by its hash, also where nothing is compared with it.
        if sha256 != fields.get("sha256") or not file.endswith(f".{sha256[:_NAMED_DIGITS]}.safetensors"):
            raise ModelError(f"{path}: its adapter {name!r:.80} has more than one hash. Copy it again.")
        found[name] = (file, sha256)
    return found, slots


def _stamp_of(path: Path) -> Callable[[], object]:
    """What is another whenever another file has taken a file's place."""

    def stamp() -> object:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    return stamp


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 31


def check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare every file of the model with its hash.

    Raises:
        ModelError: the list of hashes is not whole, a file is missing, or it is another one.
    """
    listed = {"model.onnx", "model.onnx.data"} <= set(hashes) or any(_is_engine(name) for name in hashes)
    unlisted = [name for name in _OPENED if (folder / name).is_file() and name not in hashes]
    if not listed or unlisted:
        missing = unlisted[0] if unlisted else "the model"
        raise ModelError(f"{folder}: its list of hashes lacks {missing}. Copy the folder again.")
    for file, expected in hashes.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ModelError(f"{folder}: its list of hashes names {file!r:.80}, which is not in its folder.")
        if _sha256(folder / file) != expected:
            raise ModelError(
                f"{folder / file}: is not the file that belongs here (its SHA-256 differs). Copy it again."
            )


def _is_engine(name: str) -> bool:
    return name == "model.plan" or (name.startswith("engines/") and name.endswith(".engine"))


def _sha256(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). Copy the folder again.") from None


def read_bytes(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            # Python makes room for all that is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, _LARGEST_TEXT) + 1)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None
    if len(data) > _LARGEST_TEXT:
        raise ModelError(f"{path}: is larger than such a file can be.")
    return data


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({brief(error)}). Copy it again.") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: does not hold a JSON object. Copy it again.")
    return fields
