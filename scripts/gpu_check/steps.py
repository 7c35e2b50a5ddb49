"""Runs the steps in turn, each with a line when it begins and one when it ends, within a time for all."""

from __future__ import annotations

import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass


class LeftOut(Exception):
    """A step cannot be made here; its message says why. No failure."""


@dataclass(frozen=True)
class Outcome:
    """Of a step: "passed", "failed" or "left out", its seconds, and what it said at its end."""

    name: str
    state: str
    seconds: float
    text: str


class Steps:
    """Args: `minutes`: for all together. A step that would begin later is left out."""

    def __init__(self, minutes: float) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + 60 * minutes
        self.outcomes: list[Outcome] = []

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", flush=True)

    def run(self, name: str, step: Callable[[], str], takes: float = 0.0) -> bool:
        """Run `step`, which returns what is to be said of it; whether it passed.

        Args:
            takes: seconds that it is known to take at least.
        """
        self.say(f"{name} ...")
        begin = time.monotonic()
        try:
            if self.left() < takes:
                raise LeftOut(f"{self.left():.0f} s are left, and it takes {takes:.0f}")
            state, text = "passed", step()
        except LeftOut as reason:
            state, text = "left out", str(reason)
        except subprocess.TimeoutExpired as reason:
            state, text = "left out", f"not done after {reason.timeout:.0f} s"
        except Exception as error:
            # Whatever a broken step raises, the others still tell something.
            state, text = "failed", f"{type(error).__name__}: {error}"
            if not isinstance(error, RuntimeError):
                text += "\n" + traceback.format_exc()
        self.outcomes.append(Outcome(name, state, round(time.monotonic() - begin, 2), text))
        self.say(f"{name}: {state}{', ' if text else ''}{text}")
        return state == "passed"

    def failed(self) -> bool:
        return any(outcome.state == "failed" for outcome in self.outcomes)

    def as_fields(self) -> list[dict[str, object]]:
        return [asdict(outcome) for outcome in self.outcomes]
