"""The TensorRT plugin: compiled on this machine, kept in the user's cache, described, checked before it is loaded.

A build is kept under a hash of the sources, the architectures and the versions of compiler and headers, so a changed
kernel is never met by an old library.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from teamlora_export.engine.toolchain import Toolchain, find_toolchain
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.graph.template import cache_folder
from teamlora_export.progress import Reporter

LIBRARY_NAME = "libteamlora_tensorrt.so"
# A100; RTX 30, A10; RTX 40, L4; H100; B200; RTX 50.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@dataclass(frozen=True)
class PluginLibrary:
    """A compiled plugin.

    Attributes:
        op: "DOMAIN::NAME". op_version: of the op's definition.
        tensorrt, cuda: the headers' and the compiler's version.
        architectures: the compute capabilities that it has code for.
        build: hash of its sources.
    """

    path: Path
    sha256: str
    op: str
    op_version: int
    attributes: tuple[str, ...]
    tensorrt: str
    cuda: str
    architectures: tuple[str, ...]
    build: str


def build_plugin(architectures: Sequence[str] = ARCHITECTURES, reporter: Reporter | None = None) -> PluginLibrary:
    """Compile the plugin, or take the build that is kept.

    Raises:
        ExportError: a tool is missing, an architecture is none, or the compiler fails; nothing is kept then.
    """
    reporter = reporter or Reporter()
    for architecture in architectures:
        if not re.fullmatch(r"\d{2,3}[af]?", architecture):
            raise ExportError(f"--arch {architecture}: not a compute capability. Give numbers such as 80,89,120.")
    toolchain = find_toolchain()
    build = sources_sha256()
    key = _key(build, architectures, toolchain)
    kept = cache_folder() / "plugins" / key / LIBRARY_NAME
    if kept.is_file():
        reporter.say(f"Plugin: taken from {kept}")
        return read_plugin(kept)
    label = f"Compiling the plugin for sm_{', sm_'.join(architectures)} (CUDA {toolchain.cuda_version})"
    with reporter.step(label), tempfile.TemporaryDirectory() as folder:
        made = _compile(Path(folder), toolchain, architectures, build)
        library = read_plugin(made)
        kept.parent.mkdir(parents=True, exist_ok=True)
        staged = kept.with_name(f".{LIBRARY_NAME}.{os.getpid()}")
        staged.write_bytes(made.read_bytes())
        os.replace(staged, kept)
    return replace(library, path=kept)


def latest_plugin() -> Path:
    """The library that was built last for these sources.

    Raises:
        ExportError: there is none.
    """
    kept = (cache_folder() / "plugins").glob(f"{sources_sha256()}-*/{LIBRARY_NAME}")
    newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise ExportError("No plugin has been built for this version: teamlora-export plugins build")
    return newest


def find_plugin(path: Path | None, reporter: Reporter) -> PluginLibrary:
    """The library at `path`, or the one built for this version, which is compiled where it is not there yet.

    Raises:
        ExportError: it is no plugin of ours, has another version of the op, or cannot be built here.
    """
    library = read_plugin(path) if path is not None else build_plugin(reporter=reporter)
    check_plugin(library)
    return library


def check_plugin(library: PluginLibrary) -> None:
    """Refuse a library that does not know the op as this version writes it."""
    wanted = (f"{op.DOMAIN}::{op.NAME}", op.VERSION, op.ATTRIBUTES)
    if (library.op, library.op_version, library.attributes) != wanted:
        raise ExportError(
            f"{library.path}: implements {library.op} version {library.op_version} ({', '.join(library.attributes)}), "
            f"the model needs {wanted[0]} version {wanted[1]} ({', '.join(op.ATTRIBUTES)}). "
            "Build it again: teamlora-export plugins build"
        )


def read_plugin(path: Path) -> PluginLibrary:
    """What the library at `path` says of itself.

    It is opened in a process of its own, so that a broken one harms nobody.

    Raises:
        ExportError: it is not there, cannot be loaded, or is no plugin of ours.
    """
    if not path.is_file():
        raise ExportError(f"{path}: no such file. Build the plugin with `teamlora-export plugins build`.")
    command = [sys.executable, "-c", _DESCRIBE, str(path.resolve())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        fields = json.loads(result.stdout)
    except ValueError:
        reason = (result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"])[-1]
        raise ExportError(f"{path}: not a plugin library of teamlora-export ({reason}).") from None
    for symbol in fields.pop("missing"):
        raise ExportError(f"{path}: lacks {symbol}, which TensorRT looks for. Build it again.")
    architectures = tuple(name.removesuffix("-real") for name in fields["architectures"].split())
    return PluginLibrary(
        **{**fields, "path": path, "architectures": architectures, "attributes": tuple(fields["attributes"])},
        sha256=sha256_of(path),
    )


_DESCRIBE = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
library.teamlora_plugin_info.restype = ctypes.c_char_p
info = json.loads(library.teamlora_plugin_info())
info["missing"] = [name for name in ("getCreators", "setLoggerFinder") if not hasattr(library, name)]
print(json.dumps(info))
"""


def sources_folder() -> Path:
    """The native sources: beside the package in a checkout, under the environment's share folder elsewhere."""
    checkout = Path(__file__).parents[2] / "plugins"
    return checkout if checkout.is_dir() else Path(sys.prefix) / "share" / "teamlora-export" / "plugins"


def sources_sha256() -> str:
    """Of all that goes into the library, 16 digits."""
    root = sources_folder()
    digest = hashlib.sha256()
    for path in sorted([root / "CMakeLists.txt", root / "op.h", *root.glob("kernels/*.*"), *root.glob("tensorrt/*")]):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _key(build: str, architectures: Sequence[str], toolchain: Toolchain) -> str:
    return f"{build}-trt{toolchain.tensorrt_version}-cuda{toolchain.cuda_version}-sm{'-'.join(architectures)}"


def _compile(folder: Path, toolchain: Toolchain, architectures: Sequence[str], build: str) -> Path:
    # Machine code for each, and PTX of the last one for what comes after it.
    targets = [*(f"{name}-real" for name in architectures[:-1]), architectures[-1]]
    configure = [
        *(str(toolchain.cmake), "-S", str(sources_folder()), "-B", str(folder)),
        f"-DCMAKE_CUDA_COMPILER={toolchain.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}",
        f"-DTENSORRT_INCLUDE_DIR={toolchain.tensorrt_include}",
        f"-DTEAMLORA_BUILD_ID={build}",
    ]
    build_library = [str(toolchain.cmake), "--build", str(folder), "--parallel", "--target", "teamlora_tensorrt"]
    for command in (configure, build_library):
        result = subprocess.run(command, capture_output=True, text=True, env=toolchain.environment(), check=False)
        if result.returncode != 0:
            lines = (result.stdout + result.stderr).strip().splitlines()
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise ExportError(
                f"The plugin does not compile with CUDA {toolchain.cuda_version} ({toolchain.nvcc}) and TensorRT "
                f"{toolchain.tensorrt_version} ({toolchain.tensorrt_include}):\n  " + "\n  ".join(errors[:8])
            )
    return folder / LIBRARY_NAME
