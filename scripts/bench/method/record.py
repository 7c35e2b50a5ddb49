"""The JSON file that a command leaves: its figures, and what they are of."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from teamlora_export import __version__
from teamlora_export.cli_output import SIGNATURE, refuse_foreign_result
from teamlora_export.staging import real_path, scratch_folder, write_aside


def require_record(path: Path, script: str) -> None:
    """Find out before anything is computed whether the file can be written.

    Args:
        script: the command, as `write_record` signs with it.

    Raises:
        ExportError: something else is there, or nothing can be written.
    """
    refuse_foreign_result(path, script)
    place = real_path(path)
    # Folders that are missing are made when there is something to put into them.
    while not place.parent.exists():
        place = place.parent
    with scratch_folder(place):
        pass


def write_record(path: Path, script: str, found: Mapping[str, Any]) -> None:
    """Write the file, whole; only one that the same script wrote is replaced.

    Raises:
        ExportError: something else is there, or it cannot be written.
    """
    refuse_foreign_result(path, script)
    write_aside(real_path(path), json.dumps({SIGNATURE: script, **found}, indent=1) + "\n")


def made_with(code: str, packages: Sequence[str]) -> dict[str, Any]:
    """By which figures know what computed them: our code, the packages that are installed, and threads."""
    import torch

    versions = {"teamlora-export": __version__}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"code": code, "versions": versions, "threads": torch.get_num_threads()}
