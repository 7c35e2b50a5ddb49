"""Faults planted in the CUDA kernels' source: whether the sweep finds them, with the kernels emulated on the CPU.

A compiler takes longest here, so each fault is compiled alone with the kernels that it is in, of one type, without
optimisation; CUDA's headers are read once for all.
"""

from __future__ import annotations

import itertools
import os
import shutil
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


def missed(faults: Mapping[str, Sequence[str]], kind: str, programs: Path, folder: Path) -> list[str]:
    """The faults that the sweep does not find, each a file, code that is there once, what is put in its place, and so
    on. `kind`: one-adapter or adapters, whose kernels run."""
    header = folder / "read_once.h"
    header.write_text('#include "emulation.h"\n#include <array>\n#include <atomic>\n#include <cstdlib>\n')
    _compile("-x", "c++-header", header, "-o", f"{header}.gch")
    with ThreadPoolExecutor(2) as pool:
        caught = pool.map(lambda name: _is_caught(name, faults[name], kind, programs, folder), faults)
        return [name for name, found in zip(faults, caught, strict=True) if not found]


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
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1) or done.returncode < 0, f"{name}: {done.returncode} {done.stdout} {done.stderr}"
    return done.returncode != 0


def _change(path: Path, changes: Sequence[str]) -> None:
    text = path.read_text()
    for code, changed in zip(changes[::2], changes[1::2], strict=True):
        assert text.count(code) == 1, f"{path}: what is changed is there {text.count(code)} times: {code}"
        text = text.replace(code, changed)
    path.write_text(text)
