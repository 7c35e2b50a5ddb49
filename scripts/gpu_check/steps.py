"""Runs the steps in turn, each with a line when it begins and one when it ends, within a time for all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

_TO_END = 10.0


class LeftOut(Exception):
    """A step cannot be made here; its message says why. No failure."""


class Failed(Exception):
    """A step failed, as its message tells in full."""


@dataclass(frozen=True)
class Outcome:
    """Of a step: "passed", "failed" or "left out", its seconds, and what it said at its end."""

    name: str
    state: str
    seconds: float
    text: str


class Steps:
    """Args: `minutes`: for all together. A step that would begin later is left out.
    `ended`: called after each step, for what is known by then not to be lost."""

    def __init__(self, minutes: float, ended: Callable[[], None] = lambda: None) -> None:
        self._begin = time.monotonic()
        self._end = self._begin + 60 * minutes
        self._ended = ended
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

        def in_time() -> str:
            if self.left() < takes:
                raise LeftOut(f"{self.left():.0f} s are left, and it takes {takes:.0f}")
            return step()

        state, text = _judged(in_time)
        self.outcomes.append(Outcome(name, state, round(time.monotonic() - begin, 2), text))
        self.say(f"{name}: {state}{', ' if text else ''}{text}")
        self._ended()
        return state == "passed"

    def failed(self) -> bool:
        return any(outcome.state == "failed" for outcome in self.outcomes)

    def as_fields(self) -> list[dict[str, object]]:
        return [asdict(outcome) for outcome in self.outcomes]


def apart(step: Callable[[Callable[[Any], None]], str], keep: Callable[[Any], None], seconds: float) -> str:
    """What `step` returns, from a process of its own, forked from this one, which must not have touched the GPU.

    A kernel that reads what it may not leaves its process without a GPU, and one that never ends is waited for in
    vain: neither reaches the steps that follow.

    Args:
        step: takes a function that it gives what it finds, which is passed to `keep` here even if it fails later.

    Raises:
        LeftOut: `step` raises it.
        Failed: it raises anything else, its process is ended by a signal, or is not done after `seconds`.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run_forked, args=(step, sender))
    process.start()
    sender.close()
    assert process.pid is not None
    deadline = time.monotonic() + seconds
    try:
        while receiver.poll(max(deadline - time.monotonic(), 0)):
            kind, value = receiver.recv()
            if kind == "found":
                keep(value)
                continue
            state, text = value
            if state != "passed":
                raise {"left out": LeftOut, "failed": Failed}[state](text)
            return text
        raise Failed(f"not done after {seconds:.0f} s, and ended: something waits for ever, or is much slower")
    except EOFError:
        process.join(_TO_END)
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"
        raise Failed(f"its process ended with {how}") from None
    finally:
        with suppress(ProcessLookupError):
            # With what it began itself, such as compilers.
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join(_TO_END)


def _run_forked(step: Callable[[Callable[[Any], None]], str], sender: Connection) -> None:
    # Of its own, but in the session: who ends the session ends it too.
    os.setpgrp()
    answer = _judged(lambda: step(lambda value: sender.send(("found", value))))
    sender.send(("ended", answer))
    sys.stdout.flush()
    sys.stderr.flush()
    # What CUDA does at a process's end can hang where a kernel went wrong.
    os._exit(0)


def _judged(step: Callable[[], str]) -> tuple[str, str]:
    """State and text of a step."""
    try:
        return "passed", step()
    except LeftOut as reason:
        return "left out", str(reason)
    except Failed as reason:
        return "failed", str(reason)
    except subprocess.TimeoutExpired as reason:
        return "left out", f"not done after {reason.timeout:.0f} s"
    except Exception as error:
        # Whatever a broken step raises, the others still tell something.
        text = f"{type(error).__name__}: {error}"
        return "failed", text if isinstance(error, RuntimeError) else f"{text}\n{traceback.format_exc()}"
