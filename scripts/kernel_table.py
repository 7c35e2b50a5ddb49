"""What the CUDA kernels move and launch, for real models' sizes: the table of plugins/README.md.

    python scripts/kernel_table.py             prints it
    python scripts/kernel_table.py --write     puts it in its place

Needs no GPU: the emulated kernels tell their grids, from the same plan that the GPU's use.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from gpu_check.account import table
from gpu_check.kernels import Kernels, Tuning
from gpu_check.shapes import LLAMA_2_7B, LLAMA_3_8B, SMOLLM2, TOKENS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "plugins" / "README.md"
BEGIN, END = "<!-- scripts/kernel_table.py writes this -->", "<!-- end -->"
# An H100's.
MULTIPROCESSORS = 132
PROJECTIONS = (SMOLLM2[0], SMOLLM2[2], LLAMA_3_8B[0], LLAMA_3_8B[2], *LLAMA_2_7B)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    build = [sys.executable, ROOT / "scripts" / "build_native.py"]
    folder = subprocess.run(build, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    made = kernel_table(Kernels(Path(folder) / "libteamlora_emulated.so"))
    if given.write:
        before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        print(made)


def kernel_table(kernels: Kernels) -> str:
    """Markdown. `kernels`: emulated."""
    return table(kernels, Tuning(MULTIPROCESSORS), PROJECTIONS, TOKENS)


if __name__ == "__main__":
    main()
