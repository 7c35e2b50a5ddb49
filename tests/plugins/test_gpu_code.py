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
# Four blocks of few_up for one token fit beside each other: weights do not pass through its registers.
MOST_REGISTERS_ONE_TOKEN = 64
# One block of these fits: 9 tiles of float sums in each warp.
MOST_REGISTERS_WIDE_FLOAT = 200
# Types, tiles and alignments: 3 x (2 x 3 + 1 few_down, 2 x 3 few_up, 5 many_down, many_route, 2 many_up).
KERNELS = 63
# Of version 2, with an adapter for each row: 3 x (3 few_down, 3 few_up, 2 many_down, many_route, 2 many_up). Few tokens
# of a large tile are two loops, so that three blocks of 128 threads fit.
SLOT_KERNELS, MOST_REGISTERS_GROUPED, MOST_REGISTERS_WIDE_FLOAT_SLOTS = 33, 168, 216
_KERNEL = re.compile(
    r"_ZN8teamlora\d+(few_down|few_up|many_down|many_route|many_up)I(f|6__half|13__nv_bfloat16)(\w*?)EEv\w*"
)
_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)\s*(.*?)\s*; +/\* 0x\w{16} \*/\n"
    r"\s+/\* (0x\w{16}) \*/"
)
NO_SCOREBOARD = 7
# A copy is an instruction for data and one for zeros.
COPIES = 2


@dataclass(frozen=True)
class Instruction:
    """A line of machine code: its name with all suffixes, its operands as they are printed, and of its control bits
    (from 41 on of the second word: stall 4, yield 1, scoreboard written 3, scoreboard of operands 3, waits 6) the
    scoreboard that is free when its result is there, and those that it waits for. A wait is for all instructions on
    that scoreboard, whatever registers they write."""

    name: str
    operands: str
    control: int

    @property
    def scoreboard(self) -> int:
        return self.control >> 46 & 7

    def waits_for(self, scoreboard: int) -> bool:
        named = self.name.startswith("DEPBAR") and self.operands.startswith(f"SB{scoreboard},")
        return named or bool(self.control >> 52 >> scoreboard & 1)

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
    """What a mangled name says. `numbers`: tokens, for few_down rows, and aligned (0 or 1); or column tiles. `slots`:
    of version 2."""

    name: str
    dtype: str
    numbers: tuple[int, ...]
    slots: bool

    @classmethod
    def of(cls, mangled: str) -> Kernel:
        match = _KERNEL.match(mangled)
        assert match, mangled
        kind = {"f": "float", "6__half": "half", "13__nv_bfloat16": "bfloat16"}[match[2]]
        return cls(match[1], kind, tuple(map(int, re.findall(r"L[ib](\d+)", match[3]))), "AdapterOfRow" in match[3])

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
    assert {len(names) for names in kernels.values()} == {KERNELS + SLOT_KERNELS}
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
        if (kernel.name, kernel.numbers) == ("few_up", (1, 1)):
            limit = MOST_REGISTERS_ONE_TOKEN
        if kernel.name == "few_down" and kernel.slots and kernel.numbers[0] == 8:
            limit = MOST_REGISTERS_GROUPED
        if (kernel.name, kernel.dtype, kernel.numbers) == ("many_down", "float", (9,)):
            limit = MOST_REGISTERS_WIDE_FLOAT_SLOTS if kernel.slots else MOST_REGISTERS_WIDE_FLOAT
        if used["registers"] > limit:
            over[arch, name] = used["registers"]
    assert not over


@pytest.fixture(scope="module", params=["80", "90", "100", "120"])
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def all_code(architecture, plugin: PluginLibrary, cuobjdump) -> Mapping[Kernel, Code]:
    """Kernel -> its instructions, in their order."""
    _, *functions = cuobjdump("-arch", f"sm_{architecture}", "-sass", plugin.path).split("Function : ")
    found = {}
    for function in functions:
        lines = [Instruction(name, operands, int(word, 16)) for name, operands, word in _INSTRUCTION.findall(function)]
        found[Kernel.of(function.split()[0])] = lines
    return found


@pytest.fixture(scope="module")
def code(all_code) -> Mapping[Kernel, Code]:
    """Of version 1."""
    found = {kernel: lines for kernel, lines in all_code.items() if not kernel.slots}
    assert len(found) == KERNELS
    return found


@pytest.fixture(scope="module")
def slot_code(all_code) -> Mapping[Kernel, Code]:
    """Of version 2."""
    found = {kernel: lines for kernel, lines in all_code.items() if kernel.slots}
    assert len(found) == SLOT_KERNELS
    return found


def count(lines: Code, prefix: str) -> int:
    return sum(line.name.startswith(prefix) for line in lines)


def places(lines: Code, prefix: str) -> list[int]:
    return [i for i, line in enumerate(lines) if line.name.startswith(prefix)]


def first_wait(lines: Code, load: int) -> int:
    """The first instruction behind `load` that waits for its scoreboard: for its result, or that of another on it."""
    scoreboard = lines[load].scoreboard
    assert scoreboard != NO_SCOREBOARD, lines[load]
    return next((i for i in range(load + 1, len(lines)) if lines[i].waits_for(scoreboard)), len(lines))


