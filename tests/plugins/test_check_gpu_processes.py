"""`scripts/check_gpu`: steps and commands that crash, hang, or leave others behind, and an end from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_check.processes import apart, command
from gpu_check.steps import Failed, LeftOut, Limit, Steps

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEN_SECONDS = Limit(10, is_own=True)


def is_gone(pid: int) -> bool:
    """Within some seconds. Nobody may ask for how it ended: what is left is then a zombie."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_a_step_on_the_gpu_that_crashes_or_hangs_ends_alone_and_keeps_what_it_found():
    steps, found = Steps(8), []

    def crashes(tell):
        tell("a figure")
        os.kill(os.getpid(), signal.SIGKILL)

    def left_out(tell):
        raise LeftOut("no such thing")

    def hangs(tell):
        time.sleep(60)

    def hangs_later(tell):
        tell("another")
        time.sleep(60)

    assert not steps.run("crash", lambda: apart(crashes, found.append, TEN_SECONDS))
    assert not steps.run("exit", lambda: apart(lambda _: os._exit(3), found.append, TEN_SECONDS))
    assert not steps.run("hang", lambda: apart(hangs, found.append, Limit(0.3, is_own=True)))
    assert not steps.run("late", lambda: apart(hangs, found.append, Limit(0.3, is_own=False)))
    assert not steps.run("stuck", lambda: apart(hangs_later, found.append, Limit(30, is_own=False, each=1.5)))
    assert not steps.run("left out", lambda: apart(left_out, found.append, TEN_SECONDS))
    assert not steps.run("error", lambda: apart(lambda _: str(1 // 0), found.append, TEN_SECONDS))
    assert steps.run("fine", lambda: apart(lambda tell: tell(2) or "done", found.append, TEN_SECONDS))
    assert found == ["a figure", "another", 2]
    states = [outcome.state for outcome in steps.outcomes]
    assert states == ["failed", "failed", "failed", "left out", "failed", "left out", "failed", "passed"]
    texts = [outcome.text for outcome in steps.outcomes]
    assert texts[:2] == ["its process ended with SIGKILL", "its process ended with code 3"]
    assert texts[2].startswith("not done after 0 s, and ended")
    assert texts[3] == "not done after 0 s, and there was no more time for it"
    assert texts[4].startswith("nothing for 2 s, and ended")
    assert texts[5] == "no such thing"
    assert texts[6].startswith("ZeroDivisionError") and "Traceback" in texts[6]


def test_a_step_that_dies_is_told_at_once_though_another_holds_its_pipe_open():
    left = []

    def leaves_one_behind(tell):
        forked = os.fork()
        if forked == 0:
            time.sleep(60)
        tell(forked)
        os._exit(3)

    begin = time.monotonic()
    with pytest.raises(Failed, match="its process ended with code 3"):
        apart(leaves_one_behind, left.append, Limit(60, is_own=True))
    assert time.monotonic() - begin < 30
    assert is_gone(left[0])


@pytest.mark.parametrize(("after", "seconds"), [("wait", 0.3), ("exit 3", 10)], ids=["too late", "in time"])
def test_what_a_command_began_ends_with_it(tmp_path, after, seconds):
    body = f"sleep 60 & echo $! > {tmp_path / 'pid'}; echo said; echo told >&2; {after}"
    begin = time.monotonic()
    if after == "wait":
        with pytest.raises(Failed, match="not done after 0 s"):
            command(["sh", "-c", body], Limit(seconds, is_own=True))
    else:
        done = command(["sh", "-c", body], Limit(seconds, is_own=True))
        assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "told\n")
    assert time.monotonic() - begin < 9
    assert is_gone(int((tmp_path / "pid").read_text()))


STEP = """
import os, time
from gpu_check.processes import Stopped, apart, command, leave, stopped_by_signals
from gpu_check.steps import Limit

def step(tell):
    print(os.getpid(), flush=True)
    time.sleep(60)

try:
    with stopped_by_signals():
        {call}
except Stopped as reason:
    leave(128 + reason.signal)
"""


def begun(script: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_what_runs_ends_with_the_check(how):
    """However that ends."""
    script = STEP.format(call="apart(step, print, Limit(60, True))")
    with begun(script) as check:
        assert check.stdout is not None
        pid = int(check.stdout.readline())
        check.send_signal(how)
        assert check.wait(10) == (128 + how if how == signal.SIGTERM else -how)
        assert is_gone(pid)


def test_a_command_ends_with_the_check(tmp_path):
    """Killed, which it cannot tell others."""
    pid = tmp_path / "pid"
    body = f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60"
    with begun(STEP.format(call=f"command(['sh', '-c', {body!r}], Limit(60, True))")) as check:
        end = time.monotonic() + 20
        while not pid.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        check.kill()
        assert is_gone(int(pid.read_text()))


def test_the_check_does_not_wait_for_a_process_that_cannot_be_ended():
    """Here for one that sleeps."""
    script = """
import multiprocessing, time
from gpu_check.processes import leave
other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
other.start()
print(other.pid)
leave(3)
"""
    with begun(script) as check:
        assert check.stdout is not None
        pid = int(check.stdout.readline())
        try:
            assert check.wait(20) == 3
        finally:
            os.kill(pid, signal.SIGKILL)
