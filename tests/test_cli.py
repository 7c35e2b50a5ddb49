"""The command line as a user meets it: exit codes, messages, and what is left on disk."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "teamlora_export.cli", *map(str, arguments)]
    if arguments[0] == "onnx" and "-o" in arguments:
        command.append("--retrace")
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.fixture
def adapter(tmp_path, make_adapter) -> Path:
    """A copy of the tiny Llama's adapter, to be broken."""
    return Path(shutil.copytree(make_adapter("llama"), tmp_path / "adapter"))


def processor_seconds() -> float:
    """Of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def edit_tensors(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LAYER = "base_model.model.model.layers.1.mlp.down_proj"
MALFORMED = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "neither adapter_model.safetensors nor",
    ),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("r: 8"), "cannot be read as JSON"),
    "truncated": (
        lambda f: os.truncate(f / "adapter_model.safetensors", 5000),
        "not a readable safetensors file",
    ),
    "empty": (lambda f: os.truncate(f / "adapter_model.safetensors", 0), "not a readable safetensors file"),
    "missing key": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.lora_B3.weight")),
        "lora_B3.weight is missing",
    ),
    "wrong k": (lambda f: edit_config(f, lora_nums=2), "lora_nums right"),
    "k does not divide r": (lambda f: edit_config(f, lora_nums=3), "does not divide"),
    "NaN": (lambda f: edit_tensors(f, lambda t: t[f"{LAYER}.lora_A.weight"].fill(np.nan)), "NaN"),
    "unknown module": (
        lambda f: edit_tensors(
            f,
            lambda t: [t.update({k.replace("layers.1", "layers.9"): t.pop(k)}) for k in list(t) if LAYER in k],
        ),
        "the base has no linear layer of that name",
    ),
    "hostile pickle": (
        lambda f: (
            (f / "adapter_model.safetensors").unlink(),
            # What it runs would be seen beside the adapter.
            (f / "adapter_model.bin").write_bytes(f"cos\nsystem\n(S'touch {f.parent}/ran'\ntR.".encode()),
        ),
        "refused or unreadable",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_adapter_is_one_message_and_leaves_nothing(name, adapter, tmp_path, make_base):
    breaks, message = MALFORMED[name]
    breaks(adapter)
    out = tmp_path / "out"
    before = processor_seconds()
    result = run("onnx", make_base("llama").name, "--adapter", adapter, "-o", out)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("Error:") == 1
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [adapter]
    # A few seconds, of which a busy machine's hyperthreads make more.
    assert processor_seconds() - before < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "./nowhere", "-a", "ADAPTER", "-o", "OUT"], "no such folder"),
        (["onnx", "BASE", "-a", "ADAPTER", "-o", "OUT", "--dtype", "int3"], "--dtype int3: unknown"),
        (["onnx", "BASE", "-a", "ADAPTER", "-o", "OUT", "--task", "dancing"], "--task dancing: unknown"),
        (["onnx", "BASE", "-a", "ADAPTER", "-o", "ADAPTER"], "which is read"),
        (["onnx", "BASE"], "Missing option"),
        (["validate", "ADAPTER"], "is not a bundle"),
        (["inspect", "BASE"], "neither an adapter"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, message, adapter, tmp_path, make_base):
    names = {"ADAPTER": adapter, "BASE": make_base("llama").name, "OUT": tmp_path / "out"}
    result = run(*(names.get(a, a) for a in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_and_what_is_plainly_wrong_do_not_import_torch(adapter, tmp_path, make_base):
    task = ("onnx", make_base("llama").name, "-a", adapter, "-o", tmp_path / "out", "--task", "dancing")
    for words, status in ((("--help",), 0), (("--version",), 0), (task, 2), (("validate", adapter), 2)):
        result = run(*words, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
        assert result.returncode == status
        assert "| typer" in re.sub(" +", " ", result.stderr), "imports are listed, indented by who imports them"
        assert "| torch" not in re.sub(" +", " ", result.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are libgomp's on Linux")
@pytest.mark.parametrize(
    ("given", "rounds"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(given, rounds):
    """As the library that they are of tells when it is loaded; left to themselves they would spin 300,000 rounds."""
    script = """
from contextlib import suppress
from teamlora_export.__main__ import main
with suppress(SystemExit):
    main()
