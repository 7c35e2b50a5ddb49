"""What whoever asks the scheduler gets back: tokens as they come, and why there are no more, or none at all.

The scheduler puts them there, by its own thread; any other may wait for them.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


class Overloaded(Exception):
    """So many requests wait already, or the server is closing: no more are taken."""


class Failed(Exception):
    """A request that was taken cannot be answered; the message says why."""


class Broken(Exception):
    """The model cannot be run any more, whoever asks: no more are taken. The message says how that was seen."""


class Late(Failed):
    """A request took longer than it was given."""


@dataclass(frozen=True)
class Token:
    """One of an answer's.

    Attributes:
        log_probability: see `log_probability`; None where it was not asked for.
    """

    id: int
    log_probability: float | None


class Answer:
    """The tokens of a request, one by one as they come; the one that ends the text is left out.

    Iterating raises `Failed` where the answer cannot be completed; whoever iterates again meets the same end. Who waits
    is told at the deadline that the request is late, also while the scheduler is in a call that does not come back.

    Args:
        deadline: of the clock, which is in seconds.
    """

    def __init__(self, deadline: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.cancelled = False
        self._deadline, self._clock = deadline, clock
        # None wakes who waits for a token that does not come.
        self._tokens: queue.SimpleQueue[Token | None] = queue.SimpleQueue()
        # Set once, behind the last token.
        self._end: str | Exception | None = None
        self._lock = threading.Lock()

    @property
    def finish(self) -> str:
        """Why it ended: "stop" (the model ended its text), "length", "cancelled", or "" (it has not, or failed)."""
        return self._end if isinstance(self._end, str) else ""

    def __iter__(self) -> Iterator[Token]:
        return self._until_end(wait=True)

    def arrived(self) -> Iterator[Token]:
        """Those that are there already."""
        return self._until_end(wait=False)

    def _until_end(self, wait: bool) -> Iterator[Token]:
        while True:
            # If so, all its tokens are there.
            is_over = self._end is not None
            left = min(max(0.0, self._deadline - self._clock()), threading.TIMEOUT_MAX)
            try:
                token = self._tokens.get(wait and not is_over, left)
            except queue.Empty:
                if is_over:
                    break
                if (late := self.overdue()) is not None:
                    self.end(late)
                elif not wait:
                    return
                continue
            if token is not None:
                yield token
        if isinstance(self._end, Exception):
            raise self._end

    def overdue(self) -> Late | None:
        """What it ends with after its deadline; None: before that."""
        return Late("The request took longer than its time limit.") if self._clock() > self._deadline else None

    def cancel(self) -> None:
        """No more tokens are wanted; the request's row is free at the next turn."""
        self.cancelled = True

    def put(self, token: Token) -> None:
        with self._lock:
            if self._end is None:
                self._tokens.put(token)

    def end(self, how: str | Exception) -> None:
        """The first end is the one that counts."""
        with self._lock:
            if self._end is None:
                self._end = how
                self._tokens.put(None)
