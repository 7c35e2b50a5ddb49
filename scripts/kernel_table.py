"""What the CUDA kernels move and launch, for real models' sizes: the two tables of plugins/README.md.

    python scripts/kernel_table.py             prints them
    python scripts/kernel_table.py --write     puts them in their place

Needs no GPU: the emulated kernels tell their grids, from the same plan that the GPU's use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from gpu_check.account import adapters_table, table
from gpu_check.kernels import Kernels, Tuning
from gpu_check.shapes import LLAMA_2_7B, LLAMA_3_8B, SMOLLM2, TOKENS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "plugins" / "README.md"
BEGIN, END = "<!-- scripts/kernel_table.py writes this -->", "<!-- end -->"
BEGIN_ADAPTERS = "<!-- scripts/kernel_table.py writes this, of several adapters -->"
# An H100's.
MULTIPROCESSORS = 132
SLOTS = 64
PROJECTIONS = (SMOLLM2[0], SMOLLM2[2], LLAMA_3_8B[0], LLAMA_3_8B[2], *LLAMA_2_7B)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    build = [sys.executable, ROOT / "scripts" / "build_native.py"]
    folder = subprocess.run(build, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    kernels = Kernels(Path(folder) / "libteamlora_emulated.so")
    text = README.read_text(encoding="utf-8")
    for begin, made in ((BEGIN, kernel_table(kernels)), (BEGIN_ADAPTERS, kernel_adapters_table(kernels))):
        if not given.write:
            print(made, end="\n\n")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{made}\n{END}{rest.partition(END)[2]}"
    if given.write:
        README.write_text(text, encoding="utf-8")


def kernel_table(kernels: Kernels) -> str:
    """Markdown. `kernels`: emulated."""
    return table(kernels, Tuning(MULTIPROCESSORS), PROJECTIONS, TOKENS)


def kernel_adapters_table(kernels: Kernels) -> str:
    """Markdown, of version 2. `kernels`: emulated."""
    return adapters_table(kernels, Tuning(MULTIPROCESSORS), (LLAMA_3_8B[0], LLAMA_2_7B[0]), (8, 64), SLOTS)


if __name__ == "__main__":
    main()