def most_in_flight(lines: Code) -> int:
    """The most wide loads that have been issued before the first wait for any of them."""
    loads = [i for i, line in enumerate(lines) if line.is_wide_load()]
    waits = [first_wait(lines, load) for load in loads]
    return max(sum(load < wait for load in loads[n:] if wait <= min(waits[n:])) for n, wait in enumerate(waits))


def test_weights_are_read_sixteen_bytes_at_a_time(code):
    """few_down reads rows and tokens, all in packs: its rows (4 or 1) and a token before anything is used."""
    for kernel, lines in code.items():
        if kernel.name == "few_down" and kernel.aligned:
            assert count(lines, "LDG") == count(lines, "LDG.E.128"), kernel
            assert most_in_flight(lines) >= kernel.numbers[1] + 1, kernel


def test_base_is_in_flight_during_the_product_of_many_tokens(code):
    """A thread's own packs of base, 4 of 8 elements or 8 of 4: nothing touches them before the product is there, and
    every other load of the kernel is an asynchronous copy. By the L2 cache, since an op before may have written it."""
    for kernel, lines in code.items():
        if kernel.name == "many_up" and kernel.aligned:
            loads, barriers = places(lines, "LDG."), places(lines, "BAR")
            expected = ["LDG.E.128.STRONG.GPU"] * (8 if kernel.dtype == "float" else 4)
            assert [lines[i].name for i in loads] == expected, kernel
            assert len(set.union(*(lines[i].brings() for i in loads))) == 4 * len(loads), kernel
            assert max(loads) < barriers[0], kernel
            assert min(first_wait(lines, load) for load in loads) > barriers[-1], kernel


def test_kernels_begin_before_the_one_ahead_has_ended_where_the_gpu_can(code, architecture):
    """From sm_90 on, the first of a call lets the next begin, and all others wait for what it writes."""
    overlaps = int(architecture) >= 90
    for kernel, lines in code.items():
        begins = overlaps and kernel.name in ("few_down", "many_down", "many_route")
        waits = overlaps and kernel.name in ("few_up", "many_route", "many_up")
        assert (count(lines, "PREEXIT"), count(lines, "ACQBULK")) == (begins, waits), kernel


def wait_of(lines: Code) -> int:
    """Where a kernel waits for the one ahead of it."""
    (place,) = places(lines, "ACQBULK")
    return place


def parts_of_z(lines: Code) -> list[int]:
    """Loads of single numbers from the L2 cache: no other is one."""
    return [i for i, line in enumerate(lines) if line.name == "LDG.E.STRONG.GPU"]


def test_nothing_that_a_kernel_ahead_writes_is_touched_before_it_has_ended(code, architecture):
    """Aligned or not: no part of z is read, no v is copied, nothing is written and no thread ends before the wait."""
    if int(architecture) < 90:
        return
    for kernel, lines in code.items():
        if kernel.name not in ("few_up", "many_route", "many_up"):
            continue
        early, late = lines[: wait_of(lines)], lines[wait_of(lines) :]
        assert not parts_of_z(early), kernel
        assert count(early, "STG") == count(early, "EXIT") == count(early, "ATOM") == count(early, "RED") == 0, kernel
        if kernel.name == "many_up":
            # Copies of v are those that are not of `up`, of which two stages of two packs a thread come early.
            assert count(early, "LDGSTS") == (2 * 2 * COPIES if kernel.aligned else 0), kernel
            assert count(late, "LDGSTS") > 0, kernel
        else:
            assert parts_of_z(late), kernel


def copied_early(lines: Code, border: int) -> list[str]:
    return [line.name for line in lines[:border] if line.name.startswith("LDGSTS")]


def test_what_does_not_wait_for_z_is_under_way_before_it(code, architecture):
    """few_up: rows of `up` (4, or 2 for 8 tokens), the interaction and `base` are on their way into shared memory
    before the first part of z is asked for, from sm_90 on before the kernel ahead has ended. No register waits."""
    for kernel, lines in code.items():
        if kernel.name == "few_up" and kernel.aligned:
            border = wait_of(lines) if int(architecture) >= 90 else parts_of_z(lines)[0]
            rows = 2 if kernel.numbers[0] == 8 else 4
            copies = copied_early(lines, border)
            assert copies == ["LDGSTS.E", *["LDGSTS.E.BYPASS.128"] * (rows + 1)], kernel
            assert count(lines, "LDG.") == len(parts_of_z(lines)), kernel


