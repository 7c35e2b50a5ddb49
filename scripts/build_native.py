"""Builds what the tests of the native parts run: the plugin for every GPU, the op for ONNX Runtime, also for its CUDA
provider, and the tests' own programs.

Prints the folder of the programs. What is up to date is not built again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from get_libraries import get_libraries

from teamlora_export.engine.onnxruntime_library import build_cuda_library, build_library, find_include
from teamlora_export.engine.plugin import build_plugin
from teamlora_export.engine.toolchain import find_toolchain

ROOT = Path(__file__).parents[1]
# The plugin's build shows that every other takes the kernels.
ONE_ARCHITECTURE = ("80",)
BUILD = ROOT / "build" / "native"


def main() -> None:
    build_plugin()
    if find_include() is None:
        os.environ["ONNXRUNTIME_INCLUDE_DIR"] = str(get_libraries() / "include")
    build_library()
    build_cuda_library(ONE_ARCHITECTURE)
    toolchain = find_toolchain()
    configure = [
        *(toolchain.cmake, "-S", ROOT / "plugins", "-B", BUILD, "-DTEAMLORA_TENSORRT=OFF", "-DTEAMLORA_TESTS=ON"),
        f"-DTENSORRT_INCLUDE_DIR={toolchain.tensorrt_include}",
        f"-DCUDA_INCLUDE_DIR={toolchain.cuda_include}",
    ]
    _run(configure, BUILD)
    configure = [
        *(toolchain.cmake, "-S", ROOT / "plugins" / "onnxruntime", "-B", BUILD / "onnxruntime"),
        *("-DTEAMLORA_LIBRARY=OFF", "-DTEAMLORA_TESTS=ON"),
        f"-DONNXRUNTIME_INCLUDE_DIR={find_include()}",
        f"-DCUDA_INCLUDE_DIR={toolchain.cuda_include}",
    ]
    _run(configure, BUILD / "onnxruntime")
    print(BUILD)


def _run(configure: list[object], folder: Path) -> None:
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
