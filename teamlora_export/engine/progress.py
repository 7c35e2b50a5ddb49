"""TensorRT's progress monitor on our reporter, and a way to stop a build."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from teamlora_export.progress import Reporter

_Result = TypeVar("_Result")


class BuildProgress(AbstractContextManager["BuildProgress"]):
    """Shows the phases of a build on a terminal. `cancel` makes TensorRT give up at its next step."""

    def __init__(self, trt: Any, reporter: Reporter) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=reporter.console,
            transient=True,
            disable=not reporter.console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self.cancelled = False
        self.monitor = _monitor_class(trt)(self)

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def cancel(self) -> None:
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        indent = "  " if parent in self._tasks else ""
        self._tasks[phase] = self._bar.add_task(indent + phase, total=steps)

    def advance(self, phase: str, step: int) -> None:
        if phase in self._tasks:
            self._bar.update(self._tasks[phase], completed=step + 1)

    def finish(self, phase: str) -> None:
        if phase in self._tasks:
            self._bar.remove_task(self._tasks.pop(phase))


def run_cancellable(work: Callable[[], _Result], cancel: Callable[[], None]) -> _Result:
    """Run `work` in a thread; an interruption of this one (Ctrl-C) is raised at once, and cancels it.

    TensorRT's builder does not return to Python for minutes, and swallows exceptions in its callbacks. It may go on
    for a while after it was cancelled, so `work` must hold on to all that it uses.
    """
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result()
    except BaseException:
        cancel()
        raise


def _monitor_class(trt: Any) -> type:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self, progress: BuildProgress) -> None:
            trt.IProgressMonitor.__init__(self)
            self._progress = progress

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._progress.start(phase, parent, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            self._progress.advance(phase, step)
            return not self._progress.cancelled

        def phase_finish(self, phase: str) -> None:
            self._progress.finish(phase)

    return Monitor
