"""The native op for ONNX Runtime: carried by the package or compiled on this machine and kept in the user's cache;
described, checked.

A model needs none: its op carries a definition in standard operators. With this library loaded, ONNX Runtime runs the
op itself instead. One build serves every ONNX Runtime from the headers' version on, and holds the code of several
instruction sets, of which the fastest that the processor has is taken when it is loaded. A second library is for the
CUDA provider too: a session takes a domain from one library alone, so it has the op for both.
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from teamlora_export.bundle import Bundle
from teamlora_export.cache import cache_folder
from teamlora_export.engine.plugin import (
    check_architectures,
    choose_architectures,
    cuda_options,
    read_architectures,
    sources_folder,
    why_unreadable,
)
from teamlora_export.engine.toolchain import CudaToolkit, find_cuda, missing_compilers
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import open_file, sha256_of
from teamlora_export.graph import op
from teamlora_export.progress import Reporter
from teamlora_export.staging import write_aside

LIBRARY_NAME = "libteamlora_onnxruntime.so"
CUDA_LIBRARY_NAME = "libteamlora_onnxruntime_cuda.so"
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
        cuda, architectures: as a `PluginLibrary` has them; empty where it is for a CPU alone.
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
    cuda: str
    architectures: tuple[str, ...]
    build: str


@dataclass(frozen=True)
class _Tools:
    cmake: str
    include: Path
    api: int
    toolkit: CudaToolkit | None


def build_library(reporter: Reporter | None = None) -> OnnxRuntimeLibrary:
    """Compile the library, or take the one that this package carries, or the build that is kept.

    Raises:
        ExportError: a tool is missing, or the compiler fails; nothing is kept then. Where the package carries a library
            that does not fit, that is the reason.
    """
    reporter = reporter or Reporter()
    build, misfit = library_sources_sha256(), None
    try:
        if (carried := _carried(build)) is not None:
            reporter.say(f"Native op: taken from {carried.path}")
            return carried
    except ExportError as error:
        misfit = error
    for kept in _kept(f"{_key(build, _installed_api())}/{LIBRARY_NAME}"):
        reporter.say(f"Native op: taken from {kept.path}")
        return kept
    try:
        tools = _find_tools(cuda=False)
    except ExportError as missing:
        raise misfit or missing from None
    with reporter.step(f"Compiling the op for ONNX Runtime 1.{tools.api} and newer"):
        return _make(f"{_key(build, tools.api)}/{LIBRARY_NAME}", tools, build)


def build_cuda_library(
    architectures: Sequence[str] | None = None, reporter: Reporter | None = None
) -> OnnxRuntimeLibrary:
    """Compile the library for ONNX Runtime's CUDA provider, or take the build that is kept.

    Args:
        architectures: as `build_plugin` takes them.

    Raises:
        ExportError: a tool is missing, an architecture is none, or the compiler fails; nothing is kept then.
    """
    reporter = reporter or Reporter()
    check_architectures(architectures)
    toolkit = find_cuda() or _find_tools(cuda=True).toolkit
    assert toolkit is not None
    chosen = choose_architectures(architectures, toolkit, reporter)
    build = library_sources_sha256(cuda=True)
    name = f"cuda{toolkit.cuda_version}-sm{'-'.join(chosen)}/{CUDA_LIBRARY_NAME}"
    for kept in _kept(f"{_key(build, _installed_api())}-{name}"):
        reporter.say(f"Native op: taken from {kept.path}")
        return kept
    tools = _find_tools(cuda=True)
    label = f"Compiling the op for ONNX Runtime 1.{tools.api} and newer, and for sm_{', sm_'.join(chosen)}"
    with reporter.step(f"{label} (CUDA {toolkit.cuda_version})"):
        options = ("-DTEAMLORA_CUDA=ON", *cuda_options(toolkit, chosen))
        return _make(f"{_key(build, tools.api)}-{name}", tools, build, *options)


def find_library(path: Path | None, reporter: Reporter) -> OnnxRuntimeLibrary:
    """The library at `path`, or the one of this version: carried by the package, or built, if need be now.

    Raises:
        ExportError: it is no library of ours, does not fit the op, ONNX Runtime or the processor, or cannot be built.
    """
    library = read_library(path) if path is not None else build_library(reporter)
    check_library(library)
    return library


def carried_path() -> Path:
    """Where a wheel that carries the library has it."""
    return Path(__file__).parents[1] / "native" / LIBRARY_NAME


def _carried(build: str) -> OnnxRuntimeLibrary | None:
    """The library of this package, if it carries one.

    Raises:
        ExportError: it is not of these sources, or does not fit ONNX Runtime or the processor.
    """
    if not carried_path().is_file():
        return None
    library = read_library(carried_path())
    check_library(library)
    if library.build != build:
        raise ExportError(
            f"{library.path}: was built from other sources ({library.build}) than this package has ({build}). "
            "Install the package again."
        )
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
    """The library that the package carries or that was built here for this version, if there is one that the installed
    ONNX Runtime loads."""
    build = library_sources_sha256()
    with suppress(ExportError):
        if (carried := _carried(build)) is not None:
            return carried
    for kept in _kept(f"{_key(build, None)}/{LIBRARY_NAME}"):
        with suppress(ExportError):
            check_library(kept)
            return kept
    return None


def library_here() -> OnnxRuntimeLibrary:
    """As `kept_library`.

    Raises:
        ExportError: there is none; or why the one that the package carries does not fit.
    """
    if (kept := kept_library()) is not None:
        return kept
    _carried(library_sources_sha256())
    raise ExportError("No native op was built here for this version: teamlora-export plugins build --onnxruntime")


def check_library(library: OnnxRuntimeLibrary) -> None:
    """Refuse a library that does not know the op as this version writes it, or that this ONNX Runtime cannot load."""
    wanted = (f"{op.DOMAIN}::{op.NAME}", op.ADAPTERS_VERSION, op.ATTRIBUTES)
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
    command = [sys.executable, "-P", "-c", _DESCRIBE, str(path.resolve())]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    try:
        fields = json.loads(result.stdout)
        if fields.pop("registers"):
            lists = {name: tuple(fields[name]) for name in ("attributes", "instructions")}
            lists["architectures"] = read_architectures(fields["architectures"])
            return OnnxRuntimeLibrary(**{**fields, **lists}, path=path, sha256=sha256_of(path))
        reason = "it lacks RegisterCustomOps"
    except (ValueError, TypeError, KeyError, AttributeError):
        reason = why_unreadable(result)
    raise ExportError(
        f"{path}: not a library of teamlora-export's op for ONNX Runtime ({reason}). "
        "Build one: teamlora-export plugins build --onnxruntime"
    )


def is_library(path: Path) -> bool:
    """Whether the file at `path` says that it is a library of the op for ONNX Runtime, without opening it as one."""
    return path.is_file() and path.stat().st_size <= _LARGEST and _DESCRIBED_BY in path.read_bytes()


_DESCRIBED_BY = b"teamlora_library_info"
# Bytes; a larger file is no library of ours.
_LARGEST = 512 << 20
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


def library_sources_sha256(cuda: bool = False) -> str:
    """Of all that goes into the library for a CPU, or into that for `cuda`, 16 digits."""
    root = sources_folder()
    digest = hashlib.sha256()
    kernels = [*root.glob("kernels/cpu/*"), *(root.glob("kernels/*.*") if cuda else ())]
    for path in sorted([root / "op.h", *kernels, *root.glob("onnxruntime/*")]):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _key(build: str, api: int | None) -> str:
    """Begins the folder's name that a library is kept under: a pattern, where the API may be any."""
    return f"{build}-ort{'*' if api is None else api}-{platform.machine()}"


