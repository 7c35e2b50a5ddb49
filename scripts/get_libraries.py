"""Prints a folder with what the project of `deploy cpp` is built with, as CMAKE_PREFIX_PATH takes it.

The project's own get_libraries.sh makes it, in the user's cache; TensorRT-RTX's library stands in for TensorRT's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from teamlora_export.cache import cache_folder
from teamlora_export.deploy.cpp import SOURCES

ROOT = Path(__file__).parents[1]
SCRIPT, CONSTRAINTS = SOURCES / "get_libraries.sh", ROOT / "constraints.txt"


def get_libraries() -> Path:
    """The folder; made where it is not there yet."""
    runtime = _tensorrt_rtx()
    key = hashlib.sha256(SCRIPT.read_bytes() + CONSTRAINTS.read_bytes() + str(runtime).encode()).hexdigest()[:16]
    kept = cache_folder() / "libraries" / key
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as staging:
            made = Path(staging) / "made"
            environment = {**os.environ, "PIP_CONSTRAINT": str(CONSTRAINTS), "PYTHON": sys.executable}
            subprocess.run(["sh", SCRIPT, made], check=True, env=environment, stdout=sys.stderr)
            for name in ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"):
                (made / "lib" / name).symlink_to(runtime)
            os.replace(made, kept)
    return kept


def _tensorrt_rtx() -> Path:
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("libtensorrt_rtx.so.*"))


if __name__ == "__main__":
    print(get_libraries())
