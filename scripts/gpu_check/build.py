"""Compiles the kernels and their sweep with nothing but nvcc and its C++ compiler: for the GPU, and emulated."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from teamlora_export.engine.toolchain import CudaToolkit

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
_INCLUDES = (f"-I{PLUGINS / 'kernels'}", f"-I{PLUGINS / 'tests'}")


@dataclass(frozen=True)
class Programs:
    """What was compiled.

    Attributes:
        library: the kernels, for `Kernels`. sweep: the program of plugins/tests/sweep.cpp.
    """

    library: Path
    sweep: Path


def build(folder: Path, toolkit: CudaToolkit, capability: str | None) -> Programs:
    """Compile the kernels once, and link them twice.

    Args:
        capability: of the GPU, without the dot; None: for the emulation.

    Raises:
        RuntimeError: a compiler fails, with its first errors.
    """
    if capability is None:
        compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", "-w", "-fPIC", "-DTEAMLORA_EMULATION"]
        compiler += ["-isystem", str(toolkit.cuda_include)]
        sources = ["tests/emulated_kernels.cpp", "tests/emulation.cpp", "kernels/plan.cpp"]
    else:
        code = f"arch=compute_{capability},code=sm_{capability}"
        compiler = [str(toolkit.nvcc), "-std=c++17", "-O3", "-lineinfo", "-gencode", code, "-Xcompiler", "-fPIC"]
        sources = ["kernels/launch.cu", "kernels/plan.cpp"]
    compiler += _INCLUDES
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    programs = Programs(folder / "libkernels.so", folder / "sweep")
    to_object = [
        [*compiler, "-c", str(PLUGINS / source), "-o", str(made)] for source, made in zip(sources, objects, strict=True)
    ]
    linked = [*map(str, objects), "-o"]
    to_programs = [
        [*compiler, "-shared", str(PLUGINS / "tests" / "interface.cpp"), *linked, str(programs.library)],
        [*compiler, str(PLUGINS / "tests" / "sweep.cpp"), *linked, str(programs.sweep)],
    ]
    for commands in (to_object, to_programs):
        with ThreadPoolExecutor(len(commands)) as pool:
            for outcome in pool.map(lambda command: _run(command, toolkit), commands):
                outcome.check()
    return programs


@dataclass(frozen=True)
class _Outcome:
    command: str
    code: int
    output: str

    def check(self) -> None:
        if self.code != 0:
            lines = self.output.strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise RuntimeError(f"{self.command} fails:\n  " + "\n  ".join(errors[:8]))


def _run(command: Sequence[str], toolkit: CudaToolkit) -> _Outcome:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=toolkit.environment())
    return _Outcome(Path(command[0]).name, done.returncode, done.stdout + done.stderr)
