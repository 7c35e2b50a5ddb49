"""What an engine is, beside it as JSON: an engine itself can only be read on the GPU that it was built for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

import msgspec

from teamlora_export.bundle import ENGINES_NAME, Bundle, read_bundle
from teamlora_export.engine.profiles import ShapeProfile, capacity_of
from teamlora_export.errors import ExportError
from teamlora_export.files import read_record, sha256_of
from teamlora_export.manifest import ADAPTERS_NAME, MANIFEST_NAME, AdapterName, Dtype, Sha256, Task, Validation
from teamlora_export.staging import require_space, settle, write_aside, write_together

# 2 is what takes adapters as inputs, which a program that knows none would leave unbound.
FORMAT_VERSION, SHELF_FORMAT_VERSION = 1, 2


class EnginePlugin(TypedDict):
    """The plugin that an engine was built with: its op, build, SHA-256, and the version of TensorRT's headers."""

    op: str
    op_version: int
    build: str
    sha256: Sha256
    tensorrt: str


class PluginTimes(TypedDict):
    """Seconds of a step of the last profile, with the plugin and with the op's body inlined."""

    plugin: float
    inlined: float


class JudgedAdapter(TypedDict):
    """The SHA-256 of an adapter's file when the engine was judged with it, and the figures."""

    sha256: Sha256
    validation: Validation


@dataclass(frozen=True)
class EngineFacts:
    """Facts of an engine.

    Attributes:
        runtime, runtime_version: "tensorrt" or "rtx", and the package's version: an engine runs with no other.
        targets: the GPUs or compute capabilities that it was built for.
        dtype: of weights and activations.
        profiles: the shapes that it takes.
        plugin: None where bodies were inlined.
        plugin_times: by which `--plugin auto` decided; None where it did not.
        model_sha256: of the bundle's files that it was made of.
        adapter_sha256: of the adapter that is in it, of the bundle's own where it takes a shelf's.
        refit_weights: names of the weights that `trt refit` can exchange -> their recipes; None where it cannot.
        slots: of adapters, which are inputs of it, as is the slot of each row; None where an adapter is in it.
        stripped: it holds no weights, and gets the bundle's when it is loaded.
        sha256: of the engine file.
        validation: figures of the last `validate --engine`, None before the first; of one that takes adapters, of all
            that were on the shelf.
        adapter_validations: of one that takes adapters, each one's own, by name.
    """

    runtime: Annotated[str, msgspec.Meta(pattern="^(tensorrt|rtx)$")]
    runtime_version: str
    targets: tuple[str, ...]
    task: Task
    dtype: Dtype
    profiles: tuple[ShapeProfile, ...]
    plugin: EnginePlugin | None
    model_sha256: Mapping[str, Sha256]
    adapter_sha256: Sha256
    refit_weights: Mapping[str, str] | None
    stripped: bool
    size: int
    sha256: Sha256
    tool_version: str
    validation: Validation | None = None
    plugin_times: PluginTimes | None = None
    slots: int | None = None
    adapter_validations: Mapping[AdapterName, JudgedAdapter] | None = None
    format_version: int = FORMAT_VERSION

    @property
    def capacity(self) -> int | None:
        """Tokens that its in-place cache holds; None where the cache grows, or there is none."""
        return capacity_of(self.profiles)


def is_made_of(facts: EngineFacts, bundle: Bundle) -> bool:
    """Whether an engine was made of `bundle` as it is; one that takes adapters is, whatever is on the shelf by now."""

    def made_of(hashes: Mapping[str, Sha256]) -> dict[str, Sha256]:
        return {
            name: digest
            for name, digest in hashes.items()
            if facts.slots is None or not name.startswith(f"{ADAPTERS_NAME}/")
        }

    shelf = bundle.manifest.shelf
    slots = None if shelf is None else shelf["slots"]
    return facts.slots == slots and made_of(facts.model_sha256) == made_of(bundle.manifest.sha256)


