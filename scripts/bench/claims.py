"""Does TeamLoRA keep its promise, and what does it cost? Trains, scores and times all families on one small base.

    python scripts/bench/claims.py --quick                          one seed, a small grid: 10 minutes on 2 cores
    python scripts/bench/claims.py                                  everything; hours
    python scripts/bench/claims.py --cells base '*-k4-ffn' lora-ffn                 one set of targets, three seeds
    python scripts/bench/claims.py --cells teamlora-k4-ffn --seeds 3                a cell with another seed
    python scripts/bench/claims.py ... --with FIGURES.json          with those of another run: a verdict of all seeds
    python scripts/bench/claims.py --base smollm2-phi3 --cells base teamlora-k4-ffn another architecture
    python scripts/bench/claims.py --parts steps inference          timings, on a machine with nothing else to do
    python scripts/bench/claims.py --parts inference --cells '*-k8-ffn'             of some cells

TeamLoRA, HydraLoRA, MoELoRA and LoRA at equal numbers of trained parameters, and TeamLoRA at half of them, on the tasks
of scripts/bench/tasks. What was found is kept in the user's cache cell by cell (claims/), so that a run that was
interrupted goes on; timings that are asked for are taken anew. -o writes figures.json, README.md and plot.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Event
from typing import Any

from method.apart import own_process
from method.cells import (
    Place,
    code_version,
    default_folder,
    hash_of_base,
    hash_of_questions,
    hash_of_rows,
    run_cell,
    short_hash,
    whole_version,
)
from method.command import run
from method.figures import require_output, write_figures
from method.notes import notes_of, title_of
from method.other_run import OtherRun, beside, read_other_run
from method.plan import BASE, EXPERTS, EXPORTED, FULL, QUICK, TARGETS, Cell, full_grid, quick_grid
from method.report import tables

from teamlora_export import interrupt
from teamlora_export.deploy.cores import usable_cores
from teamlora_export.errors import ExportError, first_line
from teamlora_export.progress import Reporter
from teamlora_export.staging import write_aside

sys.path.append(str(Path(__file__).parents[1]))
from get_model import get_model

# By what rows of inference are of the same model.
_OF_INFERENCE = ("family", "experts", "targets")
# As `scripts/get_model.py` names them.
BASES = ("smollm2", "smollm2-phi3")
# In which an interruption that ended a worker has come to this process as well.
_INTERRUPTION_SECONDS = 1.0
PARTS = ("scores", "steps", "inference", "exports")


def main() -> None:
    # Of the files as they are now, which are those that run.
    whole_version()
    given = _arguments()
    if given.output is not None:
        require_output(given.output)
    reporter = Reporter()
    settings = QUICK if given.quick else FULL
    changed = {name: value for name in _CHANGED if (value := getattr(given, name)) is not None}
    place = Place(_base(given.base), dataclasses.replace(settings, **changed), given.cache, given.any_version)
    grid = (quick_grid if given.quick else full_grid)(given.seeds)
    cells = _chosen(grid, given.cells)
    # Before a cell runs: there may be fewer questions and rows than are asked for.
    hashes = {
        "base_sha256": hash_of_base(place.base),
        "questions_sha256": hash_of_questions(place.settings),
        "rows_sha256": hash_of_rows(place),
    }
    others = read_other_run(given.pooled, place) if given.pooled is not None else OtherRun()
    there = {result["cell"] for result in others.scores}
    own = [cell for cell in cells if cell.name not in there]
    failures = _run_cells(own, place, given.jobs, reporter) if "scores" in given.parts else []
    scores = [
        *others.scores,
        *(_without(result, "answers") for cell in own if (result := place.find(cell)) is not None),
    ]
    found = {
        "title": title_of(scores, given.quick),
        "quick": given.quick,
        "command": shlex.join(["python", "scripts/bench/claims.py", *sys.argv[1:]]),
        "settings": dataclasses.asdict(place.settings),
        "code": code_version(),
        "base": place.base.name,
        **hashes,
        "seeds": sorted({*given.seeds, *(result["seed"] for result in others.scores)}),
        "pooled": others.told,
        "missing": [cell.name for cell in own if place.find(cell) is None],
        "scores": scores,
        "steps": beside(others.steps, _steps(place, given, reporter), ("targets",)),
        "inference": beside(others.inference, _inference(cells, place, given, failures, reporter), _OF_INFERENCE),
        "exports": beside(others.exports, _exports(cells, place, given, reporter), ("cell",)),
    }
    found["machine"] = _machine()
    found["notes"] = notes_of(found, place.settings, there)
    if given.output is not None:
        write_figures(found, given.output)
    print(tables(found), end="")
    if failures:
        raise ExportError("; ".join(failures))


def _chosen(grid: Sequence[Cell], asked: Sequence[str]) -> list[Cell]:
    """Those of the names that were asked for: a cell's with or without its seed, or a pattern of them; else all."""
    if not asked:
        return list(grid)
    chosen: set[Cell] = set()
    for pattern in asked:
        found = [cell for cell in grid if fnmatchcase(cell.name, pattern) or fnmatchcase(cell.group, pattern)]
        if not found:
            raise ExportError(f"--cells {pattern}: none of {', '.join(cell.name for cell in grid)}.")
        chosen.update(found)
    return [cell for cell in grid if cell in chosen]


