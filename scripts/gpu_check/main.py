"""The steps of `scripts/check_gpu`, in their order:

    environment -> build -> sweep -> compute-sanitizer -> times -> adapters -> constants of the plan -> engines -> table
    and JSON

What decides whether the kernels are right comes first. Ends with 0 where all is right, 1 where a step failed, 2 where
something is missing.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import report
from gpu_check.adapters import BatchTiming, swap_in_graph, time_batch
from gpu_check.build import Programs, build
from gpu_check.engines import engine_steps
from gpu_check.kernels import DTYPES, Kernels, Tuning
from gpu_check.machine import Description, Emulated, Gpu, Machine
from gpu_check.sanitize import TOOLS, find_sanitizer, sanitize
from gpu_check.shapes import LLAMA_2_7B, LLAMA_3_8B, SMOLLM2, TOKENS, Projection
from gpu_check.steps import LeftOut, Steps
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
_SANITIZER_SECONDS = 40.0


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
        torch, toolkit = _find(given.dry_run)
    except LeftOut as reason:
        print(f"check_gpu: {reason}", file=sys.stderr)
        return 2
    steps = Steps(given.minutes)
    with tempfile.TemporaryDirectory(prefix="check_gpu-") as folder:
        check = Check(steps, torch, toolkit, Path(folder), given.dry_run, given.seed)
        check.run(given.dtypes, engines=not given.no_engines)
    print(report.table(check.timings, check.trials))
    fields = report.as_fields(
        steps, check.description, check.speed, check.tuning, check.timings, check.trials, check.batches
    )
    given.json.write_text(report.to_json(fields), encoding="utf-8")
    left_out = [outcome.name for outcome in steps.outcomes if outcome.state == "left out"]
    verdict = "FAILED" if steps.failed() else "All right"
    steps.say(f"{verdict}{', but for what was left out: ' if left_out else ''}{', '.join(left_out)}")
    steps.say(f"figures are in {given.json}")
    return 1 if steps.failed() else 0


def _find(dry_run: bool) -> tuple[Any, CudaToolkit]:
    """PyTorch and CUDA's compiler.

    Raises:
        LeftOut: one is missing, or there is no GPU, with what to do.
    """
    toolkit = find_cuda()
    if toolkit is None:
        raise LeftOut("no nvcc. Put CUDA's compiler on the PATH, or set CUDA_HOME.")
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise LeftOut(f"PyTorch cannot be imported ({error}). Install it, with CUDA.") from None
    if not dry_run and not torch.cuda.is_available():
        raise LeftOut("PyTorch sees no GPU. --dry-run needs none.")
    if not dry_run and torch.cuda.get_device_capability() < _LEAST_CAPABILITY:
        raise LeftOut("the kernels are for GPUs of compute capability 8.0 and newer. --dry-run needs none.")
    return torch, toolkit


class Check:
    """All steps on one machine, and what they found."""

    def __init__(self, steps: Steps, torch: Any, toolkit: CudaToolkit, folder: Path, dry_run: bool, seed: int) -> None:
        self._steps, self._torch, self._toolkit, self._folder = steps, torch, toolkit, folder
        self._dry_run, self._seed = dry_run, seed
        self._machine: Machine = Emulated(torch) if dry_run else Gpu(torch)
        self._programs: Programs | None = None
        self.description: Description = self._machine.describe()
        self.speed: float | None = None
        self.tuning: Tuning | None = None
        self.timings: list[Timing] = []
        self.trials: list[Trial] = []
        self.batches: list[BatchTiming] = []

    def run(self, dtypes: Sequence[str], engines: bool) -> None:
        self._steps.run("environment", self._environment)
        if not self._steps.run("build", self._build):
            return
        self._steps.run("sweep against float64", self._sweep)
        for tool in TOOLS:
            self._steps.run(f"compute-sanitizer {tool}", lambda tool=tool: self._sanitize(tool), takes=30)
        timed = self._steps.run("times", lambda: self._time(dtypes), takes=20)
        self._steps.run("a batch of adapters", lambda: self._time_adapters(dtypes[0]), takes=10)
        if timed:
            self._steps.run("constants of the plan", lambda: self._try(dtypes[0]), takes=20)
        for name, step in engine_steps(self._folder, self._dry_run, self._steps) if engines else ():
            self._steps.run(name, step, takes=30)

    def _environment(self) -> str:
        nvcc = f"nvcc {self._toolkit.cuda_version} ({self._toolkit.nvcc})"
        return f"{self.description.name}, {nvcc}, {_driver()}, torch {self._torch.__version__}"

    def _build(self) -> str:
        self._programs = build(self._folder, self._toolkit, self.description.capability)
        kernels = Kernels(self._programs.library)
        self.tuning = kernels.tuning()
        return str(self.tuning)

    def _sweep(self) -> str:
        assert self._programs is not None
        command = [str(self._programs.sweep), "--seed", str(self._seed)]
        command += ["--small"] if self._dry_run else ["--cases", "300"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=max(self._steps.left(), 1)
            )
        except subprocess.TimeoutExpired as reason:
            # Without it nothing is proved.
            raise RuntimeError(f"not done after {reason.timeout:.0f} s") from None
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"it ended with code {done.returncode}"]
        if done.returncode != 0:
            raise RuntimeError("\n  ".join(lines))
        return lines[-1]

    def _sanitize(self, tool: str) -> str:
        assert self._programs is not None
        sanitizer = find_sanitizer(self._toolkit.cuda_root)
        if sanitizer is None:
            raise LeftOut("there is no compute-sanitizer; set COMPUTE_SANITIZER")
        return sanitize(sanitizer, tool, self._programs.sweep, min(_SANITIZER_SECONDS, self._steps.left()))

    def _time(self, dtypes: Sequence[str]) -> str:
        assert self._programs is not None
        assert self.tuning is not None
        self.speed = copy_speed(self._torch, self._machine, 1 << 20 if self._dry_run else 1 << 29)
        self._steps.say(f"a copy moves {self.speed / 1e9:,.0f} GB/s")
        stopwatch = Stopwatch(self._torch, self._machine, Kernels(self._programs.library))
        compiler = Compiler(self._torch, 0 if self._dry_run else _MOST_COMPILED)
        projections, tokens = (_TINY, _TINY_TOKENS) if self._dry_run else (_PROJECTIONS, TOKENS)
        rows = time_all(
            self._torch, stopwatch, self._machine, self.tuning, self.speed, projections, dtypes, tokens, compiler
        )
        left_out = ""
        for timing in rows:
            self.timings.append(timing)
            self._steps.say(report.line(timing))
            # The constants want a minute, too.
            if self._steps.left() < (0 if self._dry_run else 75):
                left_out = "; others were left out for lack of time"
                break
        if compiler.problem is not None:
            left_out += f"; torch.compile: {compiler.problem}"
        wrong = [timing for timing in self.timings if not timing.correct]
        if wrong:
            raise RuntimeError(f"{len(wrong)} results are wrong, of them {report.line(wrong[0])}")
        return f"{len(self.timings)} rows{left_out}"

    def _time_adapters(self, dtype: str) -> str:
        assert self._programs is not None
        assert self.tuning is not None
        kernels = Kernels(self._programs.library)
        projections, rows, slots = (_TINY, (3,), 4) if self._dry_run else (LLAMA_2_7B, (8, 32, 64), 64)
        common = (self._torch, self._machine, kernels, self.tuning)
        swapped = swap_in_graph(*common, projections[0], dtype)
        if not swapped <= 1:
            raise RuntimeError(f"a graph does not take what was copied into a slot ({swapped:.2f})")
        for projection in projections:
            for count in rows:
                self.batches.append(time_batch(*common, projection, dtype, count, slots))
                self._steps.say(str(self.batches[-1]))
        wrong = [batch for batch in self.batches if not batch.correct]
        if wrong:
            raise RuntimeError(f"{len(wrong)} results are wrong, of them {wrong[0]}")
        return f"{len(self.batches)} rows; a graph takes what is copied into a slot"

    def _try(self, dtype: str) -> str:
        assert self._programs is not None
        assert self.tuning is not None
        stopwatch = Stopwatch(self._torch, self._machine, Kernels(self._programs.library))
        projections = _TINY if self._dry_run else (*LLAMA_2_7B, LLAMA_3_8B[0], SMOLLM2[0])
        for trial in try_constants(stopwatch, self.tuning, projections, dtype, small=self._dry_run):
            self.trials.append(trial)
            self._steps.say(str(trial))
            if self._steps.left() < 0:
                break
        changes = {trial.name: trial.recommended for trial in self.trials if trial.recommended != trial.now}
        return f"change {changes}" if changes else "all stay"


def _driver() -> str:
    """The driver's version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "no nvidia-smi"
    return f"driver {done.stdout.strip().splitlines()[0]}" if done.stdout.strip() else "nvidia-smi says nothing"
