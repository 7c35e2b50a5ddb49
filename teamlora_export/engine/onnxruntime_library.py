"""The native op for ONNX Runtime on a CPU: compiled on this machine, kept in the user's cache, described, checked.

A model needs none: its op carries a definition in standard operators. With this library loaded, ONNX Runtime runs the
op itself instead. One build serves every ONNX Runtime from the headers' version on, and holds the code of several
instruction sets, of which the fastest that the processor has is taken when it is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from teamlora_export.bundle import Bundle
from teamlora_export.cache import cache_folder
from teamlora_export.engine.plugin import sources_folder
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import open_file, sha256_of
from teamlora_export.graph import op
from teamlora_export.progress import Reporter
from teamlora_export.staging import write_aside

LIBRARY_NAME = "libteamlora_onnxruntime.so"
HEADER = "onnxruntime_cxx_api.h"
# Where the headers of a release, of a system's package and of a build from source lie below an include folder.
_BELOW_INCLUDE = ("", "onnxruntime", "onnxruntime/core/session")
_SYSTEM_INCLUDES = ("/usr/include", "/usr/local/include", "/opt/onnxruntime/include")
# ELF's numbers for the processors that there is code for.
_PROCESSORS = {62: "x86_64", 183: "aarch64"}


@dataclass(frozen=True)
class OnnxRuntimeLibrary:
    """A compiled library of the op.

    Attributes:
        op: "DOMAIN::NAME". op_version: of the op's definition.
        onnxruntime_api: N, where ONNX Runtime 1.N or newer is needed.
        processor: such as x86_64. instructions: the instruction sets that this machine runs of it, fastest first.
        build: hash of its sources.
    """

    path: Path
    sha256: str
    op: str
    op_version: int
    attributes: tuple[str, ...]
    onnxruntime_api: int
    processor: str
    instructions: tuple[str, ...]
    build: str


@dataclass(frozen=True)
class _Tools:
    cmake: str
    include: Path
    api: int


def build_library(reporter: Reporter | None = None) -> OnnxRuntimeLibrary:
    """Compile the library, or take the build that is kept.

    Raises:
        ExportError: a tool is missing, or the compiler fails; nothing is kept then.
    """
    reporter = reporter or Reporter()
    build, include = library_sources_sha256(), find_include()
    for kept in _kept(build, "*" if include is None else str(_header_api(include))):
        reporter.say(f"Native op: taken from {kept}")
        return read_library(kept)
    tools = _find_tools()
    kept = cache_folder() / "plugins" / _key(build, str(tools.api)) / LIBRARY_NAME
    label = f"Compiling the op for ONNX Runtime 1.{tools.api} and newer"
    with reporter.step(label), tempfile.TemporaryDirectory() as folder:
        made = _compile(Path(folder), tools, build)
        library = read_library(made)
        write_aside(kept, made.read_bytes())
    return replace(library, path=kept)


def find_library(path: Path | None, reporter: Reporter) -> OnnxRuntimeLibrary:
    """The library at `path`, or the one built for this version, which is compiled where it is not there yet.

    Raises:
        ExportError: it is no library of ours, does not fit the op, ONNX Runtime or the processor, or cannot be built.
    """
    library = read_library(path) if path is not None else build_library(reporter)
    check_library(library)
    return library


def library_for(bundle: Bundle, path: Path, reporter: Reporter) -> OnnxRuntimeLibrary:
    """The library at `path`, to run the op of `bundle`.

    Raises:
        ExportError: as `find_library`; or the bundle has no use for it.
    """
    if bundle.manifest.op["form"] == "standard":
        raise ExportError(
            f"{bundle.folder}: was exported with --op standard, so there is no op for the native library to run."
        )
    if bundle.manifest.dtype == "bf16":
        raise ExportError(
            f"{bundle.folder}: is bf16, which ONNX Runtime has no products in on a CPU, so that it does not run there "
            "with the native op. Export in fp32 or fp16, or leave --library out."
        )
    return find_library(path, reporter)


def kept_library() -> OnnxRuntimeLibrary | None:
    """The library that was built here for this version, if there is one that the installed ONNX Runtime loads."""
    for path in _kept(library_sources_sha256(), "*"):
        library = read_library(path)
        with suppress(ExportError):
            check_library(library)
            return library
    return None


def check_library(library: OnnxRuntimeLibrary) -> None:
    """Refuse a library that does not know the op as this version writes it, or that this ONNX Runtime cannot load."""
    wanted = (f"{op.DOMAIN}::{op.NAME}", op.VERSION, op.ATTRIBUTES)
    if (library.op, library.op_version, library.attributes) != wanted:
        raise ExportError(
            f"{library.path}: implements {library.op} version {library.op_version} ({', '.join(library.attributes)}), "
            f"the model needs {wanted[0]} version {wanted[1]} ({', '.join(op.ATTRIBUTES)}). "
            "Build it again: teamlora-export plugins build --onnxruntime"
        )
    installed = _onnxruntime_version()
    if installed is not None and installed < (1, library.onnxruntime_api):
        raise ExportError(
            f"{library.path}: needs ONNX Runtime 1.{library.onnxruntime_api} or newer, "
            f"{'.'.join(map(str, installed))} is installed. Upgrade onnxruntime, or build it with older headers."
        )


def read_library(path: Path) -> OnnxRuntimeLibrary:
    """What the library at `path` says of itself.

    It is opened in a process of its own, so that a broken one harms nobody.

    Raises:
        ExportError: it is not there, is for another processor, cannot be loaded, or is no library of ours.
    """
    try:
        _check_processor(path)
    except FileNotFoundError:
        raise ExportError(
            f"{path}: no such file. Build the native op with `teamlora-export plugins build --onnxruntime`."
        ) from None
    result = subprocess.run(
        [sys.executable, "-P", "-c", _DESCRIBE, str(path.resolve())], capture_output=True, text=True, check=False
    )
    try:
        fields = json.loads(result.stdout)
        if fields.pop("registers"):
            lists = {name: tuple(fields[name]) for name in ("attributes", "instructions")}
            return OnnxRuntimeLibrary(**{**fields, **lists}, path=path, sha256=sha256_of(path))
        reason = "it lacks RegisterCustomOps"
    except (ValueError, TypeError, KeyError):
        reason = (result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"])[-1]
    raise ExportError(f"{path}: not a library of teamlora-export's op for ONNX Runtime ({reason}).")


_DESCRIBE = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
library.teamlora_library_info.restype = ctypes.c_char_p
info = json.loads(library.teamlora_library_info())
info["registers"] = hasattr(library, "RegisterCustomOps")
print(json.dumps(info))
"""