# Of `Settings`, what may be given.
_CHANGED = ("steps", "batch", "learning_rate", "rank", "train", "validation", "test", "dtype")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid, short trainings, few questions")
    parser.add_argument("--jobs", type=_count, default=usable_cores(), help="cells at a time (default: the cores)")
    parser.add_argument("--seeds", type=_seed, nargs="+", help="default: 0 1 2; with --quick 0")
    parser.add_argument(
        "--cells",
        nargs="+",
        default=[],
        help="names, with or without a seed, or patterns; without --parts scores alone",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=f"default: {' '.join(PARTS)}")
    parser.add_argument(
        "--turns",
        type=_count,
        help="of the timings; at inference each opens the models anew, but for --quick, where all are of one opening "
        "(default: 10; with --quick 6, the fewest that tell)",
    )
    parser.add_argument("--base", default="smollm2", help=f"{' or '.join(BASES)}, or a folder (default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=default_folder(), help="where cells are kept")
    parser.add_argument(
        "--with",
        dest="pooled",
        type=Path,
        metavar="FIGURES.json",
        help="count what another run found, of the same settings, base, questions and rows, with what this one does: "
        "its cells (what this code has found of one itself comes first), and timings and exports that this one has not",
    )
    parser.add_argument("--any-version", action="store_true", help="take what other versions of the code have found")
    parser.add_argument("-o", "--output", type=Path, help="a folder for figures.json, README.md and plot.png")
    for name in _CHANGED:
        kind = {"learning_rate": float, "dtype": str}.get(name, _count)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.seeds = list(dict.fromkeys(given.seeds or ([0] if given.quick else [0, 1, 2])))
    given.parts = given.parts or (["scores"] if given.cells else list(PARTS))
    given.turns = given.turns or (6 if given.quick else 10)
    return given


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1.")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0 to {2**32 - 1}.")
    return int(text)


def _base(given: str) -> Path:
    return get_model(given) if given in BASES else Path(given)


