"""Builds what the tests of the native parts run: the plugin for every GPU, and the tests' own programs.

Prints the folder of the programs. What is up to date is not built again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from teamlora_export.engine.plugin import build_plugin
from teamlora_export.engine.toolchain import find_toolchain

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "native"


def main() -> None:
    build_plugin()
    toolchain = find_toolchain()
    configure = [
        *(toolchain.cmake, "-S", ROOT / "plugins", "-B", BUILD, "-DTEAMLORA_TENSORRT=OFF", "-DTEAMLORA_TESTS=ON"),
        f"-DTENSORRT_INCLUDE_DIR={toolchain.tensorrt_include}",
        f"-DCUDA_INCLUDE_DIR={toolchain.cuda_include}",
    ]
    for command in (configure, [toolchain.cmake, "--build", BUILD, "--parallel", "2"]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    print(BUILD)


if __name__ == "__main__":
    main()
