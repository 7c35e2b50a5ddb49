"""Brings the shelf of a deployment to what the bundle's is, while its programs serve: they look at it again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path

from teamlora_export.bundle import DATA_NAME, MODEL_NAME, Bundle, refuse_linked_adapters, shelved_files
from teamlora_export.deploy.cpp import MODEL_FOLDER
from teamlora_export.deploy.folder import (
    DEPLOY_NAME,
    KUBERNETES_NAME,
    SHELF_FORMAT_VERSION,
    Description,
    held_in,
    shelf_of,
)
from teamlora_export.disk import sync, sync_names
from teamlora_export.errors import ExportError
from teamlora_export.files import read_bytes, read_record, sha256_of
from teamlora_export.manifest import ADAPTERS_NAME, AdapterInFile, check_shelf
from teamlora_export.shelf import edited, holding, require_shelf
from teamlora_export.staging import real_path, require_space, write_aside


def publish_shelf(bundle: Bundle, out: Path) -> list[str]:
    """Make the adapters of the deployment in `out` those of `bundle`, which it was made of; their names.

    New files come first, and those that are damaged or missing there, then the list of them in one step, and then what
    that no longer names goes. Requests that are at work keep what they have.

    Args:
        bundle: what is published is what it has by now.

    Raises:
        ExportError: `out` is no deployment, or one whose files pods compare, or of another export, or has no shelf; or
            the bundle has none, or one of its adapters is damaged.
    """
    require_shelf(bundle)
    # Kubernetes' own, or the repository in it.
    if any((folder / KUBERNETES_NAME).is_file() for folder in (out, real_path(out).parent)):
        raise ExportError(
            f"{out}: is of `deploy kubernetes`, whose pods start with exactly the files that were listed. Run that "
            "again: another shelf is another version, which the cluster rolls out."
        )
    path = _record_of(out)
    _read_description(path, bundle, out)
    # Nobody else publishes or deploys there meanwhile, and nobody edits the bundle.
    with holding(held_in(path.parent)), edited(bundle.folder) as edit:
        described = _read_description(path, edit.bundle, out)
        shelf = shelf_of(edit.bundle.manifest)
        assert shelf is not None
        refuse_linked_adapters(path.parent)
        for adapter in shelf["adapters"].values():
            _bring(adapter, bundle.folder, path.parent)
        kept = {name: sha for name, sha in described.files.items() if not name.startswith(f"{ADAPTERS_NAME}/")}
        files = kept | {adapter["file"]: adapter["sha256"] for adapter in shelf["adapters"].values()}
        assert described.shelf is not None
        if DATA_NAME not in described.files:
            # An engine has as many slots as it was built with.
            shelf = {**shelf, "slots": described.shelf["slots"]}
        changed = dataclasses.replace(described, shelf=shelf, files=dict(sorted(files.items())))
        write_aside(path, json.dumps(dataclasses.asdict(changed), indent=2) + "\n")
        # What an earlier one left that was killed, too.
        for name in shelved_files(path.parent) - files.keys():
            with suppress(OSError):
                (path.parent / name).unlink()
    return list(shelf["adapters"])


def _read_description(path: Path, bundle: Bundle, out: Path) -> Description:
    """What describes the deployment `out`, which was made of `bundle`."""
    described = read_record(path, Description, "Deploy the bundle again.", out, newest=SHELF_FORMAT_VERSION)
    hashes = bundle.manifest.sha256
    if described.target == "genai":
        raise ExportError(
            f"{out}: has adapters in onnxruntime-genai's own form, which nothing is published to. Write it again with "
            "`deploy genai`."
        )
    # An engine holds its weights: those of the same base in the same graph.
    has_weights = (
        described.files[DATA_NAME] == hashes[DATA_NAME]
        if DATA_NAME in described.files
        else described.base_sha256 == bundle.manifest.base["sha256"]
    )
    if described.shelf is None or not has_weights or described.graph_sha256 != hashes[MODEL_NAME]:
        raise ExportError(f"{out}: was not made of {bundle.folder} as it was exported. Deploy the bundle again.")
    check_shelf(described.shelf["adapters"], described.files, path)
    return described


def _bring(adapter: AdapterInFile, source: Path, folder: Path) -> None:
    """The file of an adapter into the deployment's `folder`, unless it is there, whole."""
    target = folder / adapter["file"]
    with suppress(FileNotFoundError, ExportError):
        if sha256_of(target, folder) == adapter["sha256"]:
            return
    content = read_bytes(source / adapter["file"], source)
    if hashlib.sha256(content).hexdigest() != adapter["sha256"]:
        raise ExportError(
            f"{source / adapter['file']}: is damaged (its SHA-256 differs). Put that adapter on the shelf again."
        )
    require_space(folder, len(content))
    (folder / ADAPTERS_NAME).mkdir(exist_ok=True)
    write_aside(target, content, result=False)
    sync(target)
    sync_names(folder / ADAPTERS_NAME)


def _record_of(out: Path) -> Path:
    """What describes the model of a deployment: in its folder, in that of a program in C++, or in a model's of a
    repository."""
    places = (out / DEPLOY_NAME, out / MODEL_FOLDER / DEPLOY_NAME, *sorted(out.glob(f"models/*/1/{DEPLOY_NAME}")))
    found = [path for path in places if path.is_file()]
    if len(found) != 1:
        raise ExportError(f"{out}: is not a deployment (no {DEPLOY_NAME}). Make one with `teamlora-export deploy`.")
    return found[0]
