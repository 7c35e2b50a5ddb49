"""NVIDIA's compute-sanitizer on a small sweep: each of its tools finds what another cannot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gpu_check.processes import command
from gpu_check.steps import LeftOut, Limit

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_PLACES = ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer", "extras/compute-sanitizer/compute-sanitizer")
_FAILED = 86
_REFUSALS = ("Device not supported", "Unable to find injection library")


def find_sanitizer(cuda_root: Path) -> Path | None:
    """compute-sanitizer: `COMPUTE_SANITIZER`, the PATH, then CUDA's folder."""
    named = os.environ.get("COMPUTE_SANITIZER") or shutil.which("compute-sanitizer")
    places = [Path(named)] if named else [cuda_root / place for place in _PLACES]
    return next((place for place in places if place.is_file()), None)


def sanitize(sanitizer: Path, tool: str, sweep: Path, limit: Limit) -> str:
    """What `tool` says of the small sweep, in its last line.

    Raises:
        LeftOut: it does not work on this machine (in some sandboxes it has no access to the device).
        LeftOut, Failed: it reaches `limit`.
        RuntimeError: it finds something, or the sweep fails.
    """
    words = [str(sanitizer), "--tool", tool, "--error-exitcode", str(_FAILED), str(sweep), "--small"]
    if tool == "initcheck":
        # Poison would count as initialised.
        words.append("--no-poison")
    done = command(words, limit)
    lines = (done.stdout + done.stderr).strip().splitlines()
    refusal = next((line for line in lines if any(words in line for words in _REFUSALS)), None)
    if refusal is not None:
        raise LeftOut(f"compute-sanitizer does not work here: {refusal.strip()}")
    if done.returncode != 0:
        raise RuntimeError(f"{tool} ends with code {done.returncode}:\n  " + "\n  ".join(lines[:25]))
    return lines[-1] if lines else ""
