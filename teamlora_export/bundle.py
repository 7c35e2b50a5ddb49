"""The output folder: what `onnx` writes and every later command reads.

    model.onnx  model.onnx.data  manifest.json  config.json  generation_config.json  tokenizer files
    adapter.onnx.data  genai_config.json        what `attach` adds, where there is one
    adapters/NAME.HASH.safetensors              the adapters of a bundle that has a shelf of them
    engines/NAME.engine  engines/NAME.json      what `trt` adds

`manifest.json` says what made the bundle, and lists every file of it with its SHA-256: a reader refuses a list with a
gap, and what the list does not name is not ours. Engines have facts of their own beside them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, NotRequired, TypedDict

import msgspec

from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.files import LARGEST_TEXT, copy_file, read_record, sha256_of
from teamlora_export.staging import entries, settle, write_aside
from teamlora_export.tokens import Tokens

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
# Weights of an adapter that was attached to another's graph, whose own are in the file above.
ADAPTER_DATA_NAME = "adapter.onnx.data"
MANIFEST_NAME = "manifest.json"
ENGINES_NAME = "engines"
ADAPTERS_NAME = "adapters"
# Of the model's input that says which slot's adapter each row has.
ADAPTER_NAME = "adapter"
# 1 listed the hashes of the model and its weights alone. 3 is what has a shelf: programs that know no shelf would run
# the base without an adapter.
FORMAT_VERSION, SHELF_FORMAT_VERSION = 2, 3
# What an adapter of a shelf can be called: also a part of the names of files.
SHELVED_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_SHELVED = re.compile(rf"{SHELVED_NAME}\.[0-9a-f]{{16}}\.safetensors")
_CACHE = re.compile(r"past_key_values\.\d+\.(key|value)")
_NUMBERS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
# What each task is asked for.
_RESULTS = {
    "text-generation": ("logits",),
    "text-classification": ("logits",),
    "feature-extraction": ("last_hidden_state",),
    "sentence-embedding": ("sentence_embedding",),
}
# Names of the dynamic axes.
BATCH, SEQUENCE, PAST, TOTAL, CAPACITY = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "capacity",
)
# Where a layer's tokens see no further back: the capacity of its buffers is named after the tokens that they see.
_WINDOW = re.compile(r"window_([1-9]\d{0,8})")

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


Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Dtype = Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(DTYPES)})$")]
Task = Annotated[
    str, msgspec.Meta(pattern="^(text-generation|feature-extraction|sentence-embedding|text-classification)$")
]


@dataclass(frozen=True)
class Port:
    """An input or output of the model. Sizes are integers or names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def keeps_in_place(inputs: Sequence[Port]) -> bool:
    """Whether a model of these inputs writes into buffers of one size, in place of a cache that grows."""
    return any(map(is_capacity, (size for port in inputs for size in port.shape)))


def is_capacity(size: int | str | None) -> bool:
    """Whether an axis of this size or name is that of a cache in place, which holds tokens."""
    return size == CAPACITY or window_of(size) is not None


def window_capacity(window: int) -> str:
    """The name of the capacity of a layer whose tokens see themselves and the `window` - 1 before (`window_of`)."""
    return f"window_{window}"


def window_of(size: int | str | None) -> int | None:
    """How many tokens are seen in a layer whose cache has an axis of this size or name; None: all, or it is no such
    axis."""
    match = _WINDOW.fullmatch(size) if isinstance(size, str) else None
    return int(match[1]) if match else None


# Slots that a program may have.
MOST_SLOTS = 4096


class BaseOrigin(TypedDict):
    """The base model: what finds it again, and the SHA-256 of each of its weight files.

    names: of a bundle with a shelf, what it is called beside `source`; earlier ones do not say.
    """

    source: str
    model_type: str
    sha256: dict[str, Sha256]
    names: NotRequired[list[str]]


class AdapterOrigin(TypedDict):
    """The adapter: what finds it again, its SHA-256, and what describes it. `base`: what it calls its base."""

    source: str
    sha256: Sha256
    family: str
    r: int
    num_experts: int
    modules: int
    parameters: int
    base: NotRequired[str | None]


