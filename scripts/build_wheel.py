"""Builds the package's wheels into a folder: one of Python alone, for any system, and one of the same that carries the
native op for ONNX Runtime, so that whoever installs it needs no compiler.

The second is for this processor and for systems whose C library is as new as the symbols that the op was linked to:
build it where that is old, in a manylinux image say, and it serves many. Prints both paths.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from teamlora_export.engine.onnxruntime_library import LIBRARY_NAME, build_library

ROOT = Path(__file__).parents[1]
# Where `teamlora_export.engine.onnxruntime_library.carried_path` looks.
CARRIED_NAME = f"teamlora_export/native/{LIBRARY_NAME}"
_ANY = "py3-none-any"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "dist", help="default: dist")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    wheel = build_wheel(out)
    print(wheel)
    print(carry(build_library().path, wheel))


def build_wheel(out: Path, *options: str) -> Path:
    """The wheel of Python alone, from a copy of the files that git has: setuptools packs what it finds in its own build
    folder, too. Options go to pip."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    sources = [name for name in names if name and not name.startswith((b"adapters/", b"tests/"))]
    with tempfile.TemporaryDirectory() as folder:
        checkout, made = Path(folder) / "checkout", Path(folder) / "made"
        checkout.mkdir()
        subprocess.run(["cp", "-P", "--parents", "-t", checkout, *sources], cwd=ROOT, check=True)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps", *options]
        subprocess.run([*pip, "-w", made, checkout], check=True, stdout=sys.stderr)
        wheel = next(made.glob("*.whl"))
        (out / wheel.name).write_bytes(wheel.read_bytes())
    return out / wheel.name


def carry(library: Path, wheel: Path) -> Path:
    """A wheel beside `wheel` that is the same with `library` in it."""
    tag = _ANY.replace("any", platform_tag(library.read_bytes()))
    target = wheel.with_name(wheel.name.replace(_ANY, tag))
    with ZipFile(wheel) as source, ZipFile(target, "w", ZIP_DEFLATED) as made:
        files = source.infolist()
        # Its list of files is the last one.
        for info in files[:-1]:
            content = source.read(info)
            if info.filename.endswith(".dist-info/WHEEL"):
                content = _tagged(content.decode(), tag).encode()
            made.writestr(info, content)
        carried = ZipInfo(CARRIED_NAME, files[-1].date_time)
        carried.external_attr = 0o100755 << 16
        made.writestr(carried, library.read_bytes(), ZIP_DEFLATED)
        made.writestr(files[-1], _record(made, files[-1].filename))
    return target


def platform_tag(library: bytes) -> str:
    """The systems that can load `library`, as PEP 600 names them: those whose C library has all symbols that it is
    linked to; another C library than GNU's is named by no version."""
    symbols = re.findall(rb"\0GLIBC_(\d+)\.(\d+)(?:\.\d+)?(?=\0)", library)
    newest = max(((int(major), int(minor)) for major, minor in symbols), default=None)
    system = "linux" if newest is None else f"manylinux_{newest[0]}_{newest[1]}"
    return f"{system}_{platform.machine()}"


def _tagged(description: str, tag: str) -> str:
    return description.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false").replace(f"Tag: {_ANY}", f"Tag: {tag}")


def _record(wheel: ZipFile, name: str) -> str:
    """The list of a wheel's files with their hashes, itself without one."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for info in wheel.infolist():
        content = wheel.read(info)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow((info.filename, f"sha256={digest}", len(content)))
    rows.writerow((name, "", ""))
    return text.getvalue()


if __name__ == "__main__":
    main()
