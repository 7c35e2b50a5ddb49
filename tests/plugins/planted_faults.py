"""Faults planted in the CUDA kernels' source: whether the sweep finds them, with the kernels emulated on the CPU.

A compiler takes longest here, so each fault is compiled alone with the kernels that it is in, of one type, without
optimisation; CUDA's headers are read once for all. The source without a fault is compiled and run in the same way, and
must pass: else each fault would seem to be found.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teamlora_export.engine.toolchain import find_toolchain

PLUGINS = Path(__file__).parents[2] / "plugins"
# What of `launch.cu` makes which kernels.
_CALL = "<{}>(shape, tuning, tensors, workspace, stream)"
_OTHER_TYPES = [f"launch_typed{_CALL.format(dtype)}" for dtype in ("float", "__nv_bfloat16")]
_PATHS = {
    (path, kind): f"launch_{path}{suffix}{_CALL.format('T')}"
    for path in ("few", "many")
    for kind, suffix in (("one-adapter", ""), ("adapters", "_of_slots"))
}
# No code that the sweep ends with.
_LEFT_OUT = "(std::exit(3), cudaErrorInvalidValue)"
# Of a program's own doing; others come from outside, as where there is no memory.
_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE}
_WITHOUT_FAULT = "no fault"
# Of a sweep that takes seconds.
_SWEEP_SECONDS = 180


def missed(faults: Mapping[str, Sequence[str]], kind: str, programs: Path, folder: Path) -> list[str]:
    """The faults that the sweep does not find, each a file, code that is there once, what is put in its place, and so
    on. `kind`: one-adapter or adapters, whose kernels run.

    Raises:
        AssertionError: the sweep fails without a fault; or one ends it in a way that tells nothing, or never.
    """
    header = folder / "read_once.h"
    header.write_text('#include "emulation.h"\n#include <array>\n#include <atomic>\n#include <cstdlib>\n')
    _compile("-x", "c++-header", header, "-o", f"{header}.gch")
    tried = {_WITHOUT_FAULT: ("launch.cu",), **faults}
    with ThreadPoolExecutor(2) as pool:
        caught = pool.map(lambda name: _is_caught(name, tried[name], kind, programs, folder), tried)
        found = dict(zip(tried, caught, strict=True))
    assert not found.pop(_WITHOUT_FAULT), "the sweep fails without a fault"
    return [name for name, is_caught in found.items() if not is_caught]


def _compile(*words: str | Path) -> None:
    flags = ["-std=c++17", "-w", "-DTEAMLORA_EMULATION", "-isystem", find_toolchain().cuda_include]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, f"-I{PLUGINS / 'tests'}", *words], check=True)


def _is_caught(name: str, fault: Sequence[str], kind: str, programs: Path, folder: Path) -> bool:
    file, *changes = fault
    kernels = shutil.copytree(PLUGINS / "kernels", folder / name.replace(" ", "-"))
    _change(kernels / file, changes)
    paths = [path for path in ("few", "many") if file == f"{path}_tokens.cuh"] or ["few", "many"]
    left_out = _OTHER_TYPES + [call for of, call in _PATHS.items() if of not in itertools.product(paths, [kind])]
    _change(kernels / "launch.cu", [word for call in left_out for word in (call, _LEFT_OUT)])
    libraries = [programs / f"lib{name}.a" for name in ("sweep_of_emulation", "emulation")]
    sweep = kernels / "sweep"
    _compile(
        "-include", folder / "read_once.h", "-x", "c++", kernels / "launch.cu", "-x", "none", *libraries, "-o", sweep
    )
    kinds = [kind, "fp16", *(paths if len(paths) == 1 else ())]
    command = [sweep, "--cases", "0", "--first", *(word for each in kinds for word in ("--only", each))]
    return tells_a_fault(name, command, _SWEEP_SECONDS)


def tells_a_fault(name: str, command: Sequence[str | Path], seconds: float) -> bool:
    """Whether a sweep ends with what it found, or crashes.

    Raises:
        AssertionError: it ends otherwise, or not within `seconds`.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{name}: the sweep is not done after {seconds} s") from None
    assert done.returncode in {0, 1, *_CRASHES}, f"{name}: {done.returncode} {done.stdout} {done.stderr}"
    return done.returncode != 0


def _change(path: Path, changes: Sequence[str]) -> None:
    text = path.read_text()
    for code, changed in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(code) == 1, f"{path}: what is changed is there {text.count(code)} times: {code}"
        text = text.replace(code, changed)
    path.write_text(text)
