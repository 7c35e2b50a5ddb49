"""The output folder: what `onnx` writes and every later command reads.

    model.onnx  model.onnx.data  manifest.json  config.json  generation_config.json  tokenizer files
    adapter.onnx.data  genai_config.json        what `attach` adds, where there is one
    adapters/NAME.HASH.safetensors              the adapters of a bundle that has a shelf of them
    engines/NAME.engine  engines/NAME.json      what `trt` adds

`manifest.json` says what made the bundle, and lists every file of it with its SHA-256: a reader refuses a list with a
gap, and what the list does not name is not ours. Engines have facts of their own beside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from teamlora_export.errors import ExportError
from teamlora_export.files import LARGEST_TEXT, copy_file, sha256_of
from teamlora_export.manifest import ADAPTERS_NAME, MANIFEST_NAME, SHELVED_NAME, Manifest, check_shelf, read_manifest
from teamlora_export.ports import fits_task
from teamlora_export.staging import entries, settle

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
# Weights of an adapter that was attached to another's graph, whose own are in the file above.
ADAPTER_DATA_NAME = "adapter.onnx.data"
ENGINES_NAME = "engines"
_SHELVED = re.compile(rf"{SHELVED_NAME}\.[0-9a-f]{{16}}\.safetensors")
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

    @property
    def data_names(self) -> tuple[str, ...]:
        """The files with weights."""
        return (DATA_NAME,) if self.manifest.attached is None else (DATA_NAME, ADAPTER_DATA_NAME)


def read_bundle(folder: str | Path) -> Bundle:
    """Open the bundle in `folder`.

    Raises:
        ExportError: it is no bundle, its list of files has a gap, or another version of the tool wrote it.
    """
    folder = Path(folder)
    for place in (folder.parent, folder, folder / ADAPTERS_NAME):
        settle(place)
    if not (folder / MANIFEST_NAME).exists():
        raise ExportError(f"{folder}: is not a bundle (no {MANIFEST_NAME}). Make one with `teamlora-export onnx`.")
    manifest = read_manifest(folder)
    bundle = Bundle(folder, manifest)
    _check_list(bundle)
    if not fits_task(manifest.inputs, manifest.outputs, manifest.task, manifest.dtype):
        raise ExportError(
            f"{folder / MANIFEST_NAME}: has not the inputs and outputs of {manifest.task}. Export the model again."
        )
    return bundle


def check_files(bundle: Bundle) -> None:
    """Refuse a bundle that is not what was exported.

    Raises:
        ExportError: a file is missing, or its SHA-256 is not the manifest's.
    """
    for name, expected in bundle.manifest.sha256.items():
        if sha256_of(bundle.folder / name, bundle.folder) != expected:
            raise ExportError(
                f"{bundle.folder / name}: is not what was exported (its SHA-256 differs). Export the model again."
            )


def hash_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a manifest lists: the SHA-256 of each file in a bundle's folder, but of `known` ones, whose are given."""
    known = known or {}
    names = sorted(
        name for name in entries(folder) if name != MANIFEST_NAME and not name.startswith(f"{ENGINES_NAME}/")
    )
    return {name: known.get(name) or sha256_of(folder / name) for name in names}


def listed_files(folder: Path) -> set[str]:
    """What a bundle's folder holds that we wrote, engines excepted.

    Raises:
        ExportError: it is not a bundle.
    """
    settle(folder)
    refusal = f"{folder}: exists and is not a bundle; it is left as it is. Choose another -o."
    try:
        return {MANIFEST_NAME, ENGINES_NAME, *read_manifest(folder).sha256, *unlisted_adapters(folder)}
    except FileNotFoundError:
        raise ExportError(refusal) from None
    except ExportError as reason:
        raise ExportError(f"{refusal} ({reason})") from None


def names_on_shelf(folder: Path) -> set[str]:
    """The adapters of the bundle in `folder`; none where there is no bundle, or it has no shelf."""
    if not (folder / MANIFEST_NAME).is_file():
        return set()
    shelf = read_manifest(folder).shelf
    return set() if shelf is None else set(shelf["adapters"])


def unlisted_adapters(folder: Path) -> set[str]:
    """Files of adapters that a shelf does not list: what a killed change of it left behind."""
    manifest = read_manifest(folder)
    return set() if manifest.shelf is None else shelved_files(folder) - manifest.sha256.keys()


def shelved_files(folder: Path) -> set[str]:
    """Files in `folder` that have the names of shelved adapters, relative to it."""
    place = folder / ADAPTERS_NAME
    # Behind a link are another folder's.
    if place.is_symlink() or not place.is_dir():
        return set()
    return {f"{ADAPTERS_NAME}/{name}" for name in entries(place) if _SHELVED.fullmatch(name)}


def refuse_linked_adapters(folder: Path) -> None:
    """Refuse to change the adapters in `folder` where a link leads to another folder's.

    Raises:
        ExportError: it does.
    """
    place = folder / ADAPTERS_NAME
    if place.is_symlink():
        raise ExportError(
            f"{place}: is a link, and what is written there or removed would be another folder's. Put a folder with "
            "the files in its place."
        )


def refuse_shelf(bundle: Bundle, what: str) -> None:
    """Refuse a bundle with a shelf where only one adapter is known.

    Args:
        what: begins the sentence: "`trt` ...".
    """
    if bundle.manifest.shelf is not None:
        raise ExportError(
            f"{bundle.folder}: has a shelf of adapters, and {what} takes a bundle with one adapter of its own as yet. "
            "Export one with a single --adapter."
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the configuration and tokenizer files of a base model into a bundle.

    Raises:
        ExportError: one is no regular file, is too large, or a link that leads out of `source`.
    """
    for name in COMPANIONS:
        if (source / name).is_symlink() or (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(source / name, folder / name, source, LARGEST_TEXT)


def _check_list(bundle: Bundle) -> None:
    """Every file that somebody reads from a bundle is listed, and every file that is listed is there."""
    folder, listed = bundle.folder, bundle.manifest.sha256
    read = [name for name in COMPANIONS if (folder / name).exists()]
    shelf = bundle.manifest.shelf
    shelved = [adapter["file"] for adapter in shelf["adapters"].values()] if shelf is not None else []
    for name in (MODEL_NAME, *bundle.data_names, *shelved, *read):
        if name not in listed:
            raise ExportError(f"{folder / MANIFEST_NAME}: does not list {name}. Export the model again.")
    if shelf is not None:
        check_shelf(shelf["adapters"], listed, folder / MANIFEST_NAME)
    for name in listed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ExportError(f"{folder / MANIFEST_NAME}: lists {name!r:.80}, which is not in its folder.")
        if not (folder / name).is_file():
            raise ExportError(f"{folder}: {name:.80} is missing. Export the model again.")
