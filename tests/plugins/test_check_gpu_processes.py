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
from waiting import SECONDS, wait_until

SCRIPTS = Path(__file__).parents[2] / "scripts"
# Of what ends by itself; what does not goes on for so long that it has not ended by itself at a limit of these tests.
LIMIT, FOR_EVER = Limit(SECONDS, is_own=True), 600


def is_gone(pid: int) -> bool:
    """Nobody may ask for how it ended: what is left is then a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_step_on_the_gpu_that_crashes_or_hangs_ends_alone_and_keeps_what_it_found():
    steps, found = Steps(8), []

    def crashes(tell):
        tell("a figure")
        os.kill(os.getpid(), signal.SIGKILL)

    def left_out(tell):
        raise LeftOut("no such thing")

    def hangs(tell):
        time.sleep(FOR_EVER)

    def hangs_later(tell):
        tell("another")
        time.sleep(FOR_EVER)

    def stuck():
        """With more time on a machine that is so busy that its first figure comes too late."""
        for each in (1.5, 11.0, SECONDS):
            try:
                apart(hangs_later, found.append, Limit(FOR_EVER, is_own=False, each=each))
            except Failed:
                if "another" in found:
                    raise

    assert not steps.run("crash", lambda: apart(crashes, found.append, LIMIT))
    assert not steps.run("exit", lambda: apart(lambda _: os._exit(3), found.append, LIMIT))
    assert not steps.run("hang", lambda: apart(hangs, found.append, Limit(0.3, is_own=True)))
    assert not steps.run("late", lambda: apart(hangs, found.append, Limit(0.3, is_own=False)))
    assert not steps.run("stuck", stuck)
    assert not steps.run("left out", lambda: apart(left_out, found.append, LIMIT))
    assert not steps.run("error", lambda: apart(lambda _: str(1 // 0), found.append, LIMIT))
    assert steps.run("fine", lambda: apart(lambda tell: tell(2) or "done", found.append, LIMIT))
    assert found == ["a figure", "another", 2]
    states = [outcome.state for outcome in steps.outcomes]
    assert states == ["failed", "failed", "failed", "left out", "failed", "left out", "failed", "passed"]
    texts = [outcome.text for outcome in steps.outcomes]
    assert texts[:2] == ["its process ended with SIGKILL", "its process ended with code 3"]
    assert texts[2].startswith("not done after 0 s, and ended")
    assert texts[3] == "not done after 0 s, and there was no more time for it"
    assert texts[4].startswith(("nothing for 2 s, and ended", "nothing for 11 s", "nothing for 60 s"))
    assert texts[5] == "no such thing"
    assert texts[6].startswith("ZeroDivisionError") and "Traceback" in texts[6]


def test_a_step_that_dies_is_told_at_once_though_another_holds_its_pipe_open():
    left = []

    def leaves_one_behind(tell):
        forked = os.fork()
        if forked == 0:
            time.sleep(FOR_EVER)
        tell(forked)
        os._exit(3)

    # Were the pipe's end waited for, that would come later than the limit.
    with pytest.raises(Failed, match="its process ended with code 3"):
        apart(leaves_one_behind, left.append, LIMIT)
    wait_until(lambda: is_gone(left[0]))


@pytest.mark.parametrize("after", ["wait", "exit 3"], ids=["too late", "in time"])
def test_what_a_command_began_ends_with_it(tmp_path, after):
    pid = tmp_path / "pid"
    body = f"sleep {FOR_EVER} & echo $! > {pid}.new; mv {pid}.new {pid}; echo said; echo told >&2; {after}"
    if after == "wait":
        # With more time on a machine that is so busy that nothing has begun by then.
        for seconds in (0.3, 10.0, SECONDS):
            if not pid.exists():
                with pytest.raises(Failed, match=f"not done after {seconds:.0f} s"):
                    command(["sh", "-c", body], Limit(seconds, is_own=True))
    else:
        # Were what it began waited for, that would end later than the limit.
        done = command(["sh", "-c", body], LIMIT)
        assert (done.returncode, done.stdout, done.stderr) == (3, "said\n", "told\n")
    wait_until(lambda: is_gone(int(pid.read_text())))


STEP = """
import os, time
from gpu_check.processes import Stopped, apart, command, leave, stopped_by_signals
from gpu_check.steps import Limit

def step(tell):
    print(os.getpid(), flush=True)
    time.sleep(600)

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
    script = STEP.format(call="apart(step, print, Limit(600, True))")
    with begun(script) as check:
        assert check.stdout is not None
        pid = int(check.stdout.readline())
        check.send_signal(how)
        assert check.wait(SECONDS) == (128 + how if how == signal.SIGTERM else -how)
        wait_until(lambda: is_gone(pid))


def test_a_command_ends_with_the_check(tmp_path):
    """Killed, which it cannot tell others."""
    pid = tmp_path / "pid"
    body = f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep {FOR_EVER}"
    with begun(STEP.format(call=f"command(['sh', '-c', {body!r}], Limit(600, True))")) as check:
        wait_until(pid.exists)
        check.kill()
        wait_until(lambda: is_gone(int(pid.read_text())))


def test_the_check_does_not_wait_for_a_process_that_cannot_be_ended():
    """Here for one that sleeps."""
    script = """
import multiprocessing, time
from gpu_check.processes import leave
other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
other.start()
print(other.pid)
leave(3)
"""
    with begun(script) as check:
        assert check.stdout is not None
        pid = int(check.stdout.readline())
        try:
            assert check.wait(SECONDS) == 3
        finally:
            os.kill(pid, signal.SIGKILL)