def test_the_router_waits_for_the_interaction_and_not_for_weights(code):
    """few_up: of the two groups of copies the first is there when the router begins, and the second is waited for
    behind its last barrier: by its own instruction, and by no other on the same scoreboard."""
    for kernel, lines in code.items():
        if kernel.name != "few_up":
            continue
        groups, waits = places(lines, "LDGDEPBAR"), places(lines, "DEPBAR")
        (scoreboard,) = {lines[i].scoreboard for i in groups}
        barriers = places(lines, "BAR")
        # Before the router, two within it, at its end, and before y.
        assert len(barriers) == 5, kernel
        assert lines[waits[0]].operands == f"SB{scoreboard}, 0x1", kernel
        assert parts_of_z(lines)[-1] < waits[0] < barriers[0], kernel
        if kernel.aligned:
            assert lines[waits[1]].operands == f"SB{scoreboard}, 0x0", kernel
            assert barriers[3] < waits[1] < barriers[4], kernel
            last = waits[1]
        else:
            assert len(waits) == 1, kernel
            last = waits[0]
        others = [line for line in lines[groups[0] : last] if line.waits_for(scoreboard)]
        assert others == ([lines[waits[0]]] if kernel.aligned else []), kernel
        users = [line.name for line in lines if line.scoreboard == scoreboard]
        assert set(users[users.index("LDGDEPBAR") :]) == {"LDGDEPBAR"}, kernel


def test_the_router_of_many_tokens_waits_for_the_interaction_behind_the_parts_of_z(code):
    """many_route: one group of copies, which is under way beside the parts; every other load is a part."""
    for kernel, lines in code.items():
        if kernel.name == "many_route":
            parts, (group,), (wait,) = parts_of_z(lines), places(lines, "LDGDEPBAR"), places(lines, "DEPBAR")
            assert count(lines, "LDG.") == len(parts), kernel
            assert group < parts[0] < parts[-1] < wait < places(lines, "BAR")[0], kernel
            assert lines[wait].operands == f"SB{lines[group].scoreboard}, 0x0", kernel
            assert not any(line.waits_for(lines[group].scoreboard) for line in lines[group:wait]), kernel


def test_eight_parts_of_z_are_asked_for_before_the_first_is_waited_for(code):
    for kernel, lines in code.items():
        if kernel.name in ("few_up", "many_route"):
            parts = parts_of_z(lines)
            assert len(parts) >= 8, kernel
            assert min(first_wait(lines, load) for load in parts[:8]) > parts[7], kernel


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


def test_only_kernels_of_several_adapters_look_for_them(all_code):
    """A warp of few tokens finds those of one adapter by a vote; what takes part of an adapter's experts is another."""
    for kernel, lines in all_code.items():
        few, routes = kernel.name in ("few_down", "few_up"), kernel.name in ("few_up", "many_route")
        assert count(lines, "MATCH") == (kernel.slots and few), kernel
        assert not (kernel.slots and (few or routes)) or count(lines, "VOTE"), kernel


def test_an_index_is_loaded_once_and_no_weights_before_it(slot_code):
    """By the L2 cache: a graph's next run finds another."""
    for kernel, lines in slot_code.items():
        indices = parts_of_z(lines)[:1]
        assert len(indices) == 1, kernel
        if kernel.name in ("few_down", "many_down"):
            assert len(parts_of_z(lines)) == 1, kernel
        first_weights = min(
            places(lines, "LDG.E.128") + places(lines, "LDGSTS") + places(lines, "LDG.E.U16"), default=None
        )
        assert first_weights is None or indices[0] < first_weights, kernel


def test_slots_are_read_as_one_adapter_s_weights_are(slot_code):
    """16 bytes at a time and rows together, of one token and of eight; and 16-bit products on tensor cores."""
    for kernel, lines in slot_code.items():
        if kernel.name == "few_down" and kernel.aligned:
            assert count(lines, "LDG") == count(lines, "LDG.E.128") + 1, kernel
            assert most_in_flight(lines) >= kernel.numbers[1] + 1, kernel
        if kernel.name == "few_up" and kernel.aligned:
            rows = 2 if kernel.numbers[0] == 8 else 4
            border = parts_of_z(lines)[1]
            assert copied_early(lines, border) == ["LDGSTS.E", *["LDGSTS.E.BYPASS.128"] * (rows + 1)], kernel
        if kernel.name == "many_down" and kernel.dtype != "float":
            (column_tiles,) = kernel.numbers
            assert count(lines, "HMMA.16816.F32") == 2 * column_tiles * (1 if column_tiles > 3 else 2), kernel
        if kernel.name == "many_up" and kernel.dtype != "float":
            assert count(lines, "HMMA.16816.F32") == 8, kernel


def test_a_block_without_an_adapter_waits_too(slot_code, architecture):
    """From sm_90 on. It leaves by a way of its own; nothing is written, and no part of z read, ahead of a wait."""
    if int(architecture) < 90:
        return
    for kernel, lines in slot_code.items():
        begins, waits = count(lines, "PREEXIT"), places(lines, "ACQBULK")
        assert begins == (kernel.name in ("few_down", "many_down", "many_route")), kernel
        if kernel.name in ("few_up", "many_route", "many_up"):
            assert len(waits) == 2, kernel
            assert min(places(lines, "STG") + parts_of_z(lines)[1:] + places(lines, "EXIT")) > waits[0], kernel
        else:
            assert not waits, kernel