def _run_cells(cells: Sequence[Cell], place: Place, jobs: int, reporter: Reporter) -> list[str]:
    """What went wrong, a sentence for each cell. The results are in the cache."""
    waiting = [cell for cell in cells if place.find(cell) is None]
    threads = max(1, usable_cores() // jobs)
    # Before the workers load a library that reads it.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    started, failures, stopped = time.monotonic(), list[str](), Event()
    with ThreadPoolExecutor(jobs) as workers:
        try:
            futures = {workers.submit(_alone, cell, place, threads, stopped): cell for cell in waiting}
            for number, future in enumerate(as_completed(futures), 1):
                cell, seconds = futures[future], time.monotonic() - started
                told = _outcome(future)
                reporter.say(f"{number} of {len(waiting)}, after {seconds:,.0f} s: {cell.name}: {told}")
                if future.exception() is not None:
                    failures.append(f"{cell.name}: {told}")
        except KeyboardInterrupt:
            # Those at work leave checkpoints; the others do not begin.
            stopped.set()
            workers.shutdown(wait=False, cancel_futures=True)
            # Those that a signal to this process alone did not come to; one more does no harm to the others.
            time.sleep(_INTERRUPTION_SECONDS)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failures


def _alone(cell: Cell, place: Place, threads: int, stopped: Event) -> dict[str, Any] | None:
    """`_work` in a pool of its own: a process that is killed breaks its pool, and all that wait in it.

    Args:
        stopped: set when the command is interrupted: nothing begins.
    """
    if stopped.is_set():
        raise CancelledError
    try:
        with own_process() as worker:
            return worker.submit(_work, cell, place, threads).result()
    except BrokenProcessPool:
        # Of an interruption that came to all processes the worker's end may be known before it: the next cell, which
        # this thread takes then, would not have had it.
        stopped.wait(_INTERRUPTION_SECONDS)
        raise


def _outcome(future: Future[dict[str, Any] | None]) -> str:
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return (
            "its process was ended (out of memory, or by a signal?); the same command goes on from its last checkpoint"
        )
    if error is not None:
        return first_line(error)
    result = future.result()
    return f"{result['mean']:.1f}" if result is not None else "another process is at it"


def _work(cell: Cell, place: Place, threads: int) -> dict[str, Any] | None:
    """`run_cell` in a process of its own, which an interruption leaves with a checkpoint."""
    with interrupt.reported():
        import torch

        torch.set_num_threads(threads)
        return run_cell(cell, place)


def _timed(place: Place, part: str, given: argparse.Namespace, measure: Callable[[], list[Any]]) -> list[Any]:
    """Rows of a timing from now, or, where it is not asked for, those that were kept of the same settings, base and
    code; each says on which machine it was taken, and of which code.

    Args:
        part: one of `--parts`, and, after a hyphen, of what.
    """
    of = short_hash({**dataclasses.asdict(place.settings), "base": hash_of_base(place.base)})
    name = f"{part}{'-quick' if given.quick else ''}-{of}"
    if part.partition("-")[0] in given.parts:
        machine = _machine()
        rows = [{**row, "machine": machine} for row in measure()]
        place.folder.mkdir(parents=True, exist_ok=True)
        path = place.folder / f"{name}-{whole_version()}.json"
        write_aside(path, json.dumps(rows, indent=1) + "\n", result=False)
    version = "????????" if given.any_version else whole_version()
    found = sorted(place.folder.glob(f"{name}-{version}.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        return []
    code = found[-1].stem.rpartition("-")[2]
    return [{**row, "code": code} for row in json.loads(found[-1].read_text(encoding="utf-8"))]


def _steps(place: Place, given: argparse.Namespace, reporter: Reporter) -> list[dict[str, Any]]:
    """Of all families, in the same turns; with `--cells` only where they are asked for."""
    if given.cells and "steps" not in given.parts:
        return []
    from method.steps import time_steps

    def measure() -> list[dict[str, Any]]:
        rows = []
        for targets in ["ffn"] if given.quick else TARGETS:
            with reporter.step(f"Timing steps, {targets}"):
                rows += time_steps(place, [4] if given.quick else EXPERTS, targets, given.turns, usable_cores())
        return rows

    return _timed(place, "steps", given, measure)


def _inference(
    cells: Sequence[Cell], place: Place, given: argparse.Namespace, failures: list[str], reporter: Reporter
) -> list[Any]:
    """Of each group of `cells` once, as a seed makes no difference; each is kept as soon as it is timed.

    Args:
        failures: gets a sentence for each group that cannot be timed.
    """
    from method.inference import Asked, time_inference

    if given.quick:
        asked = Asked(count=8, openings=1, turns=given.turns, trace=False)
    else:
        asked = Asked(count=24, openings=given.turns + given.turns % 2, turns=1, trace=True)
    rows = []
    chosen = {cell.group: cell for cell in cells if cell.family != BASE and cell.share == 1}
    if "inference" in given.parts and not chosen:
        reporter.warn("Inference: left out. It is timed of families at equal numbers of parameters, and none is named.")
    for group, cell in chosen.items():

        def measure(cell: Cell = cell) -> list[dict[str, Any]]:
            with reporter.step(f"Timing inference, {cell.group}"):
                return time_inference(place, cell, asked, usable_cores(), reporter)

        try:
            rows += _timed(place, f"inference-{group}", given, measure)
        except ExportError as error:
            failures.append(f"Inference with {group}: {error}")
    return rows


def _exports(cells: Sequence[Cell], place: Place, given: argparse.Namespace, reporter: Reporter) -> list[Any]:
    """PyTorch's scores, and those of each form, of the cells that are exported; those that there are."""
    if "exports" not in given.parts:
        return []
    from method.exports import FORMS, score_exports

    # In 16 bits ONNX Runtime is slow on a CPU.
    forms = [form for form in FORMS if form != "fp16" or not given.quick]
    chosen = [cell for cell in cells if cell.group == EXPORTED and cell.seed == given.seeds[0]]
    rows = [row for cell in chosen for row in score_exports(cell, place, forms, usable_cores(), reporter)]
    if not rows:
        reporter.warn(f"Exports: left out. They are of {EXPORTED}-s{given.seeds[0]}, which is not trained.")
    return [_without(row, "answers") for row in rows]


def _machine() -> dict[str, Any]:
    from teamlora_export.bench.measure import this_machine

    return dataclasses.asdict(this_machine())


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


if __name__ == "__main__":
    run(main, "Stopped. The same command goes on from here; timings begin anew.")
