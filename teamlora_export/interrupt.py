"""Interruptions, by Ctrl-C or a polite kill: what is being written goes away first, then one message tells the truth.

    reported    around a whole command, before its slow imports: takes signals, and says at the end what they meant
    held        around what must not stop half-way: an interruption waits until it is done

An interruption is raised in the main thread as `Interrupted`, so that every `finally` on its way cleans up. Whatever
else an interrupted library makes of it is still an interruption: `arrived` knows.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Interrupted(BaseException):
    """Ctrl-C or a polite kill. Not `KeyboardInterrupt`, which the command-line library turns into an exit of its
    own."""


class _Process:
    """Signals belong to a process, and so does this."""

    arrived = False
    holds = 0
    written: tuple[str, ...] = ()


class reported:
    """Takes signals as interruptions inside of the block, and leaves the process where one came."""

    def __enter__(self) -> None:
        sys.unraisablehook = _interrupt_again
        _answer(_interrupt)

    def __exit__(self, *raised: object) -> None:
        # Too late from here on: all is done, and there is nothing left to stop.
        _answer(signal.SIG_IGN)


def _answer(handler: Any) -> None:
    try:
        for kind in _SIGNALS:
            signal.signal(kind, handler)
        if arrived():
            leave()
    except Interrupted:
        leave()


def arrived() -> bool:
    """Whether an interruption came, whatever became of its exception."""
    return _Process.arrived


class held:
    """An interruption that comes inside of the block is raised at its end."""

    def __enter__(self) -> None:
        _Process.holds += 1

    def __exit__(self, *raised: object) -> None:
        _Process.holds -= 1
        if _Process.arrived and not _Process.holds:
            raise Interrupted


def note_written(what: object) -> None:
    """`what` has taken its place, and an interruption does not undo it."""
    _Process.written = (*_Process.written, str(what))


def leave() -> NoReturn:
    """Say what an interrupted command leaves behind, and end at once: a builder may still be at work in a thread."""
    kept = f"was written whole before: {', '.join(_Process.written)}" if _Process.written else "nothing was written"
    try:
        os.write(2, f"Error: Interrupted; {kept}.\n".encode(errors="replace"))
        sys.stdout.flush()
    finally:
        os._exit(2)


def _interrupt(_signal: int, _frame: object) -> None:
    _Process.arrived = True
    if not _Process.holds:
        raise Interrupted


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a finalizer; an interruption that fell there comes once more, a moment later."""
    if isinstance(dropped.exc_value, Interrupted):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)
