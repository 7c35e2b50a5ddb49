"""The compiled GPU code, without a GPU: NVIDIA's disassembler tells whether the design reached the machine code."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from teamlora_export.engine.plugin import ARCHITECTURES, PluginLibrary

# Two blocks of 256 threads, or four of 128, fit beside each other with this many. Products of floats hold more, and so
# does reading elements one by one, where sizes are no multiples of 16 bytes.
MOST_REGISTERS, MOST_REGISTERS_FLOAT, MOST_REGISTERS_UNALIGNED = 128, 168, 168
# One block of these fits: 9 tiles of float sums in each warp.
MOST_REGISTERS_WIDE_FLOAT = 200
# Types, tiles and alignments: 3 x (2 x 3 + 1 few_down, 2 x 3 few_up, 5 many_down, many_route, 2 many_up).
KERNELS = 63
_KERNEL = re.compile(
    r"_ZN8teamlora\d+(few_down|few_up|many_down|many_route|many_up)I(f|6__half|13__nv_bfloat16)(\w*?)EEv\w*"
)
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    """A line of machine code: its name with all suffixes, and its operands as they are printed."""

    name: str
    operands: str

    def is_wide_load(self) -> bool:
        return self.name.startswith("LDG.E.128")

    def registers(self) -> set[int]:
        """Those that occur. Of what a wide load brings, or a tensor core reads, only the first is written out."""
        return {int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)}

    def brings(self) -> set[int]:
        """The registers that a load writes."""
        first = int(re.match(r"(?:P\w+, )?R(\d+)", self.operands)[1])  # type: ignore[index]
        return set(range(first, first + (4 if "128" in self.name else 1)))


Code = Sequence[Instruction]


@dataclass(frozen=True)
class Kernel:
    """What a mangled name says. `numbers`: tokens, for few_down rows, and aligned (0 or 1); or column tiles."""

    name: str
    dtype: str
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, mangled: str) -> Kernel:
        match = _KERNEL.match(mangled)
        assert match, mangled
        kind = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16"}[match[2]]
        return cls(match[1], kind, tuple(map(int, re.findall(r"L[ib](\d+)", match[3]))))

    @property
    def aligned(self) -> bool:
        return self.name in ("many_down", "many_route") or self.numbers[-1] == 1


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
        kernel = Kernel.of(name)
        limit = MOST_REGISTERS_FLOAT if kernel.dtype == "float" else MOST_REGISTERS
        if kernel.name == "few_down" and not kernel.aligned:
            limit = MOST_REGISTERS_UNALIGNED
        if (kernel.name, kernel.dtype, kernel.numbers) == ("many_down", "float", (9,)):
            limit = MOST_REGISTERS_WIDE_FLOAT
        if used["registers"] > limit:
            over[arch, name] = used["registers"]
    assert not over


@pytest.fixture(scope="module", params=["80", "90", "100", "120"])
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def code(architecture, plugin: PluginLibrary, cuobjdump) -> Mapping[Kernel, Code]:
    """Kernel -> its instructions, in their order."""
    found: dict[Kernel, list[Instruction]] = {}
    lines: list[Instruction] = []
    for line in cuobjdump("-arch", f"sm_{architecture}", "-sass", plugin.path).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            lines = found[Kernel.of(match[1])] = []
        elif match := _INSTRUCTION.match(line):
            lines.append(Instruction(match[1], match[2]))
    assert len(found) == KERNELS
    return found


def count(lines: Code, prefix: str) -> int:
    return sum(line.name.startswith(prefix) for line in lines)


def first_use(lines: Code, load: int) -> int:
    """The first instruction behind `load` that names a register which it brings."""
    brought = lines[load].brings()
    return next((i for i in range(load + 1, len(lines)) if lines[i].registers() & brought), len(lines))


def most_in_flight(lines: Code) -> int:
    """The most wide loads that have been issued before the first use of any of them."""
    loads = [i for i, line in enumerate(lines) if line.is_wide_load()]
    uses = [first_use(lines, load) for load in loads]
    return max(sum(load < use for load in loads[n:] if use <= min(uses[n:])) for n, use in enumerate(uses))


def test_weights_are_read_sixteen_bytes_at_a_time(code):
    """few_down reads rows and tokens, all in packs: its rows (4 or 1) and a token before anything is used."""
    for kernel, lines in code.items():
        if kernel.name.startswith("few") and kernel.aligned:
            assert count(lines, "LDG.E.128") >= 1, kernel
        if kernel.name == "few_down" and kernel.aligned:
            assert count(lines, "LDG") == count(lines, "LDG.E.128"), kernel
            assert most_in_flight(lines) >= kernel.numbers[1] + 1, kernel


def test_base_is_in_flight_during_the_product_of_many_tokens(code):
    """A thread's own packs of base, 4 of 8 elements or 8 of 4: nothing touches them before the product is there, and
    every other load of the kernel is an asynchronous copy."""
    for kernel, lines in code.items():
        if kernel.name == "many_up" and kernel.aligned:
            loads = [i for i, line in enumerate(lines) if line.name.startswith("LDG.")]
            assert [lines[i].name for i in loads] == ["LDG.E.128"] * (8 if kernel.dtype == "float" else 4), kernel
            assert len(set.union(*(lines[i].brings() for i in loads))) == 4 * len(loads), kernel
            barriers = [i for i, line in enumerate(lines) if line.name.startswith("BAR")]
            assert max(loads) < barriers[0], kernel
            assert min(first_use(lines, load) for load in loads) > barriers[-1], kernel


def test_kernels_begin_before_the_one_ahead_has_ended_where_the_gpu_can(code, architecture):
    """From sm_90 on, the first of a call lets the next begin, and all others wait for what it writes."""
    overlaps = int(architecture) >= 90
    for kernel, lines in code.items():
        begins = overlaps and kernel.name in ("few_down", "many_down", "many_route")
        waits = overlaps and kernel.name in ("few_up", "many_route", "many_up")
        assert (count(lines, "PREEXIT"), count(lines, "ACQBULK")) == (begins, waits), kernel


def wait_of(lines: Code) -> int:
    """Where a kernel waits for the one ahead of it."""
    return next(i for i, line in enumerate(lines) if line.name == "ACQBULK")


def test_what_does_not_wait_for_z_is_loaded_before_it(code, architecture):
    """few_up: rows of `up` (4 for one token, 2 for 4), the interaction and `base` (two elements of it for 8 tokens of
    a 16-bit type) are in flight before the first part of z is asked for, and untouched. From sm_90 on that is before
    the kernel ahead has ended."""
    for kernel, lines in code.items():
        if kernel.name != "few_up" or not kernel.aligned:
            continue
        parts = [i for i, line in enumerate(lines) if line.name == "LDG.E.STRONG.GPU"]
        border = wait_of(lines) if int(architecture) >= 90 else parts[0]
        assert parts[0] >= border, kernel
        early = [i for i in range(border) if lines[i].name.startswith("LDG")]
        rows = {1: 4, 4: 2, 8: 1}[kernel.numbers[0]]
        twice = kernel.numbers[0] == 8 and kernel.dtype != "float"
        assert len(early) == rows + (3 if twice else 2), kernel
        assert [lines[i].is_wide_load() for i in early].count(True) == rows, kernel
        assert min(first_use(lines, load) for load in early) > border, kernel


def test_eight_parts_of_z_are_asked_for_before_the_first_is_used(code):
    for kernel, lines in code.items():
        if kernel.name in ("few_up", "many_route"):
            parts = [i for i, line in enumerate(lines) if line.name == "LDG.E.STRONG.GPU"]
            assert len(parts) >= 8, kernel
            assert min(first_use(lines, load) for load in parts[:8]) > parts[7], kernel


def test_base_and_the_first_weights_of_many_tokens_are_under_way_before_v_is_there(code, architecture):
    """Copies of two stages of `up`, and where sizes allow it all of a thread's own `base`."""
    for kernel, lines in code.items():
        if kernel.name == "many_up" and kernel.aligned and int(architecture) >= 90:
            border = wait_of(lines)
            early = lines[:border]
            assert count(early, "LDG.E.128") == count(lines, "LDG."), kernel
            assert count(early, "LDGSTS") >= 4, kernel
            assert count(early, "LDGSTS") < count(lines, "LDGSTS"), kernel


