"""The figures as a table for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.adapters import BatchTiming
from gpu_check.kernels import Tuning
from gpu_check.machine import Description
from gpu_check.steps import Steps
from gpu_check.thresholds import Trial
from gpu_check.timing import Timing

_FORMAT_VERSION = 1


def line(timing: Timing) -> str:
    compiled = "" if timing.compiled is None else f", compiled {timing.compiled:.1f}"
    return (
        f"{timing.projection}, {timing.dtype}, {timing.tokens} tokens: {timing.ours:.1f} us = "
        f"{timing.ours / timing.floor:.2f} x its bytes = {timing.ours / timing.products:.2f} x two products; "
        f"eager {timing.eager:.1f}{compiled}; {'right' if timing.correct else 'WRONG'} ({timing.difference:.2f})"
    )


def table(timings: Sequence[Timing], trials: Sequence[Trial]) -> str:
    """Markdown. Times are in microseconds."""
    head = "| projection | dtype | tokens | ours | bytes | over them | products | over them | eager | compiled |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for one in timings:
        compiled = "" if one.compiled is None else f"{one.compiled:.1f}"
        mark = "" if one.correct else " WRONG"
        lines.append(
            f"| {one.projection} | {one.dtype} | {one.tokens:,} | {one.ours:.1f}{mark} | {one.floor:.1f} "
            f"| {one.ours / one.floor:.2f} | {one.products:.1f} | {one.ours / one.products:.2f} | {one.eager:.1f} "
            f"| {compiled} |"
        )
    return "\n".join(["", *lines, "", *map(str, trials), ""])


def as_fields(
    steps: Steps,
    description: Description,
    speed: float | None,
    tuning: Tuning | None,
    timings: Sequence[Timing],
    trials: Sequence[Trial],
    batches: Sequence[BatchTiming] = (),
) -> dict[str, Any]:
    """All that was found."""
    return {
        "format_version": _FORMAT_VERSION,
        "machine": dataclasses.asdict(description),
        "copy_bytes_a_second": speed,
        "tuning": None if tuning is None else dataclasses.asdict(tuning),
        "steps": steps.as_fields(),
        "timings": [dataclasses.asdict(timing) for timing in timings],
        "adapters": [dataclasses.asdict(batch) for batch in batches],
        "constants": [{**dataclasses.asdict(trial), "recommended": trial.recommended} for trial in trials],
    }


def write(path: Path, fields: dict[str, Any]) -> None:
    """As JSON. What was there is there until all is written.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(fields, indent=2) + "\n"
    if path.exists() and not path.is_file():
        # As /dev/null.
        path.write_text(text, encoding="utf-8")
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def require_place(path: Path) -> None:
    """For `write`. What is there stays.

    Raises:
        OSError: nothing can be written there.
    """
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    if not path.exists() or path.is_file():
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.touch()
        aside.unlink()
