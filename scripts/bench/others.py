"""Tools that ours are measured beside, each in an environment of its own: they want other versions of libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from teamlora_export.cache import cache_folder

OTHERS = {
    "optimum": ["torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0"],
    "genai": ["torch==2.13.0", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai==0.18.0", "peft"],
}


def make_environment(name: str) -> Path:
    """The folder of the environment of `name`, made on the first call and kept in the user's cache."""
    folder = cache_folder() / "bench" / name
    ready, wanted = folder / "ready", "\n".join(OTHERS[name])
    if not ready.exists() or ready.read_text() != wanted:
        print(f"Making an environment for {name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", *OTHERS[name]], check=True)
        ready.write_text(wanted)
    return folder