def test_y_is_written_in_whole_packs_or_element_by_element_where_sizes_are_odd(code):
    """Few tokens are written by neighbouring threads, an element each, or two for 8 tokens of a 16-bit type."""
    for kernel, lines in code.items():
        packs, stores = count(lines, "STG.E.128"), count(lines, "STG")
        own = 8 if kernel.dtype == "float" else 4
        if kernel.name == "many_up":
            assert (packs, stores) == ((own, own) if kernel.aligned else (0, 32)), kernel
        elif kernel.name == "few_up":
            assert (packs, stores) == (0, 2 if kernel.numbers[0] == 8 and kernel.dtype != "float" else 1), kernel
        elif kernel.name == "few_down":
            assert (packs, stores) == (0, 1), kernel
        elif kernel.name == "many_down":
            assert packs == stores >= 1, kernel


def test_sixteen_bit_products_run_on_tensor_cores_and_float_ones_do_not(code):
    """A 16x16x16 product is two instructions: of a step over 2 depths or, where tiles are narrow, 4 in many_down, which
    two warps share; of one depth and 4 tiles of columns in many_up."""
    for kernel, lines in code.items():
        expected = 0
        if kernel.name == "many_up":
            expected = 8
        elif kernel.name == "many_down":
            (column_tiles,) = kernel.numbers
            expected = 2 * column_tiles * (1 if column_tiles > 3 else 2)
        assert count(lines, "HMMA.16816.F32") == count(lines, "HMMA"), kernel
        assert count(lines, "HMMA") == (0 if kernel.dtype == "float" else expected), kernel


def test_stages_are_copied_past_the_registers_ahead_of_their_use(code):
    """A copy is one instruction for data and one for zeros, without a branch between lengths. The first stages are
    filled before the first wait."""
    for kernel, lines in code.items():
        if kernel.name not in ("many_down", "many_up"):
            continue
        copies = [i for i, line in enumerate(lines) if line.name.startswith("LDGSTS")]
        assert all(lines[i].name.startswith("LDGSTS.E.BYPASS.128") for i in copies), kernel
        assert not any("ZFILL" in lines[i].name for i in copies), kernel
        wait = next(i for i, line in enumerate(lines) if line.name.startswith("DEPBAR"))
        ahead = sum(i < wait for i in copies)
        assert ahead >= 4, kernel
        assert len(copies) > ahead, f"{kernel}: nothing is fetched in the loop"
