"""Finds a base model's folder and names its files, without importing torch."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from teamlora_export.errors import ExportError
from teamlora_export.files import LARGEST_TEXT, open_file, read_json, sha256_of

CONFIG_NAME = "config.json"
_AGAIN = "Download the checkpoint again."
_CHUNK = 1 << 20
# What decides how sentences are pooled (sentence-transformers).
POOLING_FILES = ("modules.json", "1_Pooling/config.json")
# What transformers and tokenizers may open by themselves, given a folder; the text among it is of a size that text has.
# Of JSON and plain text that is what bears one of these words: notes and logs are the user's own.
_OPENED_TEXT = re.compile(
    "config|vocab|token|merges|template|index|processor|modules|added|special|dict|emoji|word_|byte_maps|normalizer|model"
)
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".spm", ".vocab", ".tiktoken", ".codes", ".tokenizer")
_READ_SUFFIXES = (*_TEXT_SUFFIXES, ".safetensors", ".bin", ".gguf")
_READ_FOLDERS = (".", "1_Pooling", "additional_chat_templates")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "*/config.json"]


@dataclass(frozen=True)
class BaseSource:
    """A base model on disk.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        gguf_file: the file inside `folder` that holds everything, where there is no config.json but a GGUF file.
    """

    name: str
    folder: Path
    gguf_file: str | None = None

    @property
    def origin(self) -> str:
        """What finds it again: its folder, or its name on the hub."""
        return str(self.folder.resolve()) if os.path.isdir(os.path.expanduser(self.name)) else self.name

    def weight_files(self) -> list[Path]:
        """The files that hold weights, by the names that transformers looks for, in its order of preference."""
        if self.gguf_file is not None:
            return [self.folder / self.gguf_file]
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            # An index beside the one file is left over from when there were shards.
            if (self.folder / f"{stem}.{suffix}").is_file():
                return [self.folder / f"{stem}.{suffix}"]
            index = self.folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                return sorted({self.folder / name for name in set(read_weight_map(index).values())})
        raise ExportError(f"{self.name}: holds no weights (model.safetensors, its shards, pytorch_model.bin or GGUF).")

    def identity(self) -> dict[str, str]:
        """SHA-256 of what a graph depends on: configuration and pooling, no weights."""
        names = (self.gguf_file,) if self.gguf_file else (CONFIG_NAME, *POOLING_FILES)
        return {name: sha256_of(self.folder / name) for name in names if (self.folder / name).is_file()}


def find_base(name: str) -> BaseSource:
    """The base model `name`, a local folder or a hub name.

    Raises:
        ExportError: it is not there, holds no configuration, or a file that leads out of it.
    """
    folder = _find_folder(name)
    _check_files(folder)
    gguf_files = sorted(folder.glob("*.gguf"))
    if (folder / CONFIG_NAME).is_file():
        return BaseSource(name, folder)
    if gguf_files:
        return BaseSource(name, folder, gguf_files[0].name)
    raise ExportError(f"{name}: no config.json in it. Give a folder that save_pretrained wrote, or a hub name.")


def _check_files(folder: Path) -> None:
    """Every file that may be opened is one of this folder, before others are given its name."""
    for inner in _READ_FOLDERS:
        if os.path.isdir(folder / inner):
            for path in sorted((folder / inner).iterdir()):
                inert = path.suffix in (".json", ".txt") and not _OPENED_TEXT.search(path.name)
                if path.suffix in _READ_SUFFIXES and not inert and os.path.exists(path) and not os.path.isdir(path):
                    open_file(path, folder, LARGEST_TEXT if path.suffix in _TEXT_SUFFIXES else None).close()


def weights_sha256(source: BaseSource) -> dict[str, str]:
    """SHA-256 of each of the files that hold the weights, by file name."""
    return {path.name: sha256_of(path) for path in source.weight_files()}


@contextmanager
def hashing_weights(source: BaseSource) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash the weight files in the background while the block runs.

    Yields a function that waits for the result, as `weights_sha256` gives it, and raises `ExportError` where a file
    changed since the block began. Hashing is given up where the block ends without asking.
    """
    before = weights_stamp(source)
    stop = threading.Event()

    def finish() -> dict[str, str]:
        hashes = {name: future.result() for name, future in futures.items()}
        if weights_stamp(source) != before:
            raise ExportError(f"{source.name}: its weight files changed while they were read. Export it again.")
        return hashes

    with ThreadPoolExecutor(1) as pool:
        futures = {path.name: pool.submit(_sha256_until, path, stop) for path in source.weight_files()}
        try:
            yield finish
        finally:
            stop.set()


def _sha256_until(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while not stop.is_set() and (chunk := file.read(_CHUNK)):
            digest.update(chunk)
    return digest.hexdigest()


def weights_stamp(source: BaseSource) -> dict[str, tuple[int, int]]:
    """Size and time of each weight file: cheap to compare before and after reading them."""
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in source.weight_files()}


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index of shards.

    Raises:
        ExportError: it is not a readable index, names a tensor twice, or a file that is missing or in another folder.
    """
    pairs = read_json(index, _AGAIN, index.parent).get("weight_map")
    if not isinstance(pairs, dict) or not all(isinstance(name, str) for name in pairs.values()):
        raise ExportError(f"{index}: has no weight_map of tensor names to file names. {_AGAIN}")
    for name in sorted(set(pairs.values())):
        if Path(name).name != name:
            raise ExportError(f"{index}: names {name!r:.80}, which is not a file of this folder.")
        if not os.path.isfile(index.parent / name):
            raise ExportError(f"{index}: names {name:.200}, which is missing. {_AGAIN}")
    return pairs


def _find_folder(name: str) -> Path:
    folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):
        return folder
    if not name or os.path.lexists(folder) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ExportError(
            f"{name or '(empty)'}: no such folder. Give a folder that save_pretrained wrote, or a hub name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{name}: neither a folder here nor a model that the hub gives ({reason:.300}).") from None
