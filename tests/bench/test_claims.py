"""The command of the measure of the method: what it is asked for, what it runs, keeps and shows, and what stops it."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from waiting import SECONDS

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(BENCH))
import claims as command  # noqa: E402
from method import inference  # noqa: E402
from method.cells import Place  # noqa: E402
from method.figures import require_output, write_figures  # noqa: E402
from method.plan import Cell, full_grid, quick_grid  # noqa: E402
from tiny_cells import FEW, TINY  # noqa: E402

from teamlora_export.errors import ExportError  # noqa: E402
from teamlora_export.progress import Reporter  # noqa: E402

pytest_plugins = ["claim_fixtures"]


def claims(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, str(BENCH / "claims.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, arguments)])


def asked_for(part: str, **changed: object) -> argparse.Namespace:
    """What the command makes of its words, as far as timings and exports read it."""
    fields = {"quick": False, "turns": 6, "seeds": [0], "cells": [], "any_version": False, **changed}
    return argparse.Namespace(parts=[part], **fields)


def reporter_into(told: io.StringIO) -> Reporter:
    return Reporter(Console(file=told, width=200))


def fork(monkeypatch: pytest.MonkeyPatch, work: Callable[..., object]) -> None:
    """Workers do `work`, and are forked, so that nothing is loaded again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(command.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(command, "_work", work)


def test_cells_are_chosen_by_their_names_and_not_by_parts_of_them():
    grid = full_grid([0, 1])

    def chosen(*asked: str) -> list[str]:
        return [cell.name for cell in command._chosen(grid, asked)]

    assert chosen("teamlora-k4-ffn") == ["teamlora-k4-ffn-s0", "teamlora-k4-ffn-s1"]
    assert chosen("lora-ffn-s1", "base") == ["base", "lora-ffn-s1"]
    assert chosen("*-half-s0") == [cell.name for cell in grid if cell.share != 1 and cell.seed == 0]
    assert len(chosen()) == len(grid)
    with pytest.raises(ExportError, match="--cells moelora: none of base, teamlora-k4-ffn-s0"):
        chosen("base", "moelora")


def test_a_seed_that_is_given_twice_counts_once(monkeypatch, capsys):
    ask(monkeypatch, "--seeds", 3, 3, 0)
    assert command._arguments().seeds == [3, 0]
    ask(monkeypatch, "--seeds", -1)
    with pytest.raises(SystemExit):
        command._arguments()
    assert "expected a whole number from 0" in capsys.readouterr().err


def test_a_base_is_one_of_two_by_name_or_a_folder(monkeypatch):
    monkeypatch.setattr(command, "get_model", lambda name: Path("made", name))
    assert command._base("smollm2-phi3") == Path("made", "smollm2-phi3")
    assert command._base("./smollm2-phi3") == Path("smollm2-phi3") and command._base("minilm") == Path("minilm")


@pytest.mark.parametrize(("option", "part"), [("--test", "code: its test"), ("--validation", "topic: its validation")])
def test_more_questions_or_rows_than_there_are_are_refused_before_a_cell_runs(
    option, part, base, tmp_path, monkeypatch
):
    asked = ("--quick", "--base", base, "--cache", tmp_path, "--train", 3, "--validation", 1, "--test", 1, option, 250)
    ask(monkeypatch, *asked)
    monkeypatch.setattr(command, "_run_cells", lambda *_: pytest.fail("a cell ran"))
    with pytest.raises(ExportError, match=rf"^{part} part has not 250 different examples\. Lower .*{option}"):
        command.main()
    assert not [path for path in tmp_path.rglob("*") if path.name != "data"], "nothing is left of them"


def test_a_cell_that_fails_costs_no_other(place, monkeypatch):
    """In threads, in place of processes."""

    def work(cell: Cell, _place: Place, _threads: int) -> dict[str, float] | None:
        if cell.family == "hydralora":
            raise ExportError("it diverged")
        return None if cell.family == "lora" else {"mean": 12.34}

    monkeypatch.setattr(command, "own_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(command, "_work", work)
    told = io.StringIO()
    failures = command._run_cells(quick_grid([0]), place, 2, reporter_into(told))
    assert failures == ["hydralora-k4-ffn-s0: it diverged"]
    lines = sorted(line.partition(" s: ")[2] for line in told.getvalue().splitlines())
    assert lines == [
        "base: 12.3",
        "hydralora-k4-ffn-s0: it diverged",
        "lora-ffn-s0: another process is at it",
        "moelora-k4-ffn-s0: 12.3",
        "teamlora-k4-ffn-half-s0: 12.3",
        "teamlora-k4-ffn-s0: 12.3",
    ]


def _worked(cell: Cell, _place: Place, _threads: int) -> dict[str, float]:
    if cell.family == "hydralora":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"mean": 12.34}


def test_a_worker_that_is_killed_costs_no_other_cell(place, monkeypatch):
    fork(monkeypatch, _worked)
    monkeypatch.setattr(command, "_INTERRUPTION_SECONDS", 0)
    told = io.StringIO()
    failures = command._run_cells(quick_grid([0]), place, 2, reporter_into(told))
    (failure,) = failures
    assert failure.startswith(
        "hydralora-k4-ffn-s0: its process was ended (out of memory, or by a signal?); the same command goes on"
    )
    assert told.getvalue().count(": 12.3") == len(quick_grid([0])) - 1


def test_a_worker_that_is_interrupted_ends_where_a_training_may_stop():
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(BENCH)!r}]
import claims
from teamlora_export import interrupt

