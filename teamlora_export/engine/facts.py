"""What an engine is, beside it as JSON: an engine itself can only be read on the GPU that it was built for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teamlora_export.bundle import ENGINES_NAME, MANIFEST_NAME, Bundle, read_bundle
from teamlora_export.engine.profiles import ShapeProfile
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of

FORMAT_VERSION = 1


@dataclass(frozen=True)
class EngineFacts:
    """Facts of an engine.

    Attributes:
        runtime, runtime_version: "tensorrt" or "rtx", and the package's version: an engine runs with no other.
        targets: the GPUs or compute capabilities that it was built for.
        dtype: of weights and activations.
        profiles: the shapes that it takes.
        plugin: version of the op, build and SHA-256 of the library, or None where bodies were inlined.
        model_sha256: of the bundle's files that it was made of.
        adapter_sha256: of the adapter that is in it.
        refit_weights: names of the weights that `trt refit` can exchange -> their recipes; None where it cannot.
        stripped: it holds no weights, and gets the bundle's when it is loaded.
        sha256: of the engine file.
        validation: figures of the last `validate --engine`, None before the first.
    """

    runtime: str
    runtime_version: str
    targets: tuple[str, ...]
    task: str
    dtype: str
    profiles: tuple[ShapeProfile, ...]
    plugin: Mapping[str, Any] | None
    model_sha256: Mapping[str, str]
    adapter_sha256: str
    refit_weights: Mapping[str, str] | None
    stripped: bool
    size: int
    sha256: str
    tool_version: str
    validation: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION


def facts_path(engine: Path) -> Path:
    return engine.with_suffix(".json")


def find_engine(bundle: Bundle, name: str) -> Path:
    """The engine `name` of a bundle, or the file of that path.

    Raises:
        ExportError: there is none; its message lists those that are there.
    """
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
    path = facts_path(engine)
    staged = path.with_name(f".{path.name}.partial")
    staged.write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")
    os.replace(staged, path)


def read_facts(engine: Path) -> EngineFacts:
    """The facts of the engine file `engine`, checked against it.

    Raises:
        ExportError: a file is missing or damaged, the two do not belong together, or a newer tool wrote them.
    """
    path = facts_path(engine)
    for needed in (engine, path):
        if not needed.is_file():
            raise ExportError(f"{needed}: no such file. An engine is a pair of files, NAME.engine and NAME.json.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format_version"] > FORMAT_VERSION:
            raise ExportError(f"{path}: was written by a newer teamlora-export ({fields['tool_version']}). Upgrade it.")
        fields["profiles"] = tuple(
            ShapeProfile(p["name"], {name: _range(shapes) for name, shapes in p["inputs"].items()})
            for p in fields["profiles"]
        )
        facts = EngineFacts(**{**fields, "targets": tuple(fields["targets"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: cannot be read ({error!r}). Build the engine again.") from None
    if sha256_of(engine) != facts.sha256:
        raise ExportError(f"{engine}: is not the engine that {path.name} describes (SHA-256 differs). Build it again.")
    return facts


def _range(shapes: list[list[int]]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, best, most = (tuple(shape) for shape in shapes)
    return least, best, most
