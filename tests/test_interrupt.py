"""Commands that end early, by Ctrl-C or killed: one sentence where there is time for it, and all on disk is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, random_adapter

from teamlora_export.adapter import write_adapter


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether the program has begun to take signals (Python itself leaves SIGTERM alone)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def test_interruptions_are_taken_before_anything_slow_is_imported():
    program = """
import sys
from teamlora_export import __main__, interrupt

interrupt.reported.__enter__ = lambda _: sys.exit(f"{sorted({'typer', 'rich', 'numpy', 'torch'} & set(sys.modules))}")
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_the_first_moments_is_one_sentence(kind, make_base, make_adapter, tmp_path):
    command = [sys.executable, "-m", "teamlora_export", "onnx", make_base("llama").name, "-a", make_adapter("llama")]
    for delay in (0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3):
        process = subprocess.Popen([*command, "-o", tmp_path / "out"], stderr=subprocess.PIPE, text=True)
        while not listens(process):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(kind)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (2, "Error: Interrupted; nothing was written.\n"), delay
    assert not list(tmp_path.iterdir())


def test_an_interruption_after_a_result_says_that_it_is_there(tmp_path):
    program = """
import os, signal, sys, time
from pathlib import Path
from teamlora_export import interrupt, staging

with interrupt.reported():
    staging.write_aside(Path(sys.argv[1]), "new")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == f"Error: Interrupted; was written whole before: {tmp_path / 'out'}.\n"


def test_whatever_a_library_makes_of_an_interruption_is_one(tmp_path):
    program = """
import os, signal
from teamlora_export import cli
from teamlora_export.errors import ExportError

def work(**_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise {error} from None

cli.app = work
cli.main()
"""
    for error in ("ImportError('numpy')", "SystemError('returned NULL')", "ExportError('no such module')"):
        command = [sys.executable, "-c", program.format(error=error)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (2, "Error: Interrupted; nothing was written.\n"), error


# One process that forks: a child for some of the file operations of a real run, which is killed there.
_KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path

from teamlora_export.bundle import check_files, read_bundle
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.model_folder import check_files as check_deployment
from teamlora_export.export import export_onnx
from teamlora_export.progress import Reporter

base, first, second, root = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
QUIET = Reporter(quiet=True)
# Two bundles that differ, to tell old from new; the graph is kept from the first.
OLD, NEW = (export_onnx(base, *named, reporter=QUIET) for named in ((first, root / "old"), (second, root / "new")))
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock")


def count(run, kill_at=0):
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event in OPERATIONS:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        sys.addaudithook(watch)
        run()
        os.write(writing, str(seen).encode())
        os._exit(0)
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (-signal.SIGKILL if kill_at else 0), code
    return int(os.read(reading, 20) or 0)


def whole_bundle(out):
    bundle = read_bundle(out)
    check_files(bundle)
    assert bundle.manifest.sha256 in (OLD.manifest.sha256, NEW.manifest.sha256)


def copy(out):
    shutil.copytree(OLD.folder, out)


def export(out):
    export_onnx(base, second, out, reporter=QUIET)


def whole_deployment(out):
    check_deployment(out, json.loads((out / "deploy.json").read_text())["files"])


CASES = {
    "bundle": (copy, export, whole_bundle),
    "deployment": (lambda out: deploy_python(OLD, out), lambda out: deploy_python(NEW, out), whole_deployment),
}
for name, (prepare, run, check) in CASES.items():
    place = root / name
    place.mkdir()
    out = place / "out"
    prepare(out)
    most = count(lambda: run(out))
    # Everywhere, and at each operation of the end, where the old makes place for the new.
    for number in sorted({*range(1, most, max(1, most // 8)), *range(most - 14, most + 1)}):
        shutil.rmtree(out)
        prepare(out)
        count(lambda: run(out), number)
        check(out)
        run(out)
        check(out)
        assert [path.name for path in place.iterdir()] == ["out"], number
    print(name, most)
"""


def test_a_killed_export_or_deployment_leaves_the_old_or_the_new_and_the_next_run_nothing_else(
    make_base, make_adapter, tmp_path
):
    other = tmp_path / "other"
    write_adapter(random_adapter(make_base("llama"), ARCHITECTURES["llama"].targets, seed=5), other)
    command = [sys.executable, "-c", _KILLED, make_base("llama").name, make_adapter("llama"), other, tmp_path]
    environment = {**os.environ, "TEAMLORA_EXPORT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
