"""Runs the steps in turn, each with a line when it begins and one when it ends, within a time for all."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass

_HANGS = "something waits for ever, or is much slower"


class LeftOut(Exception):
    """A step cannot be made here; its message says why. No failure."""


class Failed(Exception):
    """A step failed, as its message tells in full."""


@dataclass(frozen=True)
class Limit:
    """Of a step.

    Attributes:
        seconds: at most. is_own: beyond them it hangs; otherwise they are what is left for all, and say nothing of it.
        each: seconds from one of its figures to the next, beyond which it hangs.
    """

    seconds: float
    is_own: bool
    each: float = math.inf

    def reached(self) -> Failed | LeftOut:
        if self.is_own:
            return Failed(f"not done after {self.seconds:.0f} s, and ended: {_HANGS}")
        return LeftOut(f"not done after {self.seconds:.0f} s, and there was no more time for it")

    def reached_by_one(self) -> Failed:
        """By one figure."""
        return Failed(f"nothing for {self.each:.0f} s, and ended: {_HANGS}")


@dataclass(frozen=True)
class Outcome:
    """Of a step: "passed", "failed" or "left out", its seconds, and what it said at its end."""

    name: str
    state: str
    seconds: float
    text: str


class Steps:
    """Args: `minutes`: for all together. A step that would begin later is left out.
    `save`: called after each step, for what is known by then not to be lost."""

    def __init__(self, minutes: float, save: Callable[[], None] = lambda: None) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + 60 * minutes
        self.save = save
        self.outcomes: list[Outcome] = []

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def limit(self, own: float = math.inf, each: float = math.inf, more: float = 0.0) -> Limit:
        """Of a step that hangs if it takes longer than `own`. It may take `more` seconds than are left for all."""
        left = max(self.left(), 1) + more
        return Limit(min(own, left), own <= left, each)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", flush=True)

    def run(self, name: str, step: Callable[[], str], takes: float = 0.0) -> bool:
        """Run `step`, which returns what is to be said of it; whether it passed.

        Args:
            takes: seconds that it is known to take at least.
        """
        self.say(f"{name} ...")
        begin = time.monotonic()

        def in_time() -> str:
            if self.left() < takes:
                raise LeftOut(f"{self.left():.0f} s are left, and it takes {takes:.0f}")
            return step()

        state, text = judged(in_time)
        self.outcomes.append(Outcome(name, state, round(time.monotonic() - begin, 2), text))
        self.say(f"{name}: {state}{', ' if text else ''}{text}")
        self.save()
        return state == "passed"

    def failed(self) -> bool:
        return any(outcome.state == "failed" for outcome in self.outcomes)

    def as_fields(self) -> list[dict[str, object]]:
        return [asdict(outcome) for outcome in self.outcomes]


def judged(step: Callable[[], str]) -> tuple[str, str]:
    """State and text of a step."""
    try:
        return "passed", step()
    except LeftOut as reason:
        return "left out", str(reason)
    except Failed as reason:
        return "failed", str(reason)
    except Exception as error:
        # Whatever a broken step raises, the others still tell something.
        text = f"{type(error).__name__}: {error}"
        return "failed", text if isinstance(error, RuntimeError) else f"{text}\n{traceback.format_exc()}"