def _check_processor(path: Path) -> None:
    with open_file(path) as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return
    machine = _PROCESSORS.get(int.from_bytes(head[18:20], "little"), "another processor")
    if machine != platform.machine():
        raise ExportError(f"{path}: is built for {machine}, this machine is {platform.machine()}.")


def library_sources_sha256() -> str:
    """Of all that goes into the library, 16 digits."""
    root = sources_folder()
    digest = hashlib.sha256()
    for path in sorted([root / "op.h", *root.glob("kernels/cpu/*"), *root.glob("onnxruntime/*")]):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _key(build: str, api: str) -> str:
    return f"{build}-ort{api}-{platform.machine()}"


def _kept(build: str, api: str) -> list[Path]:
    """Libraries that are kept, of any API where it is `*`."""
    return sorted((cache_folder() / "plugins").glob(f"{_key(build, api)}/{LIBRARY_NAME}"))


def find_include() -> Path | None:
    """The folder of ONNX Runtime's headers: `ONNXRUNTIME_INCLUDE_DIR`, or the system's."""
    wanted = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    folders = (wanted,) if wanted else _SYSTEM_INCLUDES
    places = (Path(folder) / below for folder in folders for below in _BELOW_INCLUDE)
    return next((place.resolve() for place in places if (place / HEADER).is_file()), None)


def _find_tools() -> _Tools:
    include, cmake = find_include(), shutil.which("cmake")
    findings = []
    if include is None:
        script = Path(__file__).parents[1] / "deploy" / "templates" / "cpp" / "get_libraries.sh"
        findings.append(
            f"{HEADER}: set ONNXRUNTIME_INCLUDE_DIR to the include folder of an ONNX Runtime release, install "
            f"libonnxruntime-dev, or on Debian: sh {script} FOLDER; export ONNXRUNTIME_INCLUDE_DIR=FOLDER/include"
        )
    if cmake is None:
        findings.append("cmake: apt-get install cmake, or: pip install cmake")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        findings.append("a C++ compiler: apt-get install g++")
    raise_findings("The native op cannot be built here; missing", findings)
    assert include is not None
    assert cmake is not None
    return _Tools(cmake, include, _header_api(include))


def _header_api(include: Path) -> int:
    text = (include / "onnxruntime_c_api.h").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"#define ORT_API_VERSION (\d+)", text)
    if match is None:
        raise ExportError(f"{include}: onnxruntime_c_api.h names no ORT_API_VERSION.")
    return int(match[1])


def _compile(folder: Path, tools: _Tools, build: str) -> Path:
    configure = [
        *(tools.cmake, "-S", str(sources_folder() / "onnxruntime"), "-B", str(folder)),
        f"-DONNXRUNTIME_INCLUDE_DIR={tools.include}",
        f"-DTEAMLORA_BUILD_ID={build}",
    ]
    for command in (configure, [tools.cmake, "--build", str(folder), "--parallel"]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            errors = list(_errors(result.stdout + result.stderr))
            raise ExportError(
                f"The native op does not compile with ONNX Runtime's headers 1.{tools.api} ({tools.include}):\n  "
                + "\n  ".join(errors[:8])
            )
    return folder / LIBRARY_NAME


def _errors(output: str) -> Iterator[str]:
    lines = output.strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    yield from errors or lines[-8:]


def _onnxruntime_version() -> tuple[int, int] | None:
    """MAJOR, MINOR of what is installed, by whichever of its packages."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            match = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
        if match is not None:
            return int(match[1]), int(match[2])
    return None
