"""`scripts/check_gpu`: its dry run as a whole, and on stand-ins each branch that only a GPU or its tools would take."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_check import engines, onnxruntime_cuda, report
from gpu_check import main as check_gpu
from gpu_check.account import account
from gpu_check.adapters import Batch
from gpu_check.build import _run, build
from gpu_check.kernels import Kernels, Sizes, Tuning
from gpu_check.machine import Emulated, Gpu
from gpu_check.operation import by_pytorch, difference, make_call, ours, two_products
from gpu_check.sanitize import TOOLS, find_sanitizer, sanitize
from gpu_check.shapes import LLAMA_2_7B, PROJECTIONS
from gpu_check.steps import Failed, LeftOut, Limit, Steps
from gpu_check.thresholds import Trial, try_constants
from gpu_check.timing import Compiler, Stopwatch, Timing
from kernel_table import BEGIN, BEGIN_ADAPTERS, END, README, kernel_adapters_table, kernel_table
from waiting import wait_until

from teamlora_export.engine.toolchain import find_cuda

ROOT = Path(__file__).parents[2]
SIZES = Sizes("fp16", 3, 64, 4, 4, (32, 16))
A_MINUTE = Limit(60, is_own=True)
ROW = Timing("7B down", "fp16", 8, floor=2.0, ours=3.0, eager=30.0, products=6.0, compiled=None, difference=0.4)


@pytest.fixture(scope="module")
def kernels(programs) -> Kernels:
    return Kernels(programs / "libteamlora_emulated.so")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict]:
    """The whole script, with a stand-in for compute-sanitizer and no packages of ours for engines."""
    folder = tmp_path_factory.mktemp("check")
    sanitizer = executable(folder / "compute-sanitizer", 'shift 4; exec "$@"')
    environment = {**os.environ, "COMPUTE_SANITIZER": str(sanitizer)}
    command = [sys.executable, ROOT / "scripts" / "check_gpu", "--dry-run", "--no-engines", "--dtypes", "fp16"]
    done = subprocess.run([*command, "--json", folder / "out.json"], capture_output=True, text=True, env=environment)
    return done, json.loads((folder / "out.json").read_text()) if done.returncode in (0, 1) else {}


def executable(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_dry_run_makes_every_step_and_ends_well(dry_run):
    done, fields = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    states = {step["name"]: step["state"] for step in fields["steps"]}
    memcheck, racecheck, *others = [f"compute-sanitizer {tool}" for tool in TOOLS]
    # What tells most comes first.
    assert list(states) == [
        *("environment", "build", "device", "sweep against float64", "adapters in a graph", "times"),
        *("a batch of adapters", memcheck, racecheck, "constants of the plan", *others),
    ]
    assert set(states.values()) == {"passed"}
    assert "0 failures" in next(step["text"] for step in fields["steps"] if step["name"] == "sweep against float64")
    assert len(fields["timings"]) == 2 * 2
    assert all(0 <= row["difference"] <= 1 for row in fields["timings"])
    assert [row["rows"] for row in fields["adapters"]] == [3, 3]
    assert all(0 <= row["difference"] <= 1 for row in fields["adapters"])
    assert {trial["name"] for trial in fields["constants"]} == {
        *("few_tokens", "overlaps", "few_slices", "blocks_each", "split_width", "column_tiles")
    }
    assert "| tiny gate/up | fp16 | 40 |" in done.stdout
    assert re.search(r"^\[ +\d+ s\] All right$", done.stdout, re.MULTILINE)


def test_without_a_gpu_or_tools_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "find_cuda", lambda: None)
    assert check_gpu.main([]) == 2
    assert "no nvcc" in capsys.readouterr().err
    monkeypatch.undo()
    assert check_gpu.main([]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err
    silent = SimpleNamespace(is_available=lambda: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=silent))
    assert check_gpu.main([]) == 2
    assert "the GPU cannot be asked: its process ended with SIGKILL" in capsys.readouterr().err
    old = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (7, 5))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=old))
    assert check_gpu.main([]) == 2
    assert "compute capability 8.0 and newer" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert check_gpu.main(["--dry-run"]) == 2
    assert "PyTorch cannot be imported" in capsys.readouterr().err


def test_wrong_results_fail_the_run_and_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check_gpu, "build", lambda *_: (_ for _ in ()).throw(RuntimeError("c++ fails:\n  error: x")))
    assert check_gpu.main(["--dry-run", "--no-engines", "--json", str(tmp_path / "a.json")]) == 1
    printed = capsys.readouterr().out
    assert "build: failed, RuntimeError: c++ fails" in printed
    assert "FAILED\n" in printed
    assert [step["name"] for step in json.loads((tmp_path / "a.json").read_text())["steps"]] == ["environment", "build"]


@pytest.fixture
def check(tmp_path, kernels, programs, monkeypatch) -> check_gpu.Check:
    """A check that has been built."""
    made = check_gpu.Check(torch, find_cuda(), tmp_path, True, 1, Emulated(torch).describe(), Steps(8))
    made._programs = SimpleNamespace(library=programs / "libteamlora_emulated.so", sweep=tmp_path / "sweep")
    made.tuning = Tuning(16)
    return made


def test_a_wrong_row_fails_the_times(check, monkeypatch):
    monkeypatch.setattr(check_gpu, "time_all", lambda *_: iter([ROW, Timing(**{**vars(ROW), "difference": math.nan})]))
    with pytest.raises(RuntimeError, match=r"1 results are wrong, of them 7B down.*WRONG \(nan\)"):
        check._time(["fp16"])
    assert "3.0 WRONG |" in report.table(check.timings, [])


def test_rows_that_there_is_no_time_for_are_left_out_and_said(check, monkeypatch):
    monkeypatch.setattr(check_gpu, "time_all", lambda *_: iter([ROW, ROW]))
    monkeypatch.setattr(check._steps, "left", lambda: -1.0)
    monkeypatch.setattr(Compiler, "problem", "no Triton", raising=False)
    assert check._time(["fp16"]).startswith("1 rows; others were left out for lack of time")
    assert len(list(check.trials)) == 0
    check._try("fp16")
    assert len(check.trials) == 1


def test_a_sweep_that_fails_is_shown(check, tmp_path):
    executable(tmp_path / "sweep", "echo FAILED: tokens 3; echo 5 cases, 1 failures; exit 1")
    with pytest.raises(RuntimeError, match="FAILED: tokens 3\n  5 cases, 1 failures"):
        check._sweep()
    executable(tmp_path / "sweep", "exec sleep 60")
    check._steps = Steps(0)
    with pytest.raises(LeftOut, match="not done after 1 s"):
        check._sweep()


def test_a_sanitizer_is_found_or_left_out(check, tmp_path, monkeypatch):
    monkeypatch.delenv("COMPUTE_SANITIZER", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_sanitizer(tmp_path) is None
    (tmp_path / "bin").mkdir()
    there = executable(tmp_path / "bin" / "compute-sanitizer", "exit 0")
    assert find_sanitizer(tmp_path) == there
    monkeypatch.setattr(check_gpu, "find_sanitizer", lambda _: None)
    with pytest.raises(LeftOut, match="no compute-sanitizer"):
        check._sanitize("memcheck")


def test_what_a_sanitizer_finds_fails_its_step(tmp_path):
    tool = executable(tmp_path / "tool", 'echo "$@" >&2; [ "$2" != racecheck ] || { echo hazard; exit 86; }')
    with pytest.raises(RuntimeError, match="racecheck ends with code 86:\n  hazard"):
        sanitize(tool, "racecheck", tmp_path / "sweep", A_MINUTE)
    assert sanitize(tool, "memcheck", tmp_path / "sweep", A_MINUTE).endswith("sweep --small")
    assert sanitize(tool, "initcheck", tmp_path / "sweep", A_MINUTE).endswith("--small --no-poison")
    slow = executable(tmp_path / "slow", "exec sleep 600")
    with pytest.raises(LeftOut, match="not done after 0 s"):
        sanitize(slow, "memcheck", tmp_path / "sweep", Limit(0.1, is_own=False))


def test_a_sanitizer_that_has_no_access_to_the_device_is_left_out(tmp_path):
    """As in some sandboxes."""
    tool = executable(tmp_path / "tool", 'echo "========= Error: Device not supported. Please refer to .."; exit 1')
    with pytest.raises(LeftOut, match=r"compute-sanitizer does not work here: .* Device not supported"):
        sanitize(tool, "memcheck", tmp_path / "sweep", A_MINUTE)


def test_figures_are_written_after_each_step(monkeypatch, tmp_path):
    """A run that is killed at its end has those of the steps before."""
    path = tmp_path / "a.json"
    seen = []
    monkeypatch.setattr(check_gpu, "build", lambda *_: seen.append(json.loads(path.read_text())["steps"]) or 1 // 0)
    assert check_gpu.main(["--dry-run", "--no-engines", "--json", str(path)]) == 1
    assert [step["name"] for step in seen[0]] == ["environment"]


def test_each_figure_is_written_at_once(check, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    check._steps = Steps(8, save=lambda: check.write(path))

    def rows(*_: object):
        """Of the step's own process."""
        yield ROW
        wait_until(lambda: path.exists() and json.loads(path.read_text())["timings"])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(check_gpu, "time_all", rows)
    assert not check._run("times", lambda: check._time(["fp16"]))
    assert check._steps.outcomes[0].text == "its process ended with SIGKILL"


