"""Steps and commands in processes of their own, which end with what they began: at their end, at a limit, and with this
one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gpu_check.steps import Failed, LeftOut, Limit, judged

_TO_END = 10.0
# How often it is looked whether a process is still there: others may hold its pipe open.
_LOOK_SECONDS = 0.2
_PR_SET_PDEATHSIG, _KILL = 1, ctypes.c_ulong(signal.SIGKILL)
# Found before a fork, behind which nothing must be waited for.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)

Step = Callable[[Callable[[Any], None]], str]


class Stopped(BaseException):
    """This process was asked to end, by `signal`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raises `Stopped` in here where a signal asks this process to end, for it to end its others first."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        # `timeout` asks twice: the process, and its group.
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    # Not what `nohup` has ignored.
    before: dict[int, Any] = {number: signal.getsignal(number) for number in _asked_to_end()}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_to_end() -> list[signal.Signals]:
    return [one for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]


def leave(code: int) -> NoReturn:
    """End this process at once. Python would wait for a process that it forked, even one that a driver keeps alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(
    words: Sequence[str | Path], limit: Limit, stdin: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a command says, and its code; all that it began is ended with it.

    Raises:
        LeftOut, Failed: it reaches `limit`.
    """
    # No pipes: what it leaves behind would hold them open.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile() as given:
        given.write(stdin.encode())
        given.seek(0)
        parent = os.getpid()
        process = subprocess.Popen(
            words,
            stdin=given,
            stdout=said,
            stderr=told,
            env=environment,
            process_group=0,
            preexec_fn=lambda: _end_with(parent),
        )
        try:
            process.wait(limit.seconds)
        except subprocess.TimeoutExpired:
            raise limit.reached() from None
        finally:
            _end_group(process.pid)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_TO_END)
        for file in (said, told):
            file.seek(0)
        return subprocess.CompletedProcess(words, process.returncode, said.read(), told.read())


def apart(step: Step, keep: Callable[[Any], None], limit: Limit) -> str:
    """What `step` returns, from a process of its own, forked from this one, which must not have touched the GPU.

    A kernel that reads what it may not leaves its process without a GPU, and one that never ends is waited for in
    vain: neither reaches the steps that follow.

    Args:
        step: takes a function that it gives what it finds, which is passed to `keep` here even if it fails later.

    Raises:
        LeftOut: `step` raises it, or `limit` says so.
        Failed: it raises anything else, its process is ended by a signal, or `limit` says so.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (step, sender, os.getpid())
    process = multiprocessing.get_context("fork").Process(target=_run_forked, args=arguments)
    process.start()
    sender.close()
    assert process.pid is not None
    try:
        return _answer(process, receiver, keep, limit)
    finally:
        # With what it began itself, such as compilers.
        _end_group(process.pid)
        process.kill()
        process.join(_TO_END)
        receiver.close()


def _answer(process: BaseProcess, receiver: Connection, keep: Callable[[Any], None], limit: Limit) -> str:
    deadline = time.monotonic() + limit.seconds
    found = time.monotonic()
    while True:
        # Before the pipe is looked into: what it wrote at last is then there.
        is_alive = process.is_alive()
        now = time.monotonic()
        until = min(deadline, found + limit.each)
        if receiver.poll(min(max(until - now, 0), _LOOK_SECONDS) if is_alive else 0):
            with suppress(EOFError):
                kind, value = receiver.recv()
                if kind == "ended":
                    return _text(*value)
                keep(value)
                found = time.monotonic()
                continue
            process.join(_TO_END)
            is_alive = False
        if not is_alive:
            code = process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"
            raise Failed(f"its process ended with {how}")
        if now >= until:
            raise limit.reached() if until == deadline else limit.reached_by_one()


def _text(state: str, text: str) -> str:
    if state != "passed":
        raise {"left out": LeftOut, "failed": Failed}[state](text)
    return text


def _run_forked(step: Step, sender: Connection, parent: int) -> None:
    # Of its own: with it ends what it began.
    os.setpgrp()
    for number in _asked_to_end():
        signal.signal(number, signal.SIG_DFL)
    _end_with(parent)
    answer = judged(lambda: step(lambda value: sender.send(("found", value))))
    sender.send(("ended", answer))
    sys.stdout.flush()
    sys.stderr.flush()
    # What CUDA does at a process's end can hang where a kernel went wrong.
    os._exit(0)


def _end_with(parent: int) -> None:
    """This process is killed when the one that forked it ends, however that ends."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, _KILL)
        if os.getppid() != parent:
            os._exit(1)


def _end_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