def facts_path(engine: Path) -> Path:
    return engine.with_suffix(".json")


def find_engine(bundle: Bundle, name: str) -> Path:
    """The engine `name` of a bundle, or the file of that path.

    Raises:
        ExportError: there is none; its message lists those that are there.
    """
    settle(bundle.folder / ENGINES_NAME)
    inside = bundle.folder / ENGINES_NAME / f"{name}.engine"
    if "/" not in name and inside.is_file():
        return inside
    if Path(name).is_file():
        return Path(name)
    there = sorted(path.stem for path in (bundle.folder / ENGINES_NAME).glob("*.engine"))
    advice = f"There are: {', '.join(there)}." if there else "Build one with `teamlora-export trt`."
    raise ExportError(f"{name}: no engine of that name in {bundle.folder}. {advice}")


def bundle_of(engine: Path, given: Path | None) -> Bundle:
    """The bundle that `engine` was built from: the one in the folder `given`, or the one whose folder it lies in.

    Raises:
        ExportError: there is no such engine, or no bundle there.
    """
    if not engine.is_file():
        raise ExportError(f"{engine}: no such file. Give NAME.engine, as `teamlora-export trt` wrote it.")
    folder = given or engine.resolve().parent.parent
    if given is None and not (folder / MANIFEST_NAME).is_file():
        raise ExportError(f"{engine}: lies in no bundle. Name the one that it was built from with --bundle.")
    return read_bundle(folder)


def write_facts(facts: EngineFacts, engine: Path) -> None:
    """Write the facts of an engine that is there; raises as `write_aside` does."""
    write_aside(facts_path(engine), _to_json(facts))


def write_engine(engine: memoryview | bytes, facts: EngineFacts, path: Path) -> None:
    """Write an engine and its facts: both are old, or both are new.

    Raises:
        ExportError: see `refuse_foreign_engine`; or they cannot be written, or the disk is full.
    """
    refuse_foreign_engine(path)
    require_space(path.parent, len(engine))
    write_together({path: engine, facts_path(path): _to_json(facts)})


def refuse_foreign_engine(path: Path) -> None:
    """Refuse to replace NAME.engine and NAME.json that are not a pair that we wrote."""
    settle(path.parent)
    pair = (path, facts_path(path))
    there = [file for file in pair if os.path.lexists(file)]
    if there and not _is_ours(path):
        raise ExportError(
            f"{there[0]}: exists and is not an engine that teamlora-export wrote; it is left as it is. "
            "Choose another -o."
        )


def listed_engines(folder: Path) -> set[str]:
    """The files in a bundle's folder that belong to engines that we wrote, relative to it."""
    engines = folder / ENGINES_NAME
    settle(engines)
    ours = [path for path in engines.glob("*.engine") if _is_ours(path)]
    return {file.relative_to(folder).as_posix() for path in ours for file in (path, facts_path(path))}


def read_facts(engine: Path) -> EngineFacts:
    """The facts of the engine file `engine`, checked against it.

    Raises:
        ExportError: a file is missing or damaged, the two do not belong together, or a newer tool wrote them.
    """
    settle(engine.parent)
    path = facts_path(engine)
    try:
        facts = read_record(path, EngineFacts, "Build the engine again.", newest=SHELF_FORMAT_VERSION)
        found = sha256_of(engine)
    except FileNotFoundError as error:
        missing = error.filename
        raise ExportError(
            f"{missing}: no such file. An engine is a pair of files, NAME.engine and NAME.json."
        ) from None
    if found != facts.sha256:
        raise ExportError(f"{engine}: is not the engine that {path.name} describes (SHA-256 differs). Build it again.")
    return facts


def _is_ours(engine: Path) -> bool:
    try:
        read_facts(engine)
    except ExportError:
        return False
    return True


def _to_json(facts: EngineFacts) -> str:
    return json.dumps(dataclasses.asdict(facts), indent=2) + "\n"