def test_figures_that_cannot_be_written_leave_those_before_and_end_no_step(check, tmp_path, monkeypatch, capsys):
    assert check_gpu.main(["--dry-run", "--json", str(tmp_path / "none" / "a.json")]) == 2
    assert "nothing can be written to" in capsys.readouterr().err
    assert check_gpu.main(["--dry-run", "--json", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err
    path = tmp_path / "a.json"
    check._steps = Steps(8, save=lambda: check.write(path))
    assert check._steps.run("first", lambda: "")

    def fills(path, text, **_: object):
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fills)
        assert check._steps.run("second", lambda: "")
        assert check._steps.run("third", lambda: "")
    assert [one["name"] for one in json.loads(path.read_text())["steps"]] == ["first"]
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert capsys.readouterr().out.count("No space left on device") == 1, "told once"
    assert check.unwritten is not None
    assert check._steps.run("fourth", lambda: "")
    assert len(json.loads(path.read_text())["steps"]) == 4 and check.unwritten is None


def test_times_that_the_clock_cuts_off_fail_only_where_a_row_is_wrong(check, monkeypatch):
    limits = [0.3, 2, 0.3]
    monkeypatch.setattr(check, "_limit", lambda _: Limit(limits.pop(), is_own=False))

    def find(row):
        check._keep("timings", row)
        time.sleep(60)

    check._run("right", lambda: find(ROW))
    check._run("wrong", lambda: find(replace(ROW, difference=math.nan)))
    check._run("right again", lambda: find(ROW))
    assert [outcome.state for outcome in check._steps.outcomes] == ["left out", "failed", "left out"]
    assert "1 results are wrong, of them 7B down" in check._steps.outcomes[1].text


def test_only_a_step_of_a_gpu_has_a_limit_of_its_own(check):
    assert not check._limit(60).is_own
    assert check._limit(None).each == math.inf
    check._dry_run = False
    assert check._limit(60) == Limit(60, is_own=True)
    assert (check._limit(None).is_own, check._limit(None).each) == (False, 120)
    check._steps = Steps(0.5)
    assert not check._limit(60).is_own, "less is left than it may take"


def test_steps_without_time_are_left_out_and_errors_of_any_kind_fail_one_step_alone(capsys):
    steps = Steps(0.5)
    assert not steps.run("long", lambda: "", takes=60)
    assert not steps.run("broken", lambda: str(1 // 0))
    assert steps.run("fine", lambda: "done")
    assert [outcome.state for outcome in steps.outcomes] == ["left out", "failed", "passed"]
    assert "ZeroDivisionError" in steps.outcomes[1].text and "Traceback" in steps.outcomes[1].text
    assert "fine: passed, done" in capsys.readouterr().out


def test_both_programs_for_a_gpu_compile_and_one_that_does_not_names_its_errors(tmp_path):
    """For an H100. They end with an error here, where there is no driver, not with a crash."""
    programs = build(tmp_path, find_cuda(), "90")
    with pytest.raises(RuntimeError, match="the device cannot be asked"):
        Kernels(programs.library).tuning()
    swept = subprocess.run([programs.sweep, "--small"], capture_output=True, text=True)
    assert swept.returncode == 1
    assert "cudaMalloc" in swept.stdout
    with pytest.raises(RuntimeError, match=r"fails:\n  .*error"):
        _run(["c++", str(tmp_path / "none.cpp")], find_cuda()).check()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_kernels_and_pytorch_agree_and_a_wrong_y_does_not(kernels, dtype, tokens):
    sizes = Sizes(dtype, tokens, 64, 4, 4, (32, 16))
    call = make_call(torch, Emulated(torch), sizes)
    assert math.isnan(difference(torch, call)), "y is not there yet"
    ours(torch, Emulated(torch), kernels, call, Tuning(16))()
    assert difference(torch, call) <= 1
    right = call.y.clone()
    call.y.copy_(by_pytorch(torch, call))
    assert difference(torch, call) <= (1 if dtype == "fp32" else 2), "which rounds the experts' sum once more"
    call.y.copy_(right)
    call.y[:, 5] = call.base[:, 5]
    assert difference(torch, call) > 1, "a column without experts"
    two_products(torch, call)()


def test_a_shape_that_kernels_refuse_is_an_error(kernels):
    with pytest.raises(RuntimeError, match="could not be launched"):
        kernels.launch(Sizes("fp16", 1, 8, 99, 1, (8,)), Tuning(16), [0] * 6, 0)
    assert kernels.launches(Sizes("fp16", 0, 8, 2, 1, (8,)), Tuning(16)) == []


class Event:
    """CUDA's, on a clock that each replay moves by a millisecond."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Context:
    def __init__(self, *_: object, **__: object) -> None:
        self.cuda_stream = 7

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, _other):
        pass

    def replay(self):
        Event.now += 1.0


def test_a_gpu_is_timed_by_replays_of_a_graph_between_events():
    """On a stand-in for torch.cuda."""
    facts = SimpleNamespace(name="H100", major=9, minor=0, L2_cache_size=50 << 20, total_memory=80 << 30)
    cuda = SimpleNamespace(
        Event=Event,
        Stream=Context,
        CUDAGraph=Context,
        stream=Context,
        graph=Context,
        current_stream=Context,
        synchronize=lambda: None,
        get_device_properties=lambda _: facts,
    )
    gpu = Gpu(SimpleNamespace(cuda=cuda, __version__="2.13", version=SimpleNamespace(cuda="13.0")))
    assert (gpu.describe().capability, gpu.describe().cache_bytes) == ("90", 50 << 20)
    assert gpu.stream() == 7
    runs = []
    assert gpu.seconds(lambda: runs.append(1)) == pytest.approx(1e-3)
    assert len(runs) == 3, "twice before it is captured, once to be captured"
    gpu.synchronize()


def test_calls_are_as_many_as_do_not_fit_into_the_cache(kernels):
    machine = Emulated(torch)
    stopwatch = Stopwatch(torch, machine, kernels)
    stopwatch._cache = 10 * SIZES.least_bytes
    assert len(stopwatch.calls(SIZES)) == 30
    stopwatch._cache = 10**9
    assert len(stopwatch.calls(SIZES)) == 256
    stopwatch._cache = 1
    assert len(stopwatch.calls(SIZES)) == 1


def test_torch_compile_is_given_up_where_it_fails(kernels):
    stopwatch = Stopwatch(torch, Emulated(torch), kernels)
    calls = stopwatch.calls(SIZES)[:1]
    assert Compiler(torch, 0).seconds(stopwatch, calls) is None
    works = Compiler(SimpleNamespace(compile=lambda function, dynamic: function, exp=torch.exp, cat=torch.cat), 1)
    assert works.seconds(stopwatch, calls) > 0
    fails = Compiler(SimpleNamespace(compile=lambda *_, **__: 1 / 0), 2)
    assert fails.seconds(stopwatch, calls) is None
    assert fails.problem == "division by zero"
    assert fails.seconds(stopwatch, calls) is None


class Clock(Stopwatch):
    """Times as `told(sizes, tuning)` says."""

    def __init__(self, told):
        self._told = told

    def calls(self, sizes):
        return [SimpleNamespace(sizes=sizes)]

    def of_kernels(self, calls, tuning):
        return self._told(calls[0].sizes, tuning)


def test_constants_are_recommended_where_another_wins_clearly():
    def told(sizes, tuning):
        few = sizes.tokens <= tuning.few_tokens
        return (sizes.tokens if few else 20) * (1.2 if tuning.blocks_each == 2 else 1.19) / (1 + tuning.overlaps)

    trials = {trial.name: trial for trial in try_constants(Clock(told), Tuning(132), LLAMA_2_7B, "fp16")}
    assert trials["few_tokens"].recommended == 16
    assert trials["blocks_each"].recommended == 2, "one per cent is noise"
    assert trials["overlaps"].recommended == 1
    assert "few_tokens = 32 should be 16" in str(trials["few_tokens"])
    assert str(Trial("few_slices", 8, {4: 1.0, 8: 1.02})) == "few_slices = 8 stays (4: 1.00, 8: 1.02)"


def test_the_accounts_bytes_are_no_fewer_than_the_least(kernels):
    for projection in PROJECTIONS:
        for tokens in (1, 8, 32, 256, 2048):
            one = account(kernels, projection.sizes("fp16", tokens), Tuning(132))
            assert one.least <= one.memory <= 2 * one.least, projection
            assert one.requested >= one.least, projection
            assert len(one.launches) == (2 if tokens <= 32 else 3)
            assert all(launch.shared_bytes <= 48 * 1024 for launch in one.launches)


def test_every_grid_covers_its_outputs(kernels):
    """By hand for the headline at 2,048 tokens: 32 tiles of tokens, 2 of rows, 4 splits; 8 tokens a block; 86 tiles of
    columns for each sibling."""
    down, route, up = kernels.launches(LLAMA_2_7B[0].sizes("fp16", 2048), Tuning(132))
    assert (down.grid, route.grid, up.grid) == ((32, 2, 4), (256, 2, 1), (32, 172, 1))
    assert (down.threads, route.threads, up.threads) == (256, 128, 256)
    few_down, few_up = kernels.launches(PROJECTIONS[1].sizes("fp16", 1), Tuning(132))
    assert (few_down.grid, few_down.threads, few_up.grid) == ((36, 1, 1), 96, (9, 1, 1))


@pytest.mark.parametrize(
    ("begin", "made"), [(BEGIN, kernel_table), (BEGIN_ADAPTERS, kernel_adapters_table)], ids=["sizes", "adapters"]
)
def test_the_tables_in_the_readme_are_what_the_plan_gives(kernels, begin, made):
    text = README.read_text(encoding="utf-8").partition(f"{begin}\n")[2].partition(f"\n{END}")[0]
    assert text == made(kernels), "run scripts/kernel_table.py --write"


def test_a_batch_of_adapters_that_is_wrong_fails_the_run(check, monkeypatch):
    """Rows exchanged."""
    assert check._time_adapters("fp16") == "2 rows"
    launch = Kernels.launch

    def exchanged(self, sizes, tuning, pointers, *rest, **options):
        if sizes.slots == 4:
            pointers = [pointers[0] + sizes.inputs * 2, *pointers[1:]]
            sizes = replace(sizes, tokens=sizes.tokens - 1, batch=sizes.batch - 1)
        launch(self, sizes, tuning, pointers, *rest, **options)

    monkeypatch.setattr(Kernels, "launch", exchanged)
    with pytest.raises(RuntimeError, match="results are wrong, of them tiny gate/up"):
        check._time_adapters("fp16")


def test_a_graph_that_does_not_see_a_swap_or_other_indices_fails_the_run(check, monkeypatch):
    """By both paths of the kernels, of several rows and of one."""
    assert check._swap("fp16").startswith("a graph takes what is copied into a slot, and other indices (0.")
    with monkeypatch.context() as patched:
        patched.setattr(check._machine, "captured", lambda run: lambda: None)
        with pytest.raises(RuntimeError, match=r"slot \(3 rows of 1 tokens: nan"):
            check._swap("fp16")
    run, shapes = Batch.run, []

    def as_captured(self, tuning, adapter):
        """Of many tokens, with the slots as they were."""
        shapes.append((self.sizes.batch, self.sizes.row_tokens))
        held = copy.copy(self)
        if self.sizes.row_tokens > 1:
            held.down, held.mix, held.up = (slots.clone() for slots in (self.down, self.mix, self.up))
        return run(held, tuning, adapter)

    monkeypatch.setattr(Batch, "run", as_captured)
    with pytest.raises(RuntimeError, match=r"not take what was copied into a slot \(3 rows of 40 tokens"):
        check._swap("fp16")
    assert shapes == [(3, 1), (1, 1), (3, 40)]


def test_a_row_that_nobody_writes_fails_the_run(check, monkeypatch):
    """The last: what is no number must not hide behind the rows that are right."""
    launch = Kernels.launch

    def shortened(self, sizes, tuning, pointers, *rest, **options):
        if sizes.slots == 4 and sizes.batch > 1:
            sizes = replace(sizes, tokens=sizes.tokens - 1, batch=sizes.batch - 1)
        launch(self, sizes, tuning, pointers, *rest, **options)

    monkeypatch.setattr(Kernels, "launch", shortened)
    with pytest.raises(RuntimeError, match="results are wrong, of them tiny gate/up"):
        check._time_adapters("fp16")


@pytest.fixture
def commands(tmp_path, monkeypatch) -> engines._Commands:
    made = engines._Commands(tmp_path, "tensorrt", Steps(8))
    monkeypatch.setattr(made, "_run", lambda *words, **_: " ".join(map(str, words)))
    for engine in ("plugin", "inlined", "unadapted"):
        made._engine(engine).parent.mkdir(parents=True, exist_ok=True)
        made._engine(engine).write_bytes(b"engine")
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    return made


def test_engines_are_built_judged_and_timed_by_the_tools_own_commands(commands, monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: object())
    said = []
    monkeypatch.setattr(commands, "_run", lambda *words, **_: said.append(" ".join(map(str, words[2:]))) or '{"a": 1}')
    assert commands.make_bundle() == ""
    assert commands.build("plugin") == commands.build("inlined") == "0 MB"
    assert commands.validate("plugin") == "passed"
    assert commands.decode() == "a: 1000000 us a token"
    assert commands.run_cpp() == 'answers {"a": 1}'
    assert commands.run_onnxruntime() == '{"a": 1}'
    assert "--runtime tensorrt" in said[1] and "--no-plugin" not in said[1] and "--no-plugin" in said[2]
    assert "validate" in said[3] and "--engine plugin" in said[3]


def test_what_engines_need_is_named_where_it_is_missing(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: None)
    for step, message in (
        (commands.make_bundle, "typer, onnx, onnx_ir, transformers, msgspec are not installed"),
        (lambda: commands.build("plugin"), "tensorrt is not installed"),
        (commands.run_onnxruntime, "onnxruntime is not installed"),
    ):
        with pytest.raises(LeftOut, match=message):
            step()
    monkeypatch.undo()
    empty = engines._Commands(tmp_path / "empty", "rtx", Steps(8))
    for step, message in (
        (lambda: empty.build("inlined"), "there is no bundle"),
        (lambda: empty.validate("plugin"), "there is no engine plugin"),
    ):
        with pytest.raises(LeftOut, match=message):
            step()
    with pytest.raises(RuntimeError, match="ends with code 3\n  why"):
        empty._run(sys.executable, "-c", "import sys; print('why'); sys.exit(3)")


def test_a_command_that_hangs_fails_and_one_without_time_is_left_out(tmp_path):
    of_a_gpu = engines._Commands(tmp_path, "tensorrt", Steps(8), "90")
    with pytest.raises(Failed, match="something waits for ever"):
        of_a_gpu._run("sleep", "60", seconds=0.1)
    with pytest.raises(LeftOut, match="no more time"):
        engines._Commands(tmp_path, "tensorrt", Steps(0), "90")._run("sleep", "60")
    assert of_a_gpu._run("cat", stdin="5 17 42") == "5 17 42"


def test_the_op_is_judged_once_its_library_is_built(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda _: object())
    ran = []
    monkeypatch.setattr(
        engines._Commands, "_run", lambda _, *words, **limits: ran.append((words[2:], limits)) or "x.so"
    )
    steps = dict(engines.op_steps("90", Steps(8)))
    plugin, judged, *_ = steps.values()
    with pytest.raises(LeftOut, match="there is no library"):
        judged()
    plugin()
    judged()
    assert [words for words, _ in ran] == [
        ("gpu_check.tensorrt_rows", "build", "90"),
        ("gpu_check.tensorrt_rows", "judge", "x.so"),
    ]
    assert ran[1][1]["seconds"] < ran[0][1]["seconds"]


def test_a_project_that_cmake_does_not_take_is_left_out(commands, monkeypatch):
    def run(*words: object, **_: object) -> str:
        if words[0] == "cmake":
            raise RuntimeError("no TensorRT")
        return ""

    monkeypatch.setattr(commands, "_run", run)
    with pytest.raises(LeftOut, match="no TensorRT"):
        commands.run_cpp()


def test_the_steps_of_engines_are_those_of_a_gpu_or_of_a_dry_run(tmp_path):
    names = [name for name, _ in engines.engine_steps(tmp_path, False, Steps(8))]
    assert names[0] == "a bundle of a small model"
    assert {"validate --engine plugin", "decode of the engines", "the C++ program on TensorRT"} <= set(names)
    dry = dict(engines.engine_steps(tmp_path, True, Steps(8)))
    assert list(dry) == ["a bundle of a small model", *(f"engine, {one}" for one in engines._ENGINES)]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    with pytest.raises(LeftOut, match="takes no plugins"):
        dry["engine, plugin"]()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> engines._Commands:
    made = engines._Commands(tmp_path_factory.mktemp("engines"), "rtx", Steps(8))
    made.make_bundle()
    return made


def test_a_bundle_of_a_small_model_becomes_engines_with_experts_and_without(small):
    """Of TensorRT-RTX, which needs no GPU to build them."""
    sizes = {name: small.build(name) for name in ("inlined", "unadapted")}
    assert all(int(size.removesuffix(" MB")) > 0 for size in sizes.values())


def test_the_kernels_and_the_body_agree_in_onnx_runtime(small, programs, monkeypatch, capsys):
    """On its CPU provider, with the emulated kernels behind the CUDA provider's op."""
    library = programs / "onnxruntime" / "libteamlora_onnxruntime_emulated.so"
    onnxruntime_cuda.main(small._bundle, library, "CPUExecutionProvider")
    assert "kernels and body agree to 0.0" in capsys.readouterr().out
    onnxruntime_cuda.main(small._bundle)
    assert "left out: this onnxruntime has no CUDAExecutionProvider" in capsys.readouterr().out
    monkeypatch.setattr(onnxruntime_cuda, "_TOLERANCE", -1)
    with pytest.raises(SystemExit, match="kernels and body differ by"):
        onnxruntime_cuda.main(small._bundle, library, "CPUExecutionProvider")