def run(cell, place):
    with interrupt.held():
        os.kill(os.getpid(), signal.SIGTERM)
        print("still at it", flush=True)
    print("went on", flush=True)

claims.run_cell = run
claims._work(None, None, 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "still at it\n")
    assert "Interrupted" in done.stderr


def _interrupted(cell: Cell, place: Place, _threads: int) -> None:
    """As of Ctrl-C, which a worker may answer before the command does."""
    (place.folder / cell.name).touch()
    os.kill(os.getppid(), signal.SIGINT)
    os._exit(2)


def _at_work(cell: Cell, place: Place, _threads: int) -> None:
    """As of a signal to the command alone."""
    (place.folder / cell.name).touch()
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(600)


@pytest.mark.parametrize("work", [_interrupted, _at_work])
def test_nothing_begins_or_goes_on_after_an_interruption(work, place, monkeypatch):
    fork(monkeypatch, work)
    # As long as it may take until the interruption is known; those that it did not come to end at once.
    monkeypatch.setattr(command, "_INTERRUPTION_SECONDS", SECONDS)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))
    grid = quick_grid([0])

    def late(*given: Any) -> None:
        """When the end of a worker that it came to before is known."""
        time.sleep(0.5)
        signal.default_int_handler(*given)

    before = signal.signal(signal.SIGINT, late)
    try:
        with pytest.raises(KeyboardInterrupt):
            command._run_cells(grid, place, 1, Reporter(quiet=True))
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in place.folder.iterdir()] == [grid[0].name]
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(CancelledError):
        command._alone(grid[1], place, 1, stopped)


def test_kept_timings_are_of_the_same_settings_base_and_code(place, monkeypatch, tmp_path):
    given = asked_for("steps")
    (row,) = command._timed(place, "steps", given, lambda: [{"a": 1}])
    assert row["a"] == 1 and row["machine"]["cores"] >= 1
    given.parts = []

    def kept(of: Place) -> list:
        return command._timed(of, "steps", given, lambda: pytest.fail("measured"))

    assert kept(place) == [row]
    other = tmp_path / place.base.name
    shutil.copytree(place.base, other)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert kept(dataclasses.replace(place, base=other)) == []
    assert kept(dataclasses.replace(place, settings=dataclasses.replace(TINY, rank=16))) == []
    monkeypatch.setattr(command, "whole_version", lambda: "otherone")
    assert kept(place) == []
    given.any_version = True
    assert kept(place) == [row]


def test_steps_of_some_cells_are_shown_where_they_are_asked_for(place, monkeypatch):
    monkeypatch.setattr("method.steps.time_steps", lambda _place, _experts, targets, *_: [{"targets": targets}])
    given = asked_for("steps", cells=["lora-ffn"])

    def targets() -> list[str]:
        return [row["targets"] for row in command._steps(place, given, Reporter(quiet=True))]

    assert targets() == ["ffn", "all"]
    given.parts = ["scores"]
    assert targets() == []
    given.cells = []
    assert targets() == ["ffn", "all"]


