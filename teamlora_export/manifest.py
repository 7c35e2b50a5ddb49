"""`manifest.json`: what made a bundle, and what it is.

Each record has its fields, with their types and, of names and hashes, their form; what is of another, or of a newer
format, is refused when it is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import msgspec

from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.files import read_record
from teamlora_export.ports import TASKS, Port
from teamlora_export.staging import write_aside
from teamlora_export.tokens import Tokens

MANIFEST_NAME = "manifest.json"
ADAPTERS_NAME = "adapters"
# 1 listed the hashes of the model and its weights alone. 3 is what has a shelf: programs that know no shelf would run
# the base without an adapter.
FORMAT_VERSION, SHELF_FORMAT_VERSION = 2, 3
# What an adapter of a shelf can be called: also a part of the names of files.
SHELVED_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Slots that a program may have.
MOST_SLOTS = 4096

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Dtype = Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(DTYPES)})$")]
Task = Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(TASKS)})$")]


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


def read_manifest(folder: Path) -> Manifest:
    """Of the bundle in `folder`.

    Raises:
        ExportError: it is of another version of the tool, or not as it should be.
        FileNotFoundError: there is none.
    """
    # Earlier ones list some of their files only.
    return read_record(
        folder / MANIFEST_NAME,
        Manifest,
        "Export the model again.",
        folder,
        newest=SHELF_FORMAT_VERSION,
        oldest=FORMAT_VERSION,
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, whole or not at all.

    Raises:
        ExportError: it cannot be written, or the disk is full.
    """
    write_aside(folder / MANIFEST_NAME, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


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
