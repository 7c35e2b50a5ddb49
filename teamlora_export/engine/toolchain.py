"""What compiling the native parts takes: a CUDA compiler, cmake, a C++ compiler, and for the plugin TensorRT's headers.

The headers are those of the TensorRT that is installed, as near to its version as there are: TensorRT's interfaces lie
elsewhere in memory with each major version, so headers of another one are no headers.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from teamlora_export.errors import raise_findings

TENSORRT_HEADER = "NvInferRuntime.h"
_SYSTEM_INCLUDES = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/include",
    "/usr/local/tensorrt/include",
    "/usr/local/TensorRT/include",
    "/opt/tensorrt/include",
)
# A PyPI package that holds TensorRT's headers; it is only looked into, never imported.
_HEADERS_PACKAGE = "kernel-lens"
_RUNTIME_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA compiler with its version.

    Attributes:
        cuda_root: the toolkit's folder.
        library_folder: of the CUDA runtime, where the compiler does not know it by itself.
    """

    nvcc: Path
    cuda_root: Path
    cuda_version: str
    library_folder: Path | None

    def environment(self) -> dict[str, str]:
        """The variables that cmake and the compilers are run with."""
        if self.library_folder is None:
            return dict(os.environ)
        known = os.environ.get("LIBRARY_PATH")
        folders = [str(self.library_folder), *([known] if known else [])]
        return {**os.environ, "LIBRARY_PATH": ":".join(folders)}

    @property
    def cuda_include(self) -> Path:
        return self.cuda_root / "include"


@dataclass(frozen=True)
class Toolchain(CudaToolkit):
    """What the plugin is compiled with."""

    tensorrt_include: Path
    tensorrt_version: str
    cmake: Path


def find_toolchain() -> Toolchain:
    """The tools of this machine.

    Raises:
        ExportError: something is missing; all that is, and how to get it.
    """
    toolkit, include, cmake = find_cuda(), find_tensorrt_include(), shutil.which("cmake")
    findings = missing_compilers(cuda=True)
    if include is None:
        findings.append(_how_to_get_headers(installed_tensorrt()))
    raise_findings("The plugin cannot be built here; missing", findings)
    assert toolkit is not None
    assert include is not None
    assert cmake is not None
    return Toolchain(
        **vars(toolkit), tensorrt_include=include, tensorrt_version=tensorrt_version(include), cmake=Path(cmake)
    )


def missing_compilers(cuda: bool) -> list[str]:
    """What is not there of cmake, a C++ compiler and, for `cuda`, nvcc: a line for each, with how to get it."""
    there = {
        "nvcc: install NVIDIA's CUDA toolkit, or: pip install 'teamlora-export[plugins]'": not cuda or find_nvcc(),
        "cmake: apt-get install cmake, or: pip install cmake": shutil.which("cmake"),
        "a C++ compiler: apt-get install g++": shutil.which(os.environ.get("CXX", "c++")),
    }
    return [how_to_get for how_to_get, found in there.items() if not found]


def find_cuda() -> CudaToolkit | None:
    """The toolkit of `find_nvcc`."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    root = _cuda_root(nvcc)
    # The packages on PyPI keep their libraries where nvcc itself does not look.
    library_folder = root / "lib" if not (root / "lib64").is_dir() and (root / "lib").is_dir() else None
    return CudaToolkit(nvcc, root, _cuda_version(nvcc), library_folder)


def find_nvcc() -> Path | None:
    """nvcc: `CUDACXX`, `CUDA_HOME`, the PATH, the usual place, then the packages of this environment."""
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("CUDACXX"), f"{home}/bin/nvcc" if home else None, shutil.which("nvcc")]
    paths = (Path(path) for path in (*places, "/usr/local/cuda/bin/nvcc", *_package_files("nvidia-cuda-nvcc")) if path)
    return next((path.resolve() for path in paths if path.name == "nvcc" and path.is_file()), None)


def known_architectures(nvcc: Path) -> tuple[str, ...]:
    """The compute capabilities, without the dot, that `nvcc` builds for: an older one knows fewer."""
    output = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
    return tuple(re.findall(r"^sm_(\d+)$", output, re.MULTILINE))


def installed_tensorrt() -> str | None:
    """The version of the TensorRT package in this environment, which is not imported for it."""
    for package in _RUNTIME_PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_tensorrt_include() -> Path | None:
    """The folder of TensorRT's headers: `TENSORRT_INCLUDE_DIR`, whatever its version, or the system's or a package's,
    if they are of the installed TensorRT's major version, the nearest to it first."""
    wanted = os.environ.get("TENSORRT_INCLUDE_DIR")
    if wanted:
        return Path(wanted).resolve() if (Path(wanted) / TENSORRT_HEADER).is_file() else None
    there = _headers_without_being_told()
    installed = installed_tensorrt()
    if installed is None:
        return next(iter(there), None)
    major, minor, *_ = (int(number) for number in re.findall(r"\d+", installed))
    fitting = [folder for folder, version in there.items() if version[0] == major]
    return min(fitting, key=lambda folder: abs(there[folder][1] - minor), default=None)


def _headers_without_being_told() -> dict[Path, tuple[int, ...]]:
    """Folders of headers, the system's first, with their versions."""
    folders = [Path(folder) for folder in _SYSTEM_INCLUDES]
    folders += [Path(file).parent for file in _package_files(_HEADERS_PACKAGE) if Path(file).name == TENSORRT_HEADER]
    there = [folder for folder in folders if (folder / TENSORRT_HEADER).is_file()]
    return {folder: tuple(map(int, tensorrt_version(folder).split("."))) for folder in there}


def _how_to_get_headers(installed: str | None) -> str:
    if installed is None:
        return (
            f"{TENSORRT_HEADER}: set TENSORRT_INCLUDE_DIR to the include folder of a TensorRT archive, install "
            f"libnvinfer-headers-dev, or: pip install --no-deps {_HEADERS_PACKAGE}==2.0.1"
        )
    others = [f"{tensorrt_version(folder)} in {folder}" for folder in _headers_without_being_told()]
    seen = f" (there are those of {', '.join(others)})" if others else ""
    return (
        f"{TENSORRT_HEADER} of TensorRT {installed.partition('.')[0]}, since {installed} is installed{seen}: set "
        "TENSORRT_INCLUDE_DIR to the include folder of its archive, or install libnvinfer-headers-dev of that version"
    )


def tensorrt_version(include: Path) -> str:
    """MAJOR.MINOR.PATCH of the headers in `include`."""
    text = (include / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    numbers = []
    for name in ("MAJOR", "MINOR", "PATCH"):
        # Newer headers define the number by way of a second name.
        match = re.search(rf"#define (?:NV_TENSORRT_{name}|TRT_{name}_ENTERPRISE) +(\d+)", text)
        numbers.append(match[1] if match else "0")
    return ".".join(numbers)


def _cuda_root(nvcc: Path) -> Path:
    """The toolkit of `nvcc`, which may itself be a script elsewhere: it says where it looks."""
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", os.devnull]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    match = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    return Path(match[1]).resolve() if match else nvcc.parents[1]


def _cuda_version(nvcc: Path) -> str:
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release ([\d.]+)", output)
    return match[1] if match else "unknown"


def _package_files(package: str) -> Iterable[str]:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files]
