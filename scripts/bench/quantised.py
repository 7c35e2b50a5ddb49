"""What quantisation costs the model of this repository: the README's table, of each form that weights may have.

    python scripts/bench/quantised.py [--json scripts/bench/quantised.json]

SmolLM2-135M-Instruct with the adapter of this repository. Its weights come from a file that holds them in four bits, in
blocks of 32 (get_model.py): they were rounded once before.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from method.cells import hash_of_base, whole_version
from method.command import run
from method.record import made_with, require_record, write_record

from teamlora_export.bundle import Bundle
from teamlora_export.cache import cache_folder
from teamlora_export.files import sha256_of
from teamlora_export.progress import Reporter
from teamlora_export.staging import scratch_folder
from teamlora_export.validate.verdict import Figures, Quality, Thresholds

sys.path.append(str(Path(__file__).parents[1]))
from get_model import get_model

SCRIPT = "scripts/bench/quantised.py"
ROOT = Path(__file__).parents[2]
# As on the command line -> options of `export_onnx`.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"weights_form": "int8"},
    "int4": {"weights_form": "int4"},
    "int4, `--zero-points`": {"weights_form": "int4", "zero_points": True},
    "int4, `--head int4`": {"weights_form": "int4", "head_form": "int4"},
}
PLAIN, BASE = "none", "the base without the adapter"
# What a row is of, where that is no bundle of its own.
_SHOWN = {PLAIN: "none (a bundle's size, PyTorch's figures)", BASE: f"{BASE} (PyTorch)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    if given.json is not None:
        require_record(given.json, SCRIPT)

    base, adapter = get_model("smollm2"), ROOT / "adapters" / "smollm2-teamlora"
    # Of the files as they are now, which are those that run.
    made = made_with(whole_version(), ("torch", "transformers", "tokenizers", "onnxruntime"))
    measured = measure(base, adapter, Reporter())
    found = {
        "base_sha256": hash_of_base(base),
        "adapter_sha256": sha256_of(adapter / "adapter_model.safetensors"),
        **made,
        **measured,
    }
    if given.json is not None:
        write_record(given.json, SCRIPT, found)
    print(table(found))


def measure(base: Path, adapter: Path, reporter: Reporter) -> dict[str, Any]:
    """`rows`, one for each form, after one of the model as it was and before one of its base, whose `bytes` are of all
    of a bundle's files; and `tasks`, how many were tried. One bundle is on the disk at a time."""
    with _exported(base, adapter, {}, reporter) as bundle:
        size = _bytes_of(bundle.folder)
    rows: list[dict[str, Any]] = []
    for name, options in FORMS.items():
        with _exported(base, adapter, options, reporter) as bundle:
            quality = _quality(bundle, name, reporter)
            if not rows:
                rows.append(_row(PLAIN, size, quality.adapted))
            rows.append(_row(name, _bytes_of(bundle.folder), quality.quantised))
    return {"rows": [*rows, _row(BASE, 0, quality.base)], "tasks": quality.tasks}


@contextmanager
def _exported(base: Path, adapter: Path, options: Mapping[str, Any], reporter: Reporter) -> Iterator[Bundle]:
    """A bundle in the user's cache, gone when the block ends; what a killed run leaves, the next one clears away."""
    from teamlora_export.export import export_onnx

    with scratch_folder(cache_folder() / "quantised") as folder:
        yield export_onnx(str(base), adapter, folder / "bundle", reporter=reporter, **options)


def _quality(bundle: Bundle, name: str, reporter: Reporter) -> Quality:
    from teamlora_export.validate.onnx_runner import OnnxRunner
    from teamlora_export.validate.quality import measure_quality
    from teamlora_export.validate.sources import open_sources

    model, spec = open_sources(bundle, None, None, bundle.manifest.adapter["sha256"])
    with reporter.step(f"Measuring {name}"):
        runner = OnnxRunner(bundle, spec.projections, None, as_deployed=True)
        return measure_quality(runner, model, spec, Thresholds())


def _row(name: str, size: int, figures: Figures) -> dict[str, Any]:
    return {"weights": name, "bytes": size, **dataclasses.asdict(figures)}


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def table(found: Mapping[str, Any]) -> str:
    """In Markdown, as the README has it."""
    lines = [
        f"| `--weights` | size | perplexity of prose | KL | same likeliest | solved of {found['tasks']} tasks |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        size = f"{row['bytes'] / 1e6:.0f} MB" if row["bytes"] else ""
        beside = ("", "") if row["weights"] == PLAIN else (f"{row['kl']:.2g}", f"{100 * row['agreement']:.1f} %")
        solved = f"{found['tasks'] * row['solved']:.0f}"
        cells = (_SHOWN.get(row["weights"], row["weights"]), size, f"{row['perplexity']:.1f}", *beside, solved)
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
