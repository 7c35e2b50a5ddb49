"""The steps of `scripts/check_gpu`, what tells most first:

    environment -> build -> device -> sweep -> adapters in a graph -> the op in TensorRT and ONNX Runtime -> times of
    one type -> a batch of adapters -> compute-sanitizer -> constants of the plan -> engines -> times of other types

A step on the GPU has a process of its own, so that a crash or a kernel that never ends is that step's alone. What a
step's own limit cuts off has failed; what the time for all cuts off is left out. Each figure is written at once. Ends
with 0 where all is right, 1 where a step failed, 2 where something is missing.
"""

from __future__ import annotations

import argparse
import importlib
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_check import report
from gpu_check.adapters import BatchTiming, swap_in_graph, time_batch
from gpu_check.build import Programs, build
from gpu_check.engines import engine_steps, op_steps
from gpu_check.kernels import DTYPES, Kernels, Tuning
from gpu_check.machine import Description, Emulated, Gpu, Machine
from gpu_check.processes import Stopped, apart, command, stopped_by_signals
from gpu_check.sanitize import TOOLS, find_sanitizer, sanitize
from gpu_check.shapes import LLAMA_2_7B, LLAMA_3_8B, SMOLLM2, TOKENS, Projection
from gpu_check.steps import Failed, LeftOut, Limit, Steps
from gpu_check.thresholds import Trial, try_constants
from gpu_check.timing import Compiler, Stopwatch, Timing, copy_speed, time_all
from teamlora_export.engine.toolchain import CudaToolkit, find_cuda

# The headline first, should time run out.
_PROJECTIONS = (*LLAMA_2_7B, *LLAMA_3_8B, *SMOLLM2)
_TINY = (Projection("tiny", "gate/up", 128, (96, 32), 16), Projection("tiny", "down", 64, (40,), 8))
_TINY_TOKENS = (1, 40)
_MOST_COMPILED = 4
# Asynchronous copies, and bfloat16 on tensor cores.
_LEAST_CAPABILITY = (8, 0)
# What the first of them finds most, and what is left for the end.
_FIRST_TOOLS = TOOLS[:2]
# At most, of a step: what takes longer hangs.
_ASK_SECONDS, _SWEEP_SECONDS, _ADAPTERS_SECONDS = 60.0, 90.0, 60.0
# At most, of a figure, of which a step has many: torch.compile takes longest.
_FIGURE_SECONDS = 120.0
# What takes longer is left to others, which tell more by then.
_SANITIZER_SECONDS = 40.0
# Left by the times for what follows them.
_RESERVE_SECONDS = 75.0
# Beyond the end, for a step that looks at the time itself, between two figures.
_MORE_SECONDS = 30.0


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/check_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="on this CPU, with emulated kernels and small sizes")
    parser.add_argument("--minutes", type=float, default=8.0, help="what would take longer is left out")
    parser.add_argument("--json", type=Path, default=Path("check_gpu.json"), help="where all figures are written")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "bf16", "fp32"])
    parser.add_argument("--no-engines", action="store_true", help="leave out what needs this tool's own packages")
    parser.add_argument("--seed", type=int, default=1, help="of the sweep's random shapes")
    given = parser.parse_args(arguments)
    try:
        with stopped_by_signals():
            return _check(given)
    except Stopped as reason:
        return 128 + reason.signal