import torch
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", script, "--version"]
    asked = {**environment, "OMP_DISPLAY_ENV": "verbose", **given}
    ended = subprocess.run(command, env=asked, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{rounds}'" in ended.stderr


def test_export_validate_and_inspect_tell_their_story(adapter, tmp_path, make_base):
    bundle = tmp_path / "bundle"
    exported = run("onnx", make_base("llama").name, "-a", adapter, "-o", bundle)
    assert exported.returncode == 0, exported.stderr
    assert "16 expert nodes" in exported.stdout
    report, figures = tmp_path / "report.html", tmp_path / "figures.json"
    validated = run("validate", bundle, "--report", report, "--json", figures)
    assert validated.returncode == 0, validated.stderr
    assert "Passed: 6 cases" in validated.stdout
    page = report.read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", ""), "the report needs no network"
    assert json.loads(figures.read_text())["passed"] is True
    inspected = run("inspect", bundle)
    assert "teamlora::MixedExpertProjection" in inspected.stdout
    assert "Attention 4 (in 4 of 4 layers), RotaryEmbedding 8 (in 4 of 4 layers)" in inspected.stdout
    assert "passed on" in inspected.stdout
    assert "router normaliser" in run("inspect", adapter).stdout


def test_a_changed_bundle_or_adapter_is_refused(adapter, tmp_path, make_bundle):
    source = make_bundle("llama")
    bundle = tmp_path / "bundle"
    shutil.copytree(source.folder, bundle)
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.write(b"\1\2\3\4")
    assert "SHA-256 differs" in run("validate", bundle).stderr
    shutil.copy(source.data, bundle)
    edit_tensors(adapter, lambda t: t[f"{LAYER}.lora_A.weight"].__iadd__(1))
    result = run("validate", bundle, "--adapter", adapter)
    assert result.returncode == 2
    assert "is not the adapter" in result.stderr


# The command, which gets a signal while the model is traced.
INTERRUPTED = """
import os
from teamlora_export import cli
from teamlora_export.graph import trace

forward, export = trace.TracedExpertLinear.forward, trace._export

def interrupted(self, x):
    os.kill(os.getpid(), int(os.environ["KIND"]))
    return forward(self, x)

def traced(*given):
    trace.TracedExpertLinear.forward = interrupted
    return export(*given)

trace._export = traced
cli.main()
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_the_old_bundle(kind, adapter, tmp_path, make_base, make_bundle):
    bundle = tmp_path / "bundle"
    shutil.copytree(make_bundle("llama").folder, bundle)
    before = {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()}
    words = ["onnx", make_base("llama").name, "-a", adapter, "-o", bundle, "--retrace"]
    command, environment = [sys.executable, "-c", INTERRUPTED, *words], {**os.environ, "KIND": str(int(kind))}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Interrupted; nothing was written." in done.stderr
    assert {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "bundle"]


def test_an_interruption_that_falls_into_a_finalizer_is_not_lost():
    program = """
import os, signal, time
from teamlora_export import cli

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def work(**_):
    Finalized()
    time.sleep(20)
    print("done")

cli.app = work
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "Interrupted; nothing was written." in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_missing_runtime_is_one_sentence_with_the_command_that_installs_it(make_bundle, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('No module', name='onnxruntime')")
    result = run("validate", make_bundle("llama").folder, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    assert "pip install 'teamlora-export[cpu]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_a_terminal_would_obey_is_shown_escaped_and_markup_as_it_is(adapter, tmp_path, make_base):
    edit_config(adapter, bias="\x1b[31m[red]\x07" + "x" * 70_000)
    result = run("inspect", adapter)
    assert result.returncode == 2
    assert r"\x1b[31m[red]\x07" in result.stderr
    assert "\x1b" not in result.stderr
    assert len(result.stderr.encode()) < 4096
    assert run("inspect", "--\x1b[31mred").stderr.count("\x1b") == 0


def test_results_are_whole_lines_or_json_where_no_terminal_reads_them(adapter, tmp_path):
    deep = tmp_path / ("folder-" * 20)
    shutil.copytree(adapter, deep)
    told = run("inspect", deep).stdout.splitlines()
    assert told[:2] == [f"Adapter {deep}", "family: teamlora"]
    printed = run("inspect", deep, "--json", "-").stdout
    assert json.loads(printed)["path"] == str(deep)
    written = tmp_path / "told.json"
    for _ in range(2):
        assert run("inspect", deep, "--json", written).stdout.splitlines() == told
    assert written.read_text() == printed
    written.write_text("{}")
    refused = run("inspect", deep, "--json", written)
    assert refused.stdout == "", "it is found before anything is shown"
    assert (refused.returncode, written.read_text()) == (2, "{}")
    assert "is no earlier result" in refused.stderr


def test_an_output_that_nobody_takes_is_one_sentence(adapter, tmp_path):
    command = [sys.executable, "-m", "teamlora_export.cli", "inspect", str(adapter)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "Error: The result cannot be printed (No space left on device).\n")
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")
    program = "import sys; from teamlora_export import cli_output as c; c.prepare_standard_files(); "
    reader = [sys.executable, "-c", program + "sys.exit(open('/dev/null').fileno())"]
    opened = subprocess.run(["sh", "-c", '"$@" <&- >&-', "sh", *reader])
    assert opened.returncode > 2, "a file that is opened later has the place of a standard one"
    unread = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert unread.stdout and unread.stderr
    unread.stdout.close()
    assert unread.stderr.read() == "Error: The result cannot be printed (Broken pipe).\n"
    assert unread.wait() == 2
    shutil.copytree(adapter, tmp_path / "é")
    ascii_only = run("inspect", tmp_path / "é", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ascii_only.returncode, r"\xe9" in ascii_only.stdout) == (0, True), ascii_only.stderr


def test_a_bundle_is_the_folder_that_the_command_runs_in(make_bundle):
    result = run("inspect", "--json", "-", cwd=make_bundle("llama").folder)
    assert json.loads(result.stdout)["task"] == "text-generation", result.stderr
    elsewhere = run("trt", "--fp16", cwd="/")
    assert elsewhere.returncode == 2
    assert "is not a bundle" in elsewhere.stderr
    assert "is empty" in run("inspect", "").stderr
    assert "--engine is empty" in run("validate", "--engine", "").stderr
    assert "--library is empty" in run("generate", ".", "x", "--library", "").stderr
