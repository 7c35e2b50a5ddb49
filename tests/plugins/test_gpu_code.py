"""The compiled GPU code, without a GPU: NVIDIA's disassembler tells whether the design reached the machine code."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping

import pytest

from teamlora_export.engine.plugin import ARCHITECTURES, PluginLibrary

# Two blocks of 256 threads, or four of 128, fit beside each other with this many. Products of floats hold more, and so
# does reading elements one by one, where sizes are no multiples of 16 bytes.
MOST_REGISTERS, MOST_REGISTERS_FLOAT, MOST_REGISTERS_UNALIGNED = 128, 168, 168
# Types, tiles and alignments: 3 x (2 x 3 x few_down and few_up, 2 x 3 x many_down, many_up).
KERNELS = 57
_KERNEL = re.compile(r"_ZN8teamlora\d+(few_down|few_up|many_down|many_up)I(f|6__half|13__nv_bfloat16)\w*")


@pytest.fixture(scope="module")
def cuobjdump():
    """Runs cuobjdump from its package, which finds nvdisasm beside itself."""
    files = importlib.metadata.files("nvidia-cuda-cuobjdump")
    tool = next(file.locate() for file in files if file.name == "cuobjdump")
    environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}

    def run(*arguments: object) -> str:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, env=environment).stdout

    return run


@pytest.fixture(scope="module")
def resources(plugin: PluginLibrary, cuobjdump) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack and local memory."""
    found, arch, name = {}, "", ""
    for line in cuobjdump("-res-usage", plugin.path).splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            arch = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found[arch, name] = dict(zip(("registers", "stack", "local"), map(int, match.groups()), strict=True))
    return found


def test_every_kernel_is_there_for_every_gpu(resources):
    kernels = {arch: {name for a, name in resources if a == arch} for arch in ARCHITECTURES}
    assert {len(names) for names in kernels.values()} == {KERNELS}
    assert len(set(map(frozenset, kernels.values()))) == 1


def test_no_kernel_spills(resources):
    assert not [key for key, used in resources.items() if used["stack"] or used["local"]]


def test_registers_stay_below_what_two_blocks_may_have(resources):
    over = {}
    for (arch, name), used in resources.items():
        kind = _KERNEL.match(name)[2]  # type: ignore[index]
        limit = MOST_REGISTERS_FLOAT if kind == "f" else MOST_REGISTERS
        if "few_down" in name and "Lb0E" in name:
            limit = MOST_REGISTERS_UNALIGNED
        if used["registers"] > limit:
            over[arch, name] = used["registers"]
    assert not over


@pytest.fixture(scope="module", params=["80", "90", "120"])
def instructions(request, plugin: PluginLibrary, cuobjdump) -> Mapping[str, Counter[str]]:
    """Kernel -> how often each instruction occurs in it."""
    counts: dict[str, Counter[str]] = {}
    name = ""
    for line in cuobjdump("-arch", f"sm_{request.param}", "-sass", plugin.path).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match[1]
            counts[name] = Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", line):
            counts[name][match[1]] += 1
    assert len(counts) == KERNELS
    return counts


def count(instructions: Counter[str], prefix: str) -> int:
    return sum(number for name, number in instructions.items() if name.startswith(prefix))


def test_weights_are_read_sixteen_bytes_at_a_time(instructions):
    aligned = {name: used for name, used in instructions.items() if re.search(r"few_\w+Lb1E", name)}
    assert len(aligned) == 18
    for name, used in aligned.items():
        assert count(used, "LDG.E.128") >= 1, name
    for name, used in aligned.items():
        if "few_down" in name:
            # Nothing else is read: rows and tokens, all in packs.
            assert count(used, "LDG") == count(used, "LDG.E.128"), name


def test_y_is_written_in_whole_packs_or_element_by_element_at_the_edges(instructions):
    """many_up: a thread's own packs of y, 4 of 8 elements or 8 of 4, and each of their elements for tails. Few tokens
    are written by neighbouring threads, an element each, or two for 8 tokens of a 16-bit type."""
    for name, used in instructions.items():
        kernel, kind = _KERNEL.match(name).groups()  # type: ignore[union-attr]
        packs, stores = count(used, "STG.E.128"), count(used, "STG")
        if kernel == "many_up":
            own = 8 if kind == "f" else 4
            assert (packs, stores - packs) == (own, 32), name
            assert count(used, "LDG.E.128") - count(used, "LDG.E.128.CONSTANT") == own, f"{name}: base"
        elif kernel == "few_up":
            assert (packs, stores) == (0, 2 if "Li8E" in name and kind != "f" else 1), name
        elif kernel == "few_down":
            assert (packs, stores) == (0, 1), name


def test_sixteen_bit_products_run_on_tensor_cores_and_float_ones_do_not(instructions):
    for name, used in instructions.items():
        kernel, kind = _KERNEL.match(name).groups()  # type: ignore[union-attr]
        tensor_cores = count(used, "HMMA")
        assert (tensor_cores > 0) == (kernel.startswith("many") and kind != "f"), name


def test_stages_are_copied_past_the_registers(instructions):
    for name, used in instructions.items():
        if "many_down" in name:
            assert count(used, "LDGSTS.E.BYPASS.128") + count(used, "LDGSTS.E.128") >= 2, name