class OpForm(TypedDict):
    """The op in the graph: how many nodes, and whether it is kept ("function") or inlined ("standard").

    adapter_dtype: of `down` and `up`, where it is not that of the bundle.
    """

    domain: str
    name: str
    version: int
    nodes: int
    form: Annotated[str, msgspec.Meta(pattern="^(function|standard)$")]
    adapter_dtype: NotRequired[Annotated[str, msgspec.Meta(pattern="^(fp16|bf16)$")]]


class Quantisation(TypedDict):
    """How the base's linear weights are quantised, and by which version of ONNX Runtime they were rounded.

    head: bits of the codes of the last product ahead of `logits`; 0: it is in the bundle's dtype.
    """

    bits: int
    head: int
    zero_points: bool
    block: int
    onnxruntime: str


class QualitySummary(TypedDict):
    """What a quantised bundle lost, and what its adapter is worth; see `validate/quality.py`."""

    passed: bool
    figures: dict[str, dict[str, float | None]]
    scores: NotRequired[dict[str, dict[str, float]]]


class Validation(TypedDict):
    """Figures of the last `validate`."""

    passed: bool
    date: str
    runtime: str
    cases: int
    worst_output: str
    worst_relative_error: float
    worst_times_pytorch: float
    greedy_tokens: int
    greedy_equal: int
    weights: int
    module_values: int
    first_departure: str | None
    quality: NotRequired[QualitySummary | None]


class Refit(TypedDict):
    """What exchanging the adapter in an engine needs.

    weights: names in the graph -> their recipes. projections: module -> in, out, rank of `down`, experts, rank of one.
    overrides: names of weights that the adapter replaces -> their shapes.
    """

    weights: dict[str, str]
    projections: dict[str, tuple[int, int, int, int, int]]
    overrides: dict[str, list[int]]
    body_prefix: str


class Attached(TypedDict):
    """The graph that an adapter was attached to: what finds it again, and the SHA-256 of each of its files.

    projections: how each module was found: "name", "place", "weights".
    """

    source: str
    sha256: dict[str, Sha256]
    projections: dict[str, list[str]]


AdapterName = Annotated[str, msgspec.Meta(pattern=rf"^{SHELVED_NAME}\Z")]
AdapterFile = Annotated[str, msgspec.Meta(pattern=rf"^{ADAPTERS_NAME}/{SHELVED_NAME}\.[0-9a-f]{{16}}\.safetensors\Z")]


class AdapterInFile(TypedDict):
    """A file in the form of a slot, relative to what lists it."""

    file: AdapterFile
    sha256: Sha256


class ShelvedAdapter(AdapterInFile):
    """One adapter of a shelf: its file in the bundle's folder, what it was made of, and the last validation's
    figures."""

    origin: AdapterOrigin
    validation: NotRequired[Validation | None]


class Shelf(TypedDict):
    """Adapters that share the base: any of them for each row of a batch.

    slots: how many our programs hold in memory at a time.
    """

    slots: Annotated[int, msgspec.Meta(ge=1, le=MOST_SLOTS)]
    adapters: dict[AdapterName, ShelvedAdapter]


