"""What large pages are worth: times of a bundle in the pages that Linux gives out by itself, and in large ones.

    python scripts/bench/large_pages.py out/smollm2               one model in a process, and four
    python scripts/bench/large_pages.py out/smollm2 --models 1 --processes 20 --json figures.json

Each process opens its models, has them take turns, and again, moves its memory into large pages, and has them take
turns once more. What the second time takes over the first is luck, and says what the third can tell. Which memory a
process gets is luck too, and so there are several.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from method.apart import run_apart
from method.command import run

from teamlora_export.bench.measure import make_prompts
from teamlora_export.bench.rows import GraphRow
from teamlora_export.bench.turns import DECODE, PREFILL, Workload, take_turns
from teamlora_export.bundle import read_bundle
from teamlora_export.cli_output import refuse_foreign_result, write_json
from teamlora_export.deploy import session
from teamlora_export.deploy.pages import has_large_pages, use_large_pages
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter

FIRST, AGAIN, LARGE = "before", "before, again", "in large pages"


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
    if given.processes < 1 or min(given.models) < 1:
        raise ExportError("--processes and --models: give 1 or more.")
    if given.json is not None:
        refuse_foreign_result(given.json)
    if not has_large_pages():
        raise ExportError("This system gives no large pages (Linux from 6.1 on does, where its setting is not never).")
    vocabulary = read_bundle(given.bundle).manifest.tokens.vocabulary
    row = GraphRow("", given.bundle, find_library(None, Reporter()).path, given.threads)
    workload = Workload(1, given.length, given.count)
    found: dict[str, list[dict[str, Any]]] = {}
    for models in given.models:
        asked = (row, models, workload, vocabulary, given.turns)
        found[str(models)] = of_processes = [run_apart(_three_times, *asked) for _ in range(given.processes)]
        moved = np.median([process["large_megabytes"] for process in of_processes])
        print(f"{models} in a process, {given.processes} processes, {moved:.0f} MB moved; median (quartiles)")
        for quantity in (PREFILL, DECODE):
            for model in range(models):
                told = ratio(of_processes, quantity, model), ratio(of_processes, quantity, model, LARGE)
                print(f"  {quantity:7} model {model + 1}: in large pages {told[1]} of before; before, again {told[0]}")
    settings = {"length": given.length, "count": given.count, "turns": given.turns, "threads": given.threads}
    write_json(settings | {"processes": found}, given.json)


def ratio(processes: Sequence[Mapping[str, Any]], quantity: str, model: int, of: str = AGAIN) -> str:
    """What `of` takes over the time before it, of one of the models that each process opened: median and quartiles."""
    over = {AGAIN: FIRST, LARGE: AGAIN}[of]
    ratios = [p["seconds"][of][quantity][model] / p["seconds"][over][quantity][model] for p in processes]
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def _three_times(row: GraphRow, models: int, workload: Workload, vocabulary: int | None, turns: int) -> dict[str, Any]:
    """Seconds, by time and quantity, of the models in the order in which they were opened; and what was moved."""
    # A session starts it by itself.
    session.start_large_pages = lambda: None
    readers = {str(model): row.open() for model in range(models)}
    prompts = make_prompts(workload, vocabulary)
    seconds: dict[str, dict[str, list[float]]] = {}
    for name in (FIRST, AGAIN, LARGE):
        if name == LARGE:
            use_large_pages()
        figures = take_turns(readers, "0", workload, prompts, turns)
        seconds[name] = {
            quantity: [figure.median for figure in figures if figure.quantity == quantity and figure.row in readers]
            for quantity in (PREFILL, DECODE)
        }
    return {"seconds": seconds, "large_megabytes": _large_megabytes()}


def _large_megabytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("AnonHugePages:"))


if __name__ == "__main__":
    run(main)
