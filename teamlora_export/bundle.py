"""The output folder: what `onnx` writes and every later command reads.

    model.onnx  model.onnx.data  manifest.json  config.json  generation_config.json  tokenizer files
    engines/NAME.engine  engines/NAME.json      what `trt` adds

A bundle is staged beside its destination and moved there in one step, so that a killed export leaves the old bundle or
none. `manifest.json` says what made it; readers refuse a format that is newer than they know.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
MANIFEST_NAME = "manifest.json"
ENGINES_NAME = "engines"
FORMAT_VERSION = 1
# Names of the dynamic axes.
BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)

# What a runtime or a tokenizer needs beside the model.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)


@dataclass(frozen=True)
class Port:
    """An input or output of the model. Sizes are integers or names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Manifest:
    """What made a bundle, and what it is.

    Attributes:
        base, adapter: source, SHA-256 of the weights, and what describes them.
        op: domain, name, version, nodes (how many) and form ("function" or "standard").
        validation: figures of the last `validate`, None before the first.
        refit: what exchanging the adapter in an engine needs; None in bundles of older versions.
        recipes: how each of the other weights is made of the base, by name; None in bundles of older versions.
    """

    tool: Mapping[str, str]
    base: Mapping[str, Any]
    adapter: Mapping[str, Any]
    op: Mapping[str, Any]
    task: str
    dtype: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sha256: Mapping[str, str]
    validation: Mapping[str, Any] | None = None
    refit: Mapping[str, Any] | None = None
    recipes: Mapping[str, str] | None = None
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    folder: Path
    manifest: Manifest = field(repr=False)

    @property
    def model(self) -> Path:
        return self.folder / MODEL_NAME

    @property
    def data(self) -> Path:
        return self.folder / DATA_NAME


def read_bundle(folder: str | Path) -> Bundle:
    """Open the bundle in `folder`.

    Raises:
        ExportError: it is no bundle, it is incomplete, or a newer version of the tool wrote it.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ExportError(f"{folder}: is not a bundle (no {MANIFEST_NAME}). Make one with `teamlora-export onnx`.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
        if version > FORMAT_VERSION:
            raise ExportError(
                f"{path}: has format version {version}, this tool reads up to {FORMAT_VERSION}. Upgrade it."
            )
        for ports in ("inputs", "outputs"):
            fields[ports] = tuple(Port(p["name"], p["dtype"], tuple(p["shape"])) for p in fields[ports])
        manifest = Manifest(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: cannot be read ({error!r}). Export the model again.") from None
    for name in (MODEL_NAME, DATA_NAME):
        if not (folder / name).is_file():
            raise ExportError(f"{folder}: {name} is missing. Export the model again.")
    return Bundle(folder, manifest)


def check_files(bundle: Bundle) -> None:
    """Refuse a bundle whose model or weights are not those that were exported.

    Raises:
        ExportError: the SHA-256 of one differs from the manifest's.
    """
    for name, expected in bundle.manifest.sha256.items():
        if sha256_of(bundle.folder / name) != expected:
            raise ExportError(
                f"{bundle.folder / name}: is not what was exported (its SHA-256 differs). Export the model again."
            )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` aside, then move it into place."""
    staged = folder / f".{MANIFEST_NAME}.partial"
    staged.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
    os.replace(staged, folder / MANIFEST_NAME)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the configuration and tokenizer files of a base model into a bundle."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


@contextmanager
def staged(out: Path, marker: str = MANIFEST_NAME) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` when the block ends, and vanishes when it fails.

    Args:
        marker: the file that shows an existing `out` to be of the same kind, so that it may be replaced.

    Raises:
        ExportError: `out` is something else and not an empty folder, or the disk is full or read-only.
    """
    refuse_foreign(out, marker)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_debris(out)
        staging = out.parent / f".{out.name}.{os.getpid()}.partial"
        staging.mkdir()
    except OSError as error:
        raise ExportError(f"{out}: cannot be written ({error.strerror}). Choose another -o.") from None
    try:
        yield staging
        _move(staging, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(
                f"{out}: {error.strerror}; nothing was written. Free space, or choose another -o."
            ) from None
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes where they do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free. Choose another -o."
        )


def refuse_foreign(out: Path, marker: str = MANIFEST_NAME) -> None:
    """Refuse to replace anything but a folder with `marker` in it, or an empty one."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"{out}: exists and is not a folder. Choose another -o.")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        kind = "a bundle" if marker == MANIFEST_NAME else "a deployment"
        raise ExportError(f"{out}: exists and is not {kind}; it is left as it is. Choose another -o.")


def _move(staging: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(staging, out)
    except OSError:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_debris(out: Path) -> None:
    """What exports that were killed (and could not clean up) left beside `out`."""
    pattern = re.compile(rf"^\.{re.escape(out.name)}\.(\d+)\.(partial|old)$")
    for path in out.parent.iterdir():
        match = pattern.match(path.name)
        if match is None or _is_running(int(match[1])):
            continue
        if match[2] == "old" and not out.exists():
            os.replace(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