def _kept(pattern: str) -> Iterator[OnnxRuntimeLibrary]:
    """Libraries that are kept, as FOLDER/NAME, without those that cannot be loaded: damaged ones, and in a home that
    machines share those for a newer C library. They are built again."""
    for path in sorted((cache_folder() / "plugins").glob(pattern)):
        with suppress(ExportError):
            yield read_library(path)


def find_include() -> Path | None:
    """The folder of ONNX Runtime's headers: `ONNXRUNTIME_INCLUDE_DIR`, or the system's."""
    wanted = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    folders = (wanted,) if wanted else _SYSTEM_INCLUDES
    places = (Path(folder) / below for folder in folders for below in _BELOW_INCLUDE)
    return next((place.resolve() for place in places if (place / HEADER).is_file()), None)


def _find_tools(cuda: bool) -> _Tools:
    include, cmake = find_include(), shutil.which("cmake")
    findings = missing_compilers(cuda)
    if include is None:
        script = Path(__file__).parents[1] / "deploy" / "templates" / "cpp" / "get_libraries.sh"
        findings.append(
            f"{HEADER}: set ONNXRUNTIME_INCLUDE_DIR to the include folder of an ONNX Runtime release, install "
            f"libonnxruntime-dev, or on Debian: sh {script} FOLDER; export ONNXRUNTIME_INCLUDE_DIR=FOLDER/include"
        )
    raise_findings("The native op cannot be built here; missing", findings)
    assert include is not None
    assert cmake is not None
    return _Tools(cmake, include, _header_api(include), find_cuda() if cuda else None)


def _installed_api() -> int | None:
    """Of the headers that are found, if any are."""
    include = find_include()
    return None if include is None else _header_api(include)


def _header_api(include: Path) -> int:
    text = (include / "onnxruntime_c_api.h").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"#define ORT_API_VERSION (\d+)", text)
    if match is None:
        raise ExportError(f"{include}: onnxruntime_c_api.h names no ORT_API_VERSION.")
    return int(match[1])


def _make(name: str, tools: _Tools, build: str, *options: str) -> OnnxRuntimeLibrary:
    """Compile the library that is to be kept as `name`, FOLDER/NAME."""
    kept = cache_folder() / "plugins" / name
    with tempfile.TemporaryDirectory() as folder:
        _compile(Path(folder), tools, build, options)
        made = Path(folder) / kept.name
        library = read_library(made)
        write_aside(kept, made.read_bytes())
    return replace(library, path=kept)


def _compile(folder: Path, tools: _Tools, build: str, options: Sequence[str]) -> None:
    configure = [
        *(tools.cmake, "-S", str(sources_folder() / "onnxruntime"), "-B", str(folder)),
        f"-DONNXRUNTIME_INCLUDE_DIR={tools.include}",
        f"-DTEAMLORA_BUILD_ID={build}",
        *options,
    ]
    environment = None if tools.toolkit is None else tools.toolkit.environment()
    for command in (configure, [tools.cmake, "--build", str(folder), "--parallel"]):
        result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if result.returncode != 0:
            errors = list(_errors(result.stdout + result.stderr))
            raise ExportError(
                f"The native op does not compile with ONNX Runtime's headers 1.{tools.api} ({tools.include}):\n  "
                + "\n  ".join(errors[:8])
            )


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
