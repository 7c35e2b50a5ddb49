"""The TensorRT plugin: compiled on this machine, kept in the user's cache, described, checked before it is loaded.

A build is kept under a hash of the sources, the architectures and the versions of compiler and headers, so a changed
kernel is never met by an old library. Commands that need a plugin take the build that was asked for last, if it is for
their TensorRT and GPU; an engine takes the very build that it was made with.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from teamlora_export.cache import cache_folder
from teamlora_export.engine.gpu import Gpu
from teamlora_export.engine.runtime import TensorRT
from teamlora_export.engine.toolchain import CudaToolkit, Toolchain, find_toolchain, known_architectures
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.progress import Reporter
from teamlora_export.staging import write_aside

LIBRARY_NAME = "libteamlora_tensorrt.so"
# A100; RTX 30, A10; RTX 40, L4; H100; B200; RTX 50.
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@dataclass(frozen=True)
class PluginLibrary:
    """A compiled plugin.

    Attributes:
        op: "DOMAIN::NAME". op_version: of the op's definition.
        tensorrt, cuda: the headers' and the compiler's version.
        architectures: the compute capabilities that it has code for; of the last, also code that later ones compile.
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

    def __str__(self) -> str:
        return f"{self.path} (built with the headers of TensorRT {self.tensorrt})"

    def is_for(self, tensorrt: str) -> bool:
        """Whether it was built with headers of the major version of `tensorrt`."""
        return self.tensorrt.partition(".")[0] == tensorrt.partition(".")[0]

    def runs_on(self, gpu: Gpu) -> bool:
        """Whether it has code for `gpu`: of its family, no newer than it, or what it can compile itself."""
        there = [int(name.rstrip("af")) for name in self.architectures]
        wanted = 10 * gpu.capability[0] + gpu.capability[1]
        return there[-1] <= wanted or any(one // 10 == wanted // 10 and one <= wanted for one in there)


def build_plugin(architectures: Sequence[str] | None = None, reporter: Reporter | None = None) -> PluginLibrary:
    """Compile the plugin, or take the build that is kept.

    Args:
        architectures: compute capabilities without the dot. None: those of `ARCHITECTURES` that the compiler knows.

    Raises:
        ExportError: a tool is missing, an architecture is none, or the compiler fails; nothing is kept then.
    """
    reporter = reporter or Reporter()
    check_architectures(architectures)
    toolchain = find_toolchain()
    chosen = choose_architectures(architectures, toolchain, reporter)
    build = sources_sha256()
    kept = _folder() / _key(build, chosen, toolchain) / LIBRARY_NAME
    for library in _loadable([kept]):
        # The one that was asked for last is the one that other commands take.
        os.utime(kept)
        reporter.say(f"Plugin: taken from {library}")
        return library
    versions = f"CUDA {toolchain.cuda_version}, headers of TensorRT {toolchain.tensorrt_version}"
    label = f"Compiling the plugin for sm_{', sm_'.join(chosen)} ({versions})"
    with reporter.step(label), tempfile.TemporaryDirectory() as folder:
        made = _compile(Path(folder), toolchain, chosen, build)
        library = read_plugin(made)
        write_aside(kept, made.read_bytes())
    return replace(library, path=kept)


def latest_plugin() -> Path:
    """The library that was asked for last of these sources.

    Raises:
        ExportError: there is none.
    """
    newest = next(iter(_kept(f"{sources_sha256()}-*")), None)
    if newest is None:
        raise ExportError("No plugin has been built for this version: teamlora-export plugins build")
    return newest


def find_plugin(
    path: Path | None, runtime: TensorRT, reporter: Reporter, architectures: Sequence[str] | None = None
) -> PluginLibrary:
    """A plugin to build engines with: the library at `path`; else one for `architectures`; else the one that was asked
    for last, if it is for this TensorRT and GPU; else one for all GPUs. What is not there yet is compiled.

    Raises:
        ExportError: it is no plugin of ours, has another version of the op, is for another TensorRT, or cannot be built
            here.
    """
    if path is not None:
        library = read_plugin(path)
    elif architectures is not None:
        library = build_plugin(architectures, reporter)
    else:
        there = _loadable(_kept(f"{sources_sha256()}-*"))
        fitting = (library for library in there if _fits(library, runtime))
        library = next(fitting, None) or build_plugin(reporter=reporter)
    check_plugin(library)
    check_version(library, runtime.version)
    return library


def plugin_of_engine(engine: Path, described: Mapping[str, Any], path: Path | None) -> PluginLibrary:
    """The plugin that `engine` was built with, which its facts describe: at `path`, or among the builds that are kept.

    Raises:
        ExportError: it is not there, cannot be loaded on this machine, or `path` is another.
    """
    wanted = described["sha256"]
    if path is not None:
        library = read_plugin(path)
        if library.sha256 != wanted:
            raise ExportError(
                f"{library}: is not the plugin that {engine.name} was built with (its SHA-256 differs). "
                "Name that one with --plugin, or build the engine again."
            )
    else:
        kept = next((kept for kept in _kept(f"{described['build']}-*") if sha256_of(kept) == wanted), None)
        if kept is None:
            raise ExportError(
                f"{engine}: was built with the plugin {wanted[:12]} (build {described['build']}, headers of TensorRT "
                f"{described['tensorrt']}), which is not among those in {_folder()}. Name it with --plugin, or build "
                "the engine again."
            )
        loaded = next(_loadable([kept]), None)
        if loaded is None:
            raise ExportError(
                f"{engine}: was built with {kept}, which cannot be loaded on this machine. Build both again: "
                "teamlora-export plugins build, then the engine."
            )
        library = loaded
    check_plugin(library)
    return library


def check_version(library: PluginLibrary, tensorrt: str) -> None:
    """Refuse a library of another major version of TensorRT, whose interfaces are others in memory."""
    if not library.is_for(tensorrt):
        raise ExportError(
            f"{library}: is not for TensorRT {tensorrt}. Set TENSORRT_INCLUDE_DIR to headers of TensorRT "
            f"{tensorrt.partition('.')[0]} and build it again: teamlora-export plugins build"
        )


def load_plugin(library: PluginLibrary, runtime: TensorRT) -> None:
    """Put the plugin into the process's registry, which takes one of a name: a second call finds it there.

    Raises:
        ExportError: it is for another TensorRT, the registry refuses it, or has another build of it.
    """
    check_version(library, runtime.version)
    registry = runtime.trt.get_plugin_registry()
    there = any(creator.name == op.NAME for creator in registry.all_creators)
    if there and library.sha256 not in _loaded:
        raise ExportError(f"{library}: this process has another build of the plugin. Start a new one.")
    if not there and registry.load_library(str(library.path)) is None:
        raise ExportError(f"{library}: TensorRT {runtime.version} refuses to load it.")
    _loaded.add(library.sha256)


# What `load_plugin` has put into the registry. Both are the process's.
_loaded: set[str] = set()


def check_plugin(library: PluginLibrary) -> None:
    """Refuse a library that does not know the op as this version writes it."""
    wanted = (f"{op.DOMAIN}::{op.NAME}", op.ADAPTERS_VERSION, op.ATTRIBUTES)
    if (library.op, library.op_version, library.attributes) != wanted:
        raise ExportError(
            f"{library}: implements {library.op} version {library.op_version} ({', '.join(library.attributes)}), "
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
    command = [sys.executable, "-P", "-c", _DESCRIBE, str(path.resolve())]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    try:
        fields = json.loads(result.stdout)
        for symbol in fields.pop("missing"):
            raise ExportError(f"{path}: lacks {symbol}, which TensorRT looks for. Build it again.")
        lists = {
            "attributes": tuple(fields["attributes"]),
            "architectures": read_architectures(fields["architectures"]),
        }
        return PluginLibrary(**{**fields, **lists}, path=path, sha256=sha256_of(path))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ExportError(
            f"{path}: not a plugin library of teamlora-export ({why_unreadable(result)}). "
            "Build one: teamlora-export plugins build"
        ) from None


def why_unreadable(described: subprocess.CompletedProcess[str]) -> str:
    """Why the process that opened a library gave no description of it."""
    if described.returncode == 0:
        return "it does not say what it is"
    return (described.stderr.strip().splitlines() or [f"it ended with code {described.returncode}"])[-1]


def read_architectures(targets: str) -> tuple[str, ...]:
    """The compute capabilities in cmake's words, as libraries name them."""
    return tuple(name.removesuffix("-real") for name in targets.split())


_DESCRIBE = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
library.teamlora_plugin_info.restype = ctypes.c_char_p
info = json.loads(library.teamlora_plugin_info())
info["missing"] = [name for name in ("getCreators", "setLoggerFinder") if not hasattr(library, name)]
print(json.dumps(info))
"""


def sources_folder() -> Path:
    """The native sources: in the package, where a checkout has a link to them."""
    return Path(__file__).parents[1] / "plugins"


def sources_sha256() -> str:
    """Of all that goes into the library, 16 digits."""
    root = sources_folder()
    digest = hashlib.sha256()
    for path in sorted([root / "CMakeLists.txt", root / "op.h", *root.glob("kernels/*.*"), *root.glob("tensorrt/*")]):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _folder() -> Path:
    return cache_folder() / "plugins"


def _kept(pattern: str) -> list[Path]:
    """Libraries that are kept under keys of this pattern, the one that was asked for last first."""
    return sorted(_folder().glob(f"{pattern}/{LIBRARY_NAME}"), key=lambda path: path.stat().st_mtime, reverse=True)


def _loadable(paths: Iterable[Path]) -> Iterator[PluginLibrary]:
    """The libraries of `paths`, without those that cannot be loaded: damaged ones, and in a home that machines share
    those for a newer C library. They are built again."""
    for path in paths:
        with suppress(ExportError):
            yield read_plugin(path)


def _fits(library: PluginLibrary, runtime: TensorRT) -> bool:
    return library.is_for(runtime.version) and (runtime.gpu is None or library.runs_on(runtime.gpu))


def check_architectures(wanted: Sequence[str] | None) -> None:
    """Refuse what is no compute capability without the dot."""
    for architecture in wanted or ():
        if not re.fullmatch(r"\d{2,3}[af]?", architecture):
            raise ExportError(f"--arch {architecture}: not a compute capability. Give numbers such as 80,89,120.")


def choose_architectures(wanted: Sequence[str] | None, toolkit: CudaToolkit, reporter: Reporter) -> tuple[str, ...]:
    """The architectures to compile for, in order; those of `ARCHITECTURES` that the compiler knows, if none are wanted.

    Raises:
        ExportError: the compiler does not build for one that is wanted.
    """
    known = known_architectures(toolkit.nvcc)
    nvcc = f"CUDA {toolkit.cuda_version} ({toolkit.nvcc})"
    unknown = [name for name in wanted or ARCHITECTURES if name.rstrip("af") not in known]
    chosen = [name for name in dict.fromkeys(wanted or ARCHITECTURES) if name not in unknown]
    if not chosen or (wanted and unknown):
        raise ExportError(
            f"--arch {','.join(unknown)}: {nvcc} does not build for it. It knows {', '.join(known) or 'none'}."
        )
    if unknown:
        reporter.say(f"Kernels: without sm_{', sm_'.join(unknown)}, which {nvcc} does not know")
    return tuple(sorted(chosen, key=lambda name: (int(name.rstrip("af")), name)))


def cuda_options(toolkit: CudaToolkit, architectures: Sequence[str]) -> tuple[str, str]:
    """cmake's. Machine code for each architecture, and PTX of the last one for what comes after it."""
    targets = [*(f"{name}-real" for name in architectures[:-1]), architectures[-1]]
    return f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(targets)}"


def _key(build: str, architectures: Sequence[str], toolchain: Toolchain) -> str:
    return f"{build}-trt{toolchain.tensorrt_version}-cuda{toolchain.cuda_version}-sm{'-'.join(architectures)}"


def _compile(folder: Path, toolchain: Toolchain, architectures: Sequence[str], build: str) -> Path:
    configure = [
        *(str(toolchain.cmake), "-S", str(sources_folder()), "-B", str(folder)),
        *cuda_options(toolchain, architectures),
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
