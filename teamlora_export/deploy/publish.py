"""Brings the shelf of a deployment to what the bundle's is, while its programs serve: they look at it again."""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path

from teamlora_export.bundle import ADAPTERS_NAME, DATA_NAME, Bundle, shelved_files
from teamlora_export.deploy.cpp import MODEL_FOLDER
from teamlora_export.deploy.folder import DEPLOY_NAME, KUBERNETES_NAME, SHELF_FORMAT_VERSION, Description, shelf_of
from teamlora_export.disk import sync, sync_names
from teamlora_export.errors import ExportError
from teamlora_export.files import read_bytes, read_record
from teamlora_export.shelf import require_shelf
from teamlora_export.staging import real_path, require_space, write_aside


def publish_shelf(bundle: Bundle, out: Path) -> list[str]:
    """Make the adapters of the deployment in `out` those of `bundle`, which it was made of; their names.

    New files come first, then the list of them in one step, and then what that no longer names goes. Requests that are
    at work keep what they have.

    Raises:
        ExportError: `out` is no deployment, or one whose files pods compare, or of another export, or has no shelf; or
            the bundle has none.
    """
    require_shelf(bundle)
    # Kubernetes' own, or the repository in it.
    if any((folder / KUBERNETES_NAME).is_file() for folder in (out, real_path(out).parent)):
        raise ExportError(
            f"{out}: is of `deploy kubernetes`, whose pods start with exactly the files that were listed. Run that "
            "again: another shelf is another version, which the cluster rolls out."
        )
    path = _record_of(out)
    described = read_record(path, Description, "Deploy the bundle again.", out, newest=SHELF_FORMAT_VERSION)
    folder, manifest = path.parent, bundle.manifest
    if described.shelf is None or described.files.get(DATA_NAME) != manifest.sha256[DATA_NAME]:
        raise ExportError(f"{out}: was not made of {bundle.folder} as it was exported. Deploy the bundle again.")
    shelf = shelf_of(manifest)
    assert shelf is not None
    for adapter in shelf["adapters"].values():
        if described.files.get(adapter["file"]) != adapter["sha256"]:
            content = read_bytes(bundle.folder / adapter["file"], bundle.folder)
            require_space(folder, len(content))
            (folder / ADAPTERS_NAME).mkdir(exist_ok=True)
            write_aside(folder / adapter["file"], content, result=False)
            sync(folder / adapter["file"])
            sync_names(folder / ADAPTERS_NAME)
    kept = {name: sha for name, sha in described.files.items() if not name.startswith(f"{ADAPTERS_NAME}/")}
    files = kept | {adapter["file"]: adapter["sha256"] for adapter in shelf["adapters"].values()}
    changed = dataclasses.replace(described, shelf=shelf, files=dict(sorted(files.items())))
    write_aside(path, json.dumps(dataclasses.asdict(changed), indent=2) + "\n")
    # What an earlier one left that was killed, too.
    for name in shelved_files(folder) - files.keys():
        with suppress(OSError):
            (folder / name).unlink()
    return list(shelf["adapters"])


def _record_of(out: Path) -> Path:
    """What describes the model of a deployment: in its folder, in that of a program in C++, or in a model's of a
    repository."""
    places = (out / DEPLOY_NAME, out / MODEL_FOLDER / DEPLOY_NAME, *sorted(out.glob(f"models/*/1/{DEPLOY_NAME}")))
    found = [path for path in places if path.is_file()]
    if len(found) != 1:
        raise ExportError(f"{out}: is not a deployment (no {DEPLOY_NAME}). Make one with `teamlora-export deploy`.")
    return found[0]