def test_inference_is_timed_of_each_group_of_the_chosen_cells_and_kept_group_by_group(place, monkeypatch):
    timed: list[str] = []

    def measure(_place: Place, cell: Cell, *_: object) -> list[dict[str, str]]:
        timed.append(cell.group)
        return [{"group": cell.group}]

    monkeypatch.setattr(inference, "time_inference", measure)
    given = asked_for("inference")

    def groups(cells: list[Cell]) -> list[str]:
        return [row["group"] for row in command._inference(cells, place, given, [], Reporter(quiet=True))]

    grid = full_grid([0, 1])
    assert groups(command._chosen(grid, ["base", "lora-ffn", "teamlora-k8-ffn*"])) == ["lora-ffn", "teamlora-k8-ffn"]
    assert timed == ["lora-ffn", "teamlora-k8-ffn"]
    given.parts = ["scores"]
    assert groups(grid) == ["lora-ffn", "teamlora-k8-ffn"], "what was kept, in the order of the grid"
    assert groups(command._chosen(grid, ["lora-ffn"])) == ["lora-ffn"]
    assert len(timed) == 2
    given.parts = ["inference"]
    assert len(groups(grid)) == 20 and len(groups(quick_grid([0]))) == 4


def test_the_adapter_that_is_exported_is_kept_for_any_seed(place):
    assert Cell("teamlora", 4, "ffn", 1.0, 3).keeps_adapter and not Cell("teamlora", 2, "ffn", 1.0, 3).keeps_adapter
    told = io.StringIO()
    given = asked_for("exports", quick=True, seeds=[9])
    assert command._exports(quick_grid([9]), place, given, reporter_into(told)) == []
    assert "Exports: left out. They are of teamlora-k4-ffn-s9, which is not trained." in told.getvalue()


def test_only_a_folder_that_a_run_wrote_is_replaced(tmp_path):
    found = {"title": "A look", "notes": [], "scores": [], "steps": [], "inference": [], "exports": []}
    out = tmp_path / "out"
    for title in ("A look", "Another"):
        write_figures({**found, "title": title}, out)
        assert (out / "README.md").read_text().startswith(f"# {title}")
        assert json.loads((out / "figures.json").read_text())["title"] == title
    (out / "README.md").write_text("my own notes")
    foreign = tmp_path / "clone"
    foreign.mkdir()
    (foreign / "README.md").write_text("my own notes")
    before = tmp_path / "before"
    write_figures(found, before)
    figures = json.loads((before / "figures.json").read_text())
    (before / "figures.json").write_text(json.dumps({**figures, "written_by": ""}))
    (before / "README.md").write_text("my own notes")
    for folder, told in (
        (before, "an earlier version of it may have. .* Or remove that folder"),
        (out, "README.md: is not a file that"),
        (foreign, "no figures of this program are in it"),
    ):
        with pytest.raises(ExportError, match=told):
            require_output(folder)
        with pytest.raises(ExportError, match=told):
            write_figures(found, folder)
        assert (folder / "README.md").read_text() == "my own notes"


def test_the_command_runs_what_is_missing_and_writes_what_it_found(base, tmp_path, monkeypatch):
    asked = ("--quick", "--base", base, "--cache", tmp_path / "cache", "--cells", "base", "moelora*", *FEW)
    done = claims(*asked, "-o", tmp_path / "out", "--jobs", 2)
    assert done.returncode == 0, done.stderr
    assert "2 of 2, after" in done.stderr
    found = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert [result["cell"] for result in found["scores"]] == ["base", "moelora-k4-ffn-s0"]
    assert (found["missing"], found["quick"], found["settings"]["steps"]) == ([], True, 2)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text == done.stdout and "A quick run" in text
    again = claims(*asked)
    assert again.returncode == 0 and " of 2, after" not in again.stderr
    assert claims("--jobs", 0).returncode == 2
    ask(monkeypatch, *asked, "--seeds", 5, "--cells", "nothing")
    with pytest.raises(ExportError, match="none of base, teamlora-k4-ffn-s5"):
        command.main()
