"""What large pages are worth: times of a bundle in the pages that Linux gives out by itself, and in large ones.

    python scripts/bench/pages.py out/smollm2                     one model in a process, and four
    python scripts/bench/pages.py out/smollm2 --models 1 --processes 20 --json figures.json

Each process opens its models, has them take turns, moves its memory into large pages, and has them take turns again.
Which memory a process gets is luck: there are several of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from method.apart import run_apart
from method.command import run

from teamlora_export.bench.measure import make_prompts
from teamlora_export.bench.rows import GraphRow
from teamlora_export.bench.turns import Workload, take_turns
from teamlora_export.bundle import read_bundle
from teamlora_export.cli_output import write_json
from teamlora_export.deploy import session
from teamlora_export.deploy.pages import has_large_pages, use_large_pages
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--models", type=int, nargs="+", default=[1, 4], help="in a process")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--length", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--count", type=int, default=24, help="tokens that are timed after it")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: every core")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not has_large_pages():
        raise ExportError("This system gives no large pages (Linux from 6.1 on does, where its setting is not never).")
    vocabulary = read_bundle(given.bundle).manifest.tokens.vocabulary
    row = GraphRow("", given.bundle, find_library(None, Reporter()).path, given.threads)
    workload = Workload(1, given.length, given.count)
    print(f"Time in large pages over that before, of {given.processes} processes: median (quartiles)")
    found = {}
    for models in given.models:
        times = [
            run_apart(_before_and_after, row, models, workload, vocabulary, given.turns) for _ in range(given.processes)
        ]
        found[models] = times
        for quantity in times[0]:
            for model in range(models):
                before, after = np.array([process[quantity] for process in times])[:, :, model].T
                low, middle, high = np.percentile(after / before, (25, 50, 75))
                print(
                    f"  {quantity:7} model {model + 1} of {models}: {middle:.2f} ({low:.2f} - {high:.2f}), "
                    f"{1e3 * np.median(before):.1f} ms before"
                )
    write_json({"length": given.length, "count": given.count, "seconds": found}, given.json)


def _before_and_after(
    row: GraphRow, models: int, workload: Workload, vocabulary: int | None, turns: int
) -> dict[str, list[list[float]]]:
    """Seconds of each of `models`, in the order in which they were opened: before, and in large pages; by quantity."""
    # What a session does by itself is to be done in between.
    session.use_large_pages = lambda: None
    readers = {str(model): row.open() for model in range(models)}
    prompts = make_prompts(workload, vocabulary)
    found: dict[str, list[list[float]]] = {}
    for move in (None, use_large_pages):
        if move is not None:
            move()
        times: dict[str, list[float]] = {}
        for figure in take_turns(readers, "0", workload, prompts, turns):
            if figure.row in readers:
                times.setdefault(figure.quantity, []).append(figure.median)
        for quantity, seconds in times.items():
            found.setdefault(quantity, []).append(seconds)
    return found


if __name__ == "__main__":
    run(main)