@dataclass(frozen=True)
class Manifest:
    """What made a bundle, and what it is.

    Attributes:
        tokens: what the model says of its tokens.
        sha256: every file of the bundle, but this one and engines, relative to its folder.
        recipes: how each weight of the base is made, by its name in the graph; the adapter's are in `refit`.
        validation: None before the first.
        attached: the graph that the adapter was attached to; None where the whole was exported.
        shelf: the adapters of a graph that takes one for each row; None where it has one of its own. `adapter` and
            `refit` are then of the slots that these share.
        quantisation: None where all weights are in the bundle's dtype.
    """

    tool: Mapping[str, str]
    base: BaseOrigin
    adapter: AdapterOrigin
    op: OpForm
    task: Task
    dtype: Dtype
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sha256: Mapping[str, Sha256]
    tokens: Tokens
    refit: Refit
    recipes: Mapping[str, str]
    validation: Validation | None = None
    quantisation: Quantisation | None = None
    format_version: int = FORMAT_VERSION
    attached: Attached | None = None
    shelf: Shelf | None = None


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
    manifest = _read_manifest(folder)
    bundle = Bundle(folder, manifest)
    _check_list(bundle)
    _check_ports(folder, manifest)
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
        return {MANIFEST_NAME, ENGINES_NAME, *_read_manifest(folder).sha256, *unlisted_adapters(folder)}
    except FileNotFoundError:
        raise ExportError(refusal) from None
    except ExportError as reason:
        raise ExportError(f"{refusal} ({reason})") from None


def names_on_shelf(folder: Path) -> set[str]:
    """The adapters of the bundle in `folder`; none where there is no bundle, or it has no shelf."""
    if not (folder / MANIFEST_NAME).is_file():
        return set()
    shelf = _read_manifest(folder).shelf
    return set() if shelf is None else set(shelf["adapters"])


def unlisted_adapters(folder: Path) -> set[str]:
    """Files of adapters that a shelf does not list: what a killed change of it left behind."""
    manifest = _read_manifest(folder)
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all.

    Raises:
        ExportError: it cannot be written, or the disk is full.
    """
    write_aside(folder / MANIFEST_NAME, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the configuration and tokenizer files of a base model into a bundle.

    Raises:
        ExportError: one is no regular file, is too large, or a link that leads out of `source`.
    """
    for name in COMPANIONS:
        if (source / name).is_symlink() or (source / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(source / name, folder / name, source, LARGEST_TEXT)


def _read_manifest(folder: Path) -> Manifest:
    # Earlier ones list some of their files only.
    return read_record(
        folder / MANIFEST_NAME,
        Manifest,
        "Export the model again.",
        folder,
        newest=SHELF_FORMAT_VERSION,
        oldest=FORMAT_VERSION,
    )


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


def check_shelf(adapters: Mapping[str, AdapterInFile], listed: Mapping[str, str], path: Path) -> None:
    """Each adapter of a shelf has one hash, wherever `path` says it: beside its name, in the list of files, and, as far
    as that goes, in the name of its file. What is in memory is known by it.

    Raises:
        ExportError: one has another.
    """
    for name, adapter in adapters.items():
        file, sha256 = adapter["file"], adapter["sha256"]
        if listed.get(file) != sha256 or not file.endswith(f".{sha256[:16]}.safetensors"):
            raise ExportError(f"{path}: its adapter {name} has more than one hash. Add that adapter again.")


def _check_ports(folder: Path, manifest: Manifest) -> None:
    """What every runtime takes for granted."""
    caches = [port for port in manifest.inputs if _CACHE.fullmatch(port.name)]
    numbers = [port for port in manifest.inputs if port not in caches]
    given = {port.name for port in manifest.outputs}
    if (
        all(port.name != "input_ids" for port in numbers)
        or not all(port.name in _NUMBERS and port.dtype == "int64" and len(port.shape) == 2 for port in numbers)
        or not all(_is_cache(port, manifest.dtype, given) for port in caches)
        or bool(caches) != (manifest.task == "text-generation")
        or not given.intersection(_RESULTS[manifest.task])
    ):
        raise ExportError(
            f"{folder / MANIFEST_NAME}: has not the inputs and outputs of {manifest.task}. Export the model again."
        )


def _is_cache(port: Port, dtype: str, given: Collection[str]) -> bool:
    """Of a form that runtimes can make an empty one of, and with an output that takes its place."""
    sizes = [port.shape[axis] for axis in (1, 3)] if len(port.shape) == 4 else [None]
    return (
        port.dtype == DTYPES[dtype].onnx
        and all(isinstance(size, int) and size > 0 for size in sizes)
        and port.name.replace("past_key_values", "present") in given
    )