def _check(given: argparse.Namespace) -> int:
    try:
        report.require_place(given.json)
        torch, toolkit = _find()
        description = _ask(torch, given.dry_run)
    except OSError as error:
        print(f"check_gpu: nothing can be written to {given.json}: {error.strerror or error}", file=sys.stderr)
        return 2
    except LeftOut as reason:
        print(f"check_gpu: {reason}", file=sys.stderr)
        return 2
    except Failed as reason:
        print(f"check_gpu: the GPU cannot be asked: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="check_gpu-") as folder:
        check = Check(torch, toolkit, Path(folder), given.dry_run, given.seed, description)
        steps = Steps(given.minutes, save=lambda: check.write(given.json))
        check.run(steps, given.dtypes, engines=not given.no_engines)
    print(report.table(check.timings, check.trials))
    check.write(given.json)
    left_out = [outcome.name for outcome in steps.outcomes if outcome.state == "left out"]
    verdict = "FAILED" if steps.failed() else "All right"
    steps.say(f"{verdict}{', but for what was left out: ' if left_out else ''}{', '.join(left_out)}")
    steps.say(f"figures are in {given.json}" if check.unwritten is None else f"no figures: {check.unwritten}")
    return 1 if steps.failed() else 0


def _find() -> tuple[Any, CudaToolkit]:
    """PyTorch and CUDA's compiler.

    Raises:
        LeftOut: one is missing, with what to do.
    """
    toolkit = find_cuda()
    if toolkit is None:
        raise LeftOut("no nvcc. Put CUDA's compiler on the PATH, or set CUDA_HOME.")
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise LeftOut(f"PyTorch cannot be imported ({error}). Install it, with CUDA.") from None
    return torch, toolkit


def _ask(torch: Any, dry_run: bool) -> Description:
    """The machine, by a process of its own: this one must not touch the GPU, or those of the steps could not.

    Raises:
        LeftOut: there is no GPU that runs the kernels, with what to do.
        Failed: it does not answer.
    """
    found: list[Description] = []

    def ask(tell: Callable[[Any], None]) -> str:
        if not dry_run and not torch.cuda.is_available():
            raise LeftOut("PyTorch sees no GPU. --dry-run needs none.")
        if not dry_run and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
            raise LeftOut("the kernels are for GPUs of compute capability 8.0 and newer. --dry-run needs none.")
        tell((Emulated(torch) if dry_run else Gpu(torch)).describe())
        return ""

    apart(ask, found.append, Limit(_ASK_SECONDS, is_own=True))
    return found[0]


class Check:
    """All steps on one machine, and what they found."""

    def __init__(
        self,
        torch: Any,
        toolkit: CudaToolkit,
        folder: Path,
        dry_run: bool,
        seed: int,
        description: Description,
        steps: Steps | None = None,
    ) -> None:
        self._steps = steps or Steps(0)
        self._torch, self._toolkit, self._folder = torch, toolkit, folder
        self._dry_run, self._seed = dry_run, seed
        self._machine: Machine = Emulated(torch) if dry_run else Gpu(torch)
        self._programs: Programs | None = None
        # Of a step's own process: tells what it finds to the one that began it.
        self._tell: Callable[[Any], None] | None = None
        self.description = description
        # Why the figures are not written, where they cannot be.
        self.unwritten: str | None = None
        self.speed: float | None = None
        self.tuning: Tuning | None = None
        self.timings: list[Timing] = []
        self.trials: list[Trial] = []
        self.batches: list[BatchTiming] = []

    def run(self, steps: Steps, dtypes: Sequence[str], engines: bool) -> None:
        self._steps = steps
        steps.run("environment", self._environment)
        built = steps.run("build", self._build)
        answers = built and self._run("device", self._device, _ASK_SECONDS)
        if built:
            steps.run("sweep against float64", self._sweep)
        if answers:
            self._run("adapters in a graph", lambda: self._swap(dtypes[0]), _ADAPTERS_SECONDS)
        for name, step in op_steps(self.description.capability, steps) if engines else ():
            steps.run(name, step, takes=20)
        if answers:
            self._run("times", lambda: self._time(dtypes[:1]), takes=20)
            self._run("a batch of adapters", lambda: self._time_adapters(dtypes[0]), _ADAPTERS_SECONDS, takes=10)
        if built:
            for tool in _FIRST_TOOLS:
                steps.run(f"compute-sanitizer {tool}", lambda tool=tool: self._sanitize(tool), takes=30)
        if answers:
            self._run("constants of the plan", lambda: self._try(dtypes[0]), takes=20)
        for name, step in (
            engine_steps(self._folder, self._dry_run, steps, self.description.capability) if engines else ()
        ):
            steps.run(name, step, takes=30)
        if built:
            for tool in TOOLS[len(_FIRST_TOOLS) :]:
                steps.run(f"compute-sanitizer {tool}", lambda tool=tool: self._sanitize(tool), takes=30)
        if answers and dtypes[1:]:
            self._run("times of other types", lambda: self._time(dtypes[1:]), takes=20)

    def write(self, path: Path) -> None:
        """All that was found so far, as JSON. What cannot be written is told once, and takes no step with it."""
        fields = report.as_fields(
            self._steps, self.description, self.speed, self.tuning, self.timings, self.trials, self.batches
        )
        before, self.unwritten = self.unwritten, None
        try:
            report.write(path, fields)
        except OSError as error:
            self.unwritten = f"{path}: {error.strerror or error}"
            if before is None:
                self._steps.say(f"figures cannot be written: {self.unwritten}")

    def _run(self, name: str, step: Callable[[], str], seconds: float | None = None, takes: float = 0.0) -> bool:
        """A step in a process of its own, of `seconds` at most; whether it passed."""

        def in_process(tell: Callable[[Any], None]) -> str:
            self._tell = tell
            return step()

        def keep(found: tuple[str, Any]) -> None:
            self._keep(*found)
            self._steps.save()

        def begin() -> str:
            timings, batches = len(self.timings), len(self.batches)
            try:
                return apart(in_process, keep, self._limit(seconds))
            except LeftOut:
                # What it found until its time was over counts.
                _require_right([*self.timings[timings:], *self.batches[batches:]])
                raise

        return self._steps.run(name, begin, takes)

    def _limit(self, seconds: float | None) -> Limit:
        """Of a step that hangs after `seconds` on a GPU, or, None, that looks at the time itself and hangs where it
        finds nothing: an emulated one takes what there is."""
        own, each = (math.inf, math.inf) if self._dry_run else (seconds or math.inf, _FIGURE_SECONDS)
        if seconds is None:
            return self._steps.limit(each=each, more=_MORE_SECONDS)
        return self._steps.limit(own)

    def _keep(self, name: str, found: Any) -> None:
        """A figure, as or among `self.name`, also in the process that began this step's."""
        if self._tell is not None:
            self._tell((name, found))
        kept = getattr(self, name)
        if isinstance(kept, list):
            kept.append(found)
        else:
            setattr(self, name, found)

    def _environment(self) -> str:
        nvcc = f"nvcc {self._toolkit.cuda_version} ({self._toolkit.nvcc})"
        return f"{self.description.name}, {nvcc}, {_driver()}, torch {self._torch.__version__}"

    def _build(self) -> str:
        self._programs = build(self._folder, self._toolkit, self.description.capability)
        return ""

    def _device(self) -> str:
        assert self._programs is not None
        self._keep("tuning", Kernels(self._programs.library).tuning())
        return str(self.tuning)

    def _sweep(self) -> str:
        assert self._programs is not None
        words = [str(self._programs.sweep), "--seed", str(self._seed)]
        words += ["--small"] if self._dry_run else ["--cases", "300"]
        done = command(words, self._limit(_SWEEP_SECONDS))
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"it ended with code {done.returncode}"]
        if done.returncode != 0:
            raise RuntimeError("\n  ".join(lines))
        return lines[-1]

    def _sanitize(self, tool: str) -> str:
        assert self._programs is not None
        sanitizer = find_sanitizer(self._toolkit.cuda_root)
        if sanitizer is None:
            raise LeftOut("there is no compute-sanitizer; set COMPUTE_SANITIZER")
        limit = Limit(min(_SANITIZER_SECONDS, self._steps.left()), is_own=False)
        return sanitize(sanitizer, tool, self._programs.sweep, limit)

    def _time(self, dtypes: Sequence[str]) -> str:
        assert self._programs is not None
        assert self.tuning is not None
        self._keep("speed", copy_speed(self._torch, self._machine, 1 << 20 if self._dry_run else 1 << 29))
        assert self.speed is not None
        self._steps.say(f"a copy moves {self.speed / 1e9:,.0f} GB/s")
        stopwatch = Stopwatch(self._torch, self._machine, Kernels(self._programs.library))
        compiler = Compiler(self._torch, 0 if self._dry_run else _MOST_COMPILED)
        projections, tokens = (_TINY, _TINY_TOKENS) if self._dry_run else (_PROJECTIONS, TOKENS)
        first = len(self.timings)
        rows = time_all(
            self._torch, stopwatch, self._machine, self.tuning, self.speed, projections, dtypes, tokens, compiler
        )
        left_out = ""
        for timing in rows:
            self._keep("timings", timing)
            self._steps.say(report.line(timing))
            if self._steps.left() < (0 if self._dry_run else _RESERVE_SECONDS):
                left_out = "; others were left out for lack of time"
                break
        if compiler.problem is not None:
            left_out += f"; torch.compile: {compiler.problem}"
        _require_right(self.timings[first:])
        return f"{len(self.timings) - first} rows{left_out}"

    def _swap(self, dtype: str) -> str:
        """By the kernels for few tokens and by those for many, in several rows and in one."""
        assert self._programs is not None
        assert self.tuning is not None
        common = (self._torch, self._machine, Kernels(self._programs.library), self.tuning)
        worst = 0.0
        for rows, each in ((3, 1), (1, 1), (3, 40), (1, 40 if self._dry_run else 300)):
            projection = _TINY[0] if self._dry_run else LLAMA_2_7B[0]
            found = swap_in_graph(*common, projection, dtype, rows, each)
            # Written so that NaN fails.
            if not found <= 1:
                where = f"{rows} rows of {each} tokens"
                raise RuntimeError(f"a graph does not take what was copied into a slot ({where}: {found:.2f})")
            worst = max(worst, found)
        return f"a graph takes what is copied into a slot, and other indices ({worst:.2f})"

    def _time_adapters(self, dtype: str) -> str:
        assert self._programs is not None
        assert self.tuning is not None
        projections, rows, slots = (_TINY, (3,), 4) if self._dry_run else (LLAMA_2_7B, (8, 32, 64), 64)
        common = (self._torch, self._machine, Kernels(self._programs.library), self.tuning)
        for projection in projections:
            for count in rows:
                self._keep("batches", time_batch(*common, projection, dtype, count, slots))
                self._steps.say(str(self.batches[-1]))
        _require_right(self.batches)
        return f"{len(self.batches)} rows"

    def _try(self, dtype: str) -> str:
        assert self._programs is not None
        assert self.tuning is not None
        stopwatch = Stopwatch(self._torch, self._machine, Kernels(self._programs.library))
        projections = _TINY if self._dry_run else (*LLAMA_2_7B, LLAMA_3_8B[0], SMOLLM2[0])
        for trial in try_constants(stopwatch, self.tuning, projections, dtype, small=self._dry_run):
            self._keep("trials", trial)
            self._steps.say(str(trial))
            if self._steps.left() < 0:
                break
        changes = {trial.name: trial.recommended for trial in self.trials if trial.recommended != trial.now}
        return f"change {changes}" if changes else "all stay"


def _require_right(found: Sequence[Timing | BatchTiming]) -> None:
    wrong = [one for one in found if not one.correct]
    if wrong:
        named = report.line(wrong[0]) if isinstance(wrong[0], Timing) else str(wrong[0])
        raise RuntimeError(f"{len(wrong)} results are wrong, of them {named}")


def _driver() -> str:
    """The driver's version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "no nvidia-smi"
    return f"driver {done.stdout.strip().splitlines()[0]}" if done.stdout.strip() else "nvidia-smi says nothing"
