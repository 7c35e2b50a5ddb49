"""Processes of their own: what ends them, and with whom they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import SECONDS, wait_until

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(BENCH))
from method.apart import run_apart  # noqa: E402

from teamlora_export.errors import ExportError  # noqa: E402


def signals(told: Path, parent: bool, sent: signal.Signals) -> None:
    """Tells its process, signals it or the one that waits for it, and would go on for long."""
    told.write_text(str(os.getpid()))
    os.kill(os.getppid() if parent else os.getpid(), sent)
    time.sleep(10 * SECONDS)


def fails(error: Exception) -> None:
    raise error


def test_what_is_returned_is_of_another_process_each_time():
    processes = {os.getpid(), run_apart(os.getpid), run_apart(os.getpid)}
    assert len(processes) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in processes - {os.getpid()})


@pytest.mark.parametrize(
    ("parent", "sent", "error"),
    [
        pytest.param(False, signal.SIGKILL, pytest.raises(ExportError, match="its process was ended"), id="killed"),
        pytest.param(True, signal.SIGINT, pytest.raises(KeyboardInterrupt), id="interrupted"),
    ],
)
def test_a_process_that_is_ended_or_interrupted_is_gone(parent, sent, error, tmp_path):
    with error:
        run_apart(signals, tmp_path / "told", parent, sent)
    told = int((tmp_path / "told").read_text())
    assert told != os.getpid() and not Path(f"/proc/{told}").exists()


def test_what_goes_wrong_in_it_is_one_sentence():
    with pytest.raises(ExportError, match=r"^it cannot be run \(no kernel\)\.$"):
        run_apart(fails, RuntimeError("no kernel\nat all"))
    with pytest.raises(ExportError, match=r"^a refusal$"):
        run_apart(fails, ExportError("a refusal"))


def test_it_takes_no_interruption_from_its_start_on(tmp_path):
    """A terminal's Ctrl-C comes to all processes: the command tells it once, and no other has a traceback."""
    code = (
        "import os, signal, sys, time\n"
        "from method.apart import run_apart\n"
        "from method.command import run\n"
        "if __name__ == '__main__':\n"
        "    run(lambda: run_apart(time.sleep, 600), 'Stopped here.')\n"
        "else:\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    time.sleep(600)\n"
    )
    done = _run(code, tmp_path, start_new_session=True)
    assert (done.returncode, done.stderr) == (130, b"Stopped here.\n")


def test_it_ends_where_the_command_was_killed(tmp_path):
    """It would wait for its next work for ever, with all that it has loaded."""
    code = (
        "import os\n"
        "from method.apart import own_process\n"
        "if __name__ == '__main__':\n"
        "    with own_process() as worker:\n"
        "        print(worker.submit(os.getpid).result(), flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    done = _run(code, tmp_path)
    worker = Path("/proc", done.stdout.decode().strip())
    assert done.returncode == -signal.SIGKILL and worker.name.isdecimal()
    wait_until(lambda: not worker.exists())


def _run(code: str, folder: Path, **how: bool) -> subprocess.CompletedProcess[bytes]:
    (folder / "a_command.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH.parents[1]), str(BENCH)])}
    command = [sys.executable, str(folder / "a_command.py")]
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=10 * SECONDS, **how)
