"""The folder that `claims.py -o` writes: figures.json, README.md and plot.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from method.report import tables, write_plot
from teamlora_export.bench.plot import require_matplotlib
from teamlora_export.errors import ExportError
from teamlora_export.files import read_json, sha256_of
from teamlora_export.staging import real_path, refuse_foreign, staged

FIGURES_NAME = "figures.json"
_CARD_NAME, _PLOT_NAME = "README.md", "plot.png"
_SIGNATURE, _SIGNED = "written_by", "scripts/bench/claims.py"


def require_output(output: Path) -> None:
    """Find out before anything is trained whether the folder can be written.

    Raises:
        ExportError: there is anything in it that no run wrote, by name; or what draws plots is not installed.
    """
    refuse_foreign(real_path(output), listed)
    try:
        require_matplotlib()
    except ModuleNotFoundError:
        raise ExportError("matplotlib is not installed. Run pip install 'teamlora-export[bench]'.") from None


def write_figures(found: Mapping[str, Any], output: Path) -> None:
    """The folder, whole; only one that a run wrote is replaced.

    Raises:
        ExportError: something else is there, or it cannot be written.
    """
    with staged(output, listed) as folder:
        (folder / _CARD_NAME).write_text(tables(found), encoding="utf-8")
        if found["scores"] or found["steps"]:
            write_plot(found, folder / _PLOT_NAME)
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
        figures = {_SIGNATURE: _SIGNED, **found, "sha256": hashes}
        (folder / FIGURES_NAME).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def listed(folder: Path) -> set[str]:
    """The files in `folder` that a run wrote, and nobody changed since.

    Raises:
        ExportError: no run wrote them.
    """
    advice = "Choose another -o."
    try:
        figures = read_json(folder / FIGURES_NAME, advice, folder)
    except FileNotFoundError:
        raise ExportError(f"{folder}: is not empty, and no figures of this program are in it. {advice}") from None
    hashes = figures.get("sha256")
    if figures.get(_SIGNATURE) != _SIGNED or not isinstance(hashes, dict):
        raise ExportError(
            f"{folder / FIGURES_NAME}: is not what this program writes; an earlier version of it may have. {advice} Or "
            "remove that folder."
        )
    ours = (_CARD_NAME, _PLOT_NAME)
    whole = {
        name for name in ours if (folder / name).is_file() and sha256_of(folder / name, folder) == hashes.get(name)
    }
    return {FIGURES_NAME, *whole}
