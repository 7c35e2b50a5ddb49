"""The CUDA kernels of version 2, run on the CPU: several adapters in slots, an index for each row.

The sweep of `test_kernels.py` holds them to the definition; here are faults that only several adapters show, and what
a row must not know of its neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from gpu_check.kernels import Kernels, Sizes, Tuning
from plugins.planted_faults import missed
from plugins.test_kernels import DTYPES, TUNING

# As in test_kernels.py.
FAULTS = {
    "the row of the next token": ("rows.cuh", "quotient(token)", "quotient(min(token + 1, tokens - 1))"),
    "the next slot": ("rows.cuh", "__ldcg(adapter + row);", "__ldcg(adapter + row) + 1;"),
    "a wrong distance of slots of down": (
        "few_tokens.cuh",
        "static_cast<int64_t>(arguments.rows) * in)",
        "static_cast<int64_t>(arguments.rows - 1) * in)",
    ),
    "a wrong distance of slots of down, many": (
        "many_tokens.cuh",
        "static_cast<int64_t>(arguments.rows) * arguments.in)",
        "static_cast<int64_t>(arguments.rows + 1) * arguments.in)",
    ),
    "a wrong distance of slots of up": ("few_tokens.cuh", "own.slot, up_rank * out)", "own.slot, up_rank * (out - 1))"),
    "a wrong distance of slots of up, many": ("many_tokens.cuh", "arguments.up_rank * out)", "arguments.up_rank)"),
    "a wrong distance of slots of the interaction": (
        "few_tokens.cuh",
        "static_cast<int64_t>(arguments.columns.num_siblings) * k * k",
        "static_cast<int64_t>(k) * k",
    ),
    "the first slot's interaction": ("many_tokens.cuh", "global_mix, own.slot, ", "global_mix, 0, "),
    "padding that takes part": ("routing.cuh", "takes_part |= mix[expert * k + to] != 0.0F", "takes_part = true"),
    "weights of no experts": ("routing.cuh", "kPadded && experts == 0 ? 0.0F : ", ""),
    "two rows exchanged": ("few_tokens.cuh", "tokens + own.place(t);", "tokens + own.place(own.size() - 1 - t);"),
    "an adapter for a row without": ("rows.cuh", "slot < 0 ? kNoAdapter", "slot < 0 ? 0"),
    "the base for a wrong index": ("rows.cuh", "slot : kWrongAdapter;", "slot : kNoAdapter;"),
    "one tile of each adapter": (
        "rows.cuh",
        "(__popc(peers & before) & (rows.tile - 1)) == 0",
        "(peers & before) == 0",
    ),
    "a tile that begins with its adapter's first": ("rows.cuh", " & ~((1U << leader) - 1)", ""),
    "a row that goes on into the next": (
        "rows.cuh",
        "static_cast<int>(begin) + rows.row_tokens.value",
        "static_cast<int>(begin) + 2 * rows.row_tokens.value",
    ),
    "a block without an adapter that does not wait": (
        "many_tokens.cuh",
        "if (own.slot < 0) return wait_for_kernel_before();",
        "if (own.slot < 0) return;",
    ),
    "a block without an adapter that does not wait, few": (
        "few_tokens.cuh",
        "            wait_for_kernel_before();\n            for",
        "            for",
    ),
    "half of the threads of a block without an adapter do not wait": (
        "many_tokens.cuh",
        "            wait_for_kernel_before();\n            const int rows",
        "            if (threadIdx.x % 2 == 0) wait_for_kernel_before();\n            const int rows",
    ),
    "one token of each tile": ("few_tokens.cuh", "if (own.count == 1) {", "if (own.count >= 1) {"),
}


def test_planted_faults_are_caught(tmp_path, programs):
    assert not missed(FAULTS, "adapters", programs, tmp_path)


@pytest.fixture(scope="module")
def kernels(programs) -> Kernels:
    return Kernels(programs / "libteamlora_emulated.so")


def run_rows(
    kernels: Kernels, weights: Sequence[np.ndarray], x: np.ndarray, base: np.ndarray, adapter: Sequence[int]
) -> np.ndarray:
    """y of x [batch, tokens, in], of 4 experts, by `weights`: down, mix and up of some slots."""
    down, mix, up = weights
    dtype = next(name for name, each in DTYPES.items() if each == x.dtype)
    tokens, batch = x.shape[0] * x.shape[1], len(adapter)
    sizes = Sizes(dtype, tokens, x.shape[2], 4, up.shape[1] // 4, (up.shape[2],), slots=len(up), batch=batch)
    workspace = np.full(kernels.workspace_bytes(sizes, TUNING) + 64, 0xFF, np.uint8)
    y = np.full(base.shape, np.nan, base.dtype)
    arrays = [*map(np.ascontiguousarray, (x, base, down, mix, up)), y, np.array(adapter, np.int32)]
    aligned = workspace[-workspace.ctypes.data % 64 :]
    kernels.launch(sizes, TUNING, [array.ctypes.data for array in arrays], aligned.ctypes.data, schedule=7)
    return y


def make_slots(rng: np.random.Generator, dtype: np.dtype, slots: int, d_in: int, width: int) -> list[np.ndarray]:
    down = rng.normal(size=(slots, 12, d_in)) / np.sqrt(d_in)
    mix = np.eye(4) + rng.normal(size=(slots, 1, 4, 4)) * 0.1
    return [down.astype(dtype), mix.astype(np.float32), rng.normal(size=(slots, 8, width)).astype(dtype)]


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_a_row_of_few_tokens_is_the_same_alone_to_the_bit(kernels, dtype, rng):
    """Whoever shares its block, its tile and its 32 tokens, and however many rows have its adapter."""
    weights = make_slots(rng, dtype, 3, 40, 24)
    adapter = [2, 0, -1, 2, 2, 1, 2, 0, 2, 2, 2, 2, 2, 2, 0, 5, 1, -1, 2, 0, 1, 2]
    x, base = (rng.normal(size=(len(adapter), 2, n)).astype(dtype) for n in (40, 24))
    together = run_rows(kernels, weights, x, base, adapter)
    for row, index in enumerate(adapter):
        alone = run_rows(kernels, weights, x[row : row + 1], base[row : row + 1], [index])
        assert alone.tobytes() == together[row].tobytes(), row
    assert together[2].tobytes() == base[2].tobytes()
    assert np.isnan(together[15].astype(np.float32)).all(), "an index of no slot"


@pytest.mark.parametrize("tokens", [1, 20])
def test_one_index_for_all_rows_is_the_same_as_one_for_each(kernels, tokens, rng):
    weights = make_slots(rng, DTYPES["fp32"], 2, 40, 24)
    x, base = (rng.normal(size=(5, tokens, n)).astype(np.float32) for n in (40, 24))
    assert np.allclose(run_rows(kernels, weights, x, base, [1]), run_rows(kernels, weights, x, base, [1] * 5), 1e-5)


def test_a_slot_is_read_anew_at_every_call(kernels, rng):
    """A swap is a copy into a slot: the grid, and so a captured graph, is the same for whatever is in the slots."""
    memory, other = (make_slots(rng, DTYPES["fp32"], 2, 16, 24) for _ in range(2))
    x, base = (rng.normal(size=(2, 1, n)).astype(np.float32) for n in (16, 24))
    before = run_rows(kernels, memory, x, base, [1, 0])
    for each, new in zip(memory, other, strict=True):
        each[1] = new[1]
    after = run_rows(kernels, memory, x, base, [1, 0])
    assert (after[0] == run_rows(kernels, other, x, base, [1, 0])[0]).all()
    assert (after[1] == before[1]).all()
    assert (after[0] != before[0]).any()


def test_grids_and_workspace_are_for_any_indices(kernels):
    """Of a profile's rows and tokens there are never more than its workspace is for; and a batch of one adapter is
    launched as one of many is."""
    most = Sizes("fp16", 0, 576, 4, 8, (576, 192, 192), slots=8)
    for batch, tokens in ((1, 2048), (8, 300), (64, 16), (300, 1)):
        bound = kernels.workspace_bound(replace(most, tokens=batch * tokens, batch=batch), Tuning(1))
        for rows, each in itertools.product((1, 2, 7, 8, 33, 64, 300), (1, 2, 8, 9, 16, 70, 300, 2048)):
            if rows <= batch and each <= tokens:
                sizes = replace(most, tokens=rows * each, batch=rows)
                for processors in (1, 132, 999):
                    assert kernels.workspace_bytes(sizes, Tuning(processors)) <= bound, (batch, tokens, sizes)
                grids = [launch.grid for launch in kernels.launches(sizes, TUNING)]
                assert all(1 <= y <= 65535 and 1 <= z <= 65535 for _, y, z in grids)


def test_tokens_that_are_no_whole_rows_are_refused_in_words(kernels):
    sizes = Sizes("fp16", 7, 64, 4, 4, (32,), slots=2, batch=2)
    assert kernels.unsupported(sizes) == "the tokens are no whole number of rows"
    assert kernels.unsupported(replace(sizes, tokens=8)) is None
    assert kernels.unsupported(replace(sizes, slots=-1)) == "a size is not positive"
