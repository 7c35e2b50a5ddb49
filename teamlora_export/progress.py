"""What a person sees while a long step runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from teamlora_export.errors import printable


class Reporter:
    """Prints steps with their durations to standard error, so that standard output stays for results."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or _PatientConsole(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        self.console.print(printable(message), markup=False)

    def warn(self, message: str) -> None:
        self.console.print(printable(f"Warning: {message}"), style="yellow", markup=False)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show `label` while the block runs, and how long it took."""
        started = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(Text(printable(label))):
                yield
        else:
            yield
        self.say(f"{label}: {time.monotonic() - started:.1f} s")

    @contextmanager
    def bytes(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar in bytes; yields a function that takes the bytes done since its last call."""
        started = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(escape(printable(label)), total=total)
            yield lambda count: bar.advance(task, count)
        self.say(f"{label}: {total / 1e6:,.0f} MB in {time.monotonic() - started:.1f} s")


class _PatientConsole(Console):
    """Work goes on when nobody reads its progress any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
