"""What quantisation costs the model of this repository: the README's table, of each form that weights may have.

    python scripts/bench/quantised.py [--json scripts/bench/quantised.json]

SmolLM2-135M-Instruct with the adapter of this repository. Its weights come from a file that holds them in four bits, in
blocks of 32 (get_model.py): they were rounded once before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from method.cells import hash_of_base
from method.command import run

from teamlora_export.cache import cache_folder
from teamlora_export.export import export_onnx
from teamlora_export.progress import Reporter
from teamlora_export.staging import write_aside
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.quality import measure_quality
from teamlora_export.validate.sources import open_sources
from teamlora_export.validate.verdict import Figures, Thresholds

sys.path.append(str(Path(__file__).parents[1]))
from get_model import get_model

ROOT = Path(__file__).parents[2]
# As on the command line -> options of `export_onnx`.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"weights_form": "int8"},
    "int4": {"weights_form": "int4"},
    "int4, `--zero-points`": {"weights_form": "int4", "zero_points": True},
    "int4, `--head int4`": {"weights_form": "int4", "head_form": "int4"},
}
PLAIN, BASE = "none", "the base without the adapter"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    rows = measure(Reporter())
    print(table(rows))
    if given.json is not None:
        found = {"rows": rows, "base_sha256": hash_of_base(get_model("smollm2"))}
        write_aside(given.json, json.dumps(found, indent=1) + "\n", result=False)


def measure(reporter: Reporter) -> list[dict[str, Any]]:
    """A row for each form, after one of the model as it was and before one of its base; `bytes` are of all files."""
    base, adapter = get_model("smollm2"), ROOT / "adapters" / "smollm2-teamlora"
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=cache_folder()) as scratch:
        plain = export_onnx(str(base), adapter, f"{scratch}/plain", reporter=reporter)
        size = _bytes_of(plain.folder)
        for number, (name, options) in enumerate(FORMS.items()):
            bundle = export_onnx(str(base), adapter, f"{scratch}/{number}", reporter=reporter, **options)
            model, spec = open_sources(bundle, None, None, bundle.manifest.adapter["sha256"])
            with reporter.step(f"Measuring {name}"):
                runner = OnnxRunner(bundle, spec.projections, None, as_deployed=True)
                found = measure_quality(runner, model, spec, Thresholds())
            if not rows:
                rows.append(_row(PLAIN, size, found.adapted))
            rows.append(_row(name, _bytes_of(bundle.folder), found.quantised))
    return [*rows, _row(BASE, 0, found.base)]


def _row(name: str, size: int, figures: Figures) -> dict[str, Any]:
    return {"weights": name, "bytes": size, **dataclasses.asdict(figures)}


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, as the README has it."""
    lines = [
        "| `--weights` | size | perplexity of prose | KL | same likeliest | tasks solved |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['bytes'] / 1e6:.0f} MB" if row["bytes"] else ""
        beside = ("", "") if row["weights"] == PLAIN else (f"{row['kl']:.2g}", f"{100 * row['agreement']:.1f} %")
        cells = (row["weights"], size, f"{row['perplexity']:.1f}", *beside, f"{100 * row['solved']:.1f} %")
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
