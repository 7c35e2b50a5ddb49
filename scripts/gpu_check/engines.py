"""Goes on where this tool's own packages are installed: real engines with and without the plugin, judged and timed, the
C++ program on them, and ONNX Runtime with the op for its CUDA provider.

Everything is done by the commands that a user has; the model is one of random weights, made here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gpu_check.processes import command
from gpu_check.steps import LeftOut, Steps

_ROOT = Path(__file__).resolve().parents[2]
_NEEDED = ("typer", "onnx", "onnx_ir", "transformers", "msgspec")
_SHAPES = "1x1,1x64,1x256"
# What a module's last line begins with where it cannot be run here.
LEFT_OUT = "left out: "
# At most, of a command: what takes longest is compilation. Of one that judges the op alone, whose library is there.
_COMMAND_SECONDS, _JUDGE_SECONDS = 240.0, 90.0
# Of this folder, each with a runtime's own package -> its library, and what runs it.
_ROWS = {
    "tensorrt": ("the plugin for TensorRT", "adapters in TensorRT"),
    "onnxruntime": ("the op for ONNX Runtime's CUDA provider", "adapters in ONNX Runtime's CUDA provider"),
}
# Name of an engine -> its options.
_ENGINES = {"plugin": (), "inlined": ("--no-plugin",), "unadapted": ("--no-plugin",)}
# Of the bundle, whose graph they are judged by; the other is of the same graph without its experts.
_ADAPTED = ("plugin", "inlined")


def op_steps(capability: str | None, steps: Steps) -> Iterator[tuple[str, Callable[[], str]]]:
    """The op alone in the two runtimes, of several adapters, each behind its library. `capability`: of the GPU; None in
    a dry run."""
    if capability is None:
        return
    commands = _Commands(Path(), "tensorrt", steps, capability)
    for module, (library, judged) in _ROWS.items():
        yield library, lambda module=module: commands.build_library(module)
        yield judged, lambda module=module: commands.judge_rows(module)


def engine_steps(
    folder: Path, dry_run: bool, steps: Steps, capability: str | None = None
) -> Iterator[tuple[str, Callable[[], str]]]:
    """The steps with their names; each is left out where what it needs is not there. `capability`: as `op_steps`."""
    runtime = "rtx" if dry_run else "tensorrt"
    commands = _Commands(folder, runtime, steps, capability)
    yield "a bundle of a small model", commands.make_bundle
    for name in _ENGINES:
        yield f"engine, {name}", lambda name=name: commands.build(name)
    if not dry_run:
        for name in _ADAPTED:
            yield f"validate --engine {name}", lambda name=name: commands.validate(name)
        yield "decode of the engines", commands.decode
        yield "the C++ program on TensorRT", commands.run_cpp
        yield "ONNX Runtime's CUDA provider", commands.run_onnxruntime


class _Commands:
    def __init__(self, folder: Path, runtime: str, steps: Steps, capability: str | None = None) -> None:
        self._folder, self._runtime, self._steps = folder, runtime, steps
        # Of the GPU, if known: nothing is compiled for others.
        self._capability = [] if capability is None else [capability]
        self._bundle, self._unadapted = folder / "bundle", folder / "unadapted"
        # Runtime -> that of the op.
        self._libraries: dict[str, str] = {}

    def make_bundle(self) -> str:
        self._require_packages(*_NEEDED)
        self._python("gpu_check.small_model", self._bundle, self._unadapted)
        return ""

    def build_library(self, module: str) -> str:
        self._require_packages(*_NEEDED, module)
        self._libraries[module] = self._said(f"gpu_check.{module}_rows", "build", *self._capability)
        return ""

    def judge_rows(self, module: str) -> str:
        if module not in self._libraries:
            raise LeftOut("there is no library")
        return self._said(f"gpu_check.{module}_rows", "judge", self._libraries[module], seconds=_JUDGE_SECONDS)

    def build(self, name: str) -> str:
        module = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}[self._runtime]
        self._require_bundle()
        self._require_packages(module)
        if self._runtime == "rtx" and name == "plugin":
            raise LeftOut("TensorRT-RTX takes no plugins")
        options = ["--compute-capability", "8.9"] if self._runtime == "rtx" else list(_ENGINES[name])
        if name == "plugin":
            options += [word for capability in self._capability for word in ("--arch", capability)]
        bundle = self._engine(name).parents[1]
        self._tool("trt", bundle, "--runtime", self._runtime, "--shapes", _SHAPES, "-o", self._engine(name), *options)
        return f"{self._engine(name).stat().st_size / 1e6:.0f} MB"

    def validate(self, name: str) -> str:
        self._require_engine(name)
        report = self._folder / f"{name}.json"
        self._tool("validate", self._bundle, "--engine", name, "--json", report)
        return "passed"

    def decode(self) -> str:
        """A token of each engine, and of one without adapters."""
        for name in _ENGINES:
            self._require_engine(name)
        told = self._python("gpu_check.decode", *map(self._engine, _ENGINES))
        times = json.loads(told.splitlines()[-1])
        return ", ".join(f"{name}: {1e6 * seconds:.0f} us a token" for name, seconds in times.items())

    def run_cpp(self) -> str:
        self._require_engine("plugin")
        project = self._folder / "cpp"
        self._tool("deploy", "cpp", self._bundle, "--engine", "plugin", "-o", project)
        options = ("-DTEAMLORA_ONNXRUNTIME=OFF", "-DTEAMLORA_TENSORRT=ON")
        try:
            self._run("cmake", "-S", project, "-B", project / "build", *options)
        except RuntimeError as error:
            raise LeftOut(f"its project is not configured: {error}") from None
        self._run("cmake", "--build", project / "build", "--parallel")
        program = project / "build" / "runner"
        options = ("--ids", "--tokens", "8", "--model", project / "model", "--backend", "tensorrt")
        return f"answers {self._run(program, *options, stdin='5 17 42')}".strip()

    def run_onnxruntime(self) -> str:
        self._require_bundle()
        self._require_packages("onnxruntime")
        return self._said("gpu_check.onnxruntime_cuda", self._bundle, *self._capability)

    def _said(self, module: str, *words: object, seconds: float = _COMMAND_SECONDS) -> str:
        """The last line of a module of ours."""
        said = self._python(module, *words, seconds=seconds).splitlines()[-1]
        if said.startswith(LEFT_OUT):
            raise LeftOut(said.removeprefix(LEFT_OUT))
        return said

    def _require_packages(self, *names: str) -> None:
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise LeftOut(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed")

    def _engine(self, name: str) -> Path:
        return (self._bundle if name in _ADAPTED else self._unadapted) / "engines" / f"{name}.engine"

    def _require_bundle(self) -> None:
        if not (self._bundle / "manifest.json").is_file():
            raise LeftOut("there is no bundle")

    def _require_engine(self, name: str) -> None:
        if not self._engine(name).is_file():
            raise LeftOut(f"there is no engine {name}")

    def _tool(self, *words: object) -> str:
        return self._python("teamlora_export", *words)

    def _python(self, module: str, *words: object, seconds: float = _COMMAND_SECONDS) -> str:
        return self._run(sys.executable, "-m", module, *words, seconds=seconds)

    def _run(self, *words: object, stdin: str = "", seconds: float = _COMMAND_SECONDS) -> str:
        """What a command says on its standard output. `seconds`: at most, on a GPU."""
        limit = self._steps.limit(seconds if self._capability else math.inf)
        done = command([str(word) for word in words], limit, stdin, _environment())
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            what = " ".join(map(str, words[:4]))
            raise RuntimeError("\n  ".join([f"{what} ends with code {done.returncode}", *lines[-8:]]))
        return done.stdout


def _environment() -> dict[str, str]:
    paths = [str(_ROOT / "scripts"), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
