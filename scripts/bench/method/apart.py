"""Processes of their own, for one cell or one opening of models each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from teamlora_export.errors import ExportError

Result = TypeVar("Result")


def own_process() -> ProcessPoolExecutor:
    """A worker that nothing has run in; it ends with this process, however that ends."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _follow_parent)


def run_apart(function: Callable[..., Result], *arguments: object) -> Result:
    """What the function returns in a process of its own. Ctrl-C is told by this process alone, and ends both.

    Raises:
        ExportError: it does; or it cannot compute, or its process was ended.
    """
    with own_process() as worker:
        try:
            # The worker begins here, and is deaf from the start.
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                result = worker.submit(function, *arguments)
            finally:
                signal.signal(signal.SIGINT, before)
            return result.result()
        except BrokenProcessPool:
            raise ExportError("its process was ended (out of memory, or by a signal?).") from None
        except (RuntimeError, MemoryError) as error:
            # Its cause is the traceback of that process, which says less.
            told, *_ = str(error).splitlines() or [type(error).__name__]
            raise ExportError(f"it cannot be run ({told}).") from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _follow_parent() -> None:
    """A worker whose parent was killed would wait for ever, with all that it has loaded."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
