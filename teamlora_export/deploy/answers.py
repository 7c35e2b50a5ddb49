"""What whoever asks the scheduler gets back: tokens as they come, and why there are no more, or none at all.

The scheduler puts them there, by its own thread; any other may wait for them.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Seconds after which who waits for a token or the end of the scheduler's thread looks up: it may hang.
LOOK_UP = 1.0


class Overloaded(Exception):
    """So many requests wait already, or the server is closing: no more are taken."""


class Failed(Exception):
    """A request that was taken cannot be answered; the message says why."""


class Broken(Failed):
    """The model cannot be run any more, whoever asks; the message says how that was seen."""


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

    Iterating raises `Failed` where the answer cannot be completed.

    Args:
        overdue: why it is not to be waited for any longer; None: it is.

    Attributes:
        finish: why it ended: "stop" (the model ended its text), "length", "cancelled", or "" (it has not, or failed).
    """

    def __init__(self, overdue: Callable[[], Failed | None] = lambda: None) -> None:
        self.finish = ""
        self.cancelled = False
        self._overdue = overdue
        self._events: queue.SimpleQueue[Token | Exception | str] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens(wait=True)

    def arrived(self) -> Iterator[Token]:
        """Those that are there already."""
        return self._tokens(wait=False)

    def _tokens(self, wait: bool) -> Iterator[Token]:
        while wait or not self._events.empty():
            event = self._next()
            if isinstance(event, Token):
                yield event
                continue
            # Whoever iterates again meets the same end.
            self._events.put(event)
            if isinstance(event, Exception):
                raise event
            return

    def _next(self) -> Token | Exception | str:
        while True:
            try:
                return self._events.get(timeout=LOOK_UP)
            except queue.Empty:
                if (failure := self._overdue()) is not None:
                    self.cancel()
                    return failure

    def cancel(self) -> None:
        """No more tokens are wanted; the request's row is free at the next turn."""
        self.cancelled = True

    def put(self, token: Token) -> None:
        self._events.put(token)

    def end(self, how: str | Exception) -> None:
        if isinstance(how, str):
            self.finish = how
        self._events.put(how)
        # Who keeps the answer keeps nothing of the model.
        self._overdue = lambda: None
