"""The CUDA kernels, run on the CPU: the same source, compiled against the emulation in plugins/tests.

The sweep compares with a formula in double precision of its own, over edges and random shapes; here the same kernels
also meet the definition of the op in Python, and faults planted in their source must be found.
"""

from __future__ import annotations

import itertools
import random
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from formula import by_definition, make_projection
from gpu_check.kernels import Kernels, Sizes, Tuning
from gpu_check.thresholds import BORDERS, TRIED
from hypothesis import given, settings
from hypothesis import strategies as st
from plugins.planted_faults import missed, tells_a_fault

from teamlora_export.graph import op

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
MOST_SIBLINGS = 4
# So few that small shapes are cut as large ones are on a GPU.
TUNING = Tuning(multiprocessors=16)


@pytest.fixture(scope="session")
def kernels(programs) -> Kernels:
    return Kernels(programs / "libteamlora_emulated.so")


def run_kernels(kernels: Kernels, feeds: dict[str, np.ndarray], k: int, shared: bool, schedule: int) -> np.ndarray:
    """The op on the emulated GPU. Outputs and workspace start as NaN."""
    x, splits = feeds["x"], feeds["out_splits"]
    dtype = next(name for name, each in DTYPES.items() if each == x.dtype)
    sizes = Sizes(dtype, len(x), x.shape[1], k, len(feeds["up"]) // k, tuple(map(int, splits)), shared)
    workspace = np.full(kernels.workspace_bytes(sizes, TUNING) + 64, 0xFF, np.uint8)
    aligned = workspace[-workspace.ctypes.data % 64 :]
    y = np.full(feeds["base"].shape, np.nan, x.dtype)
    arrays = [*(np.ascontiguousarray(feeds[name]) for name in op.INPUTS), y]
    kernels.launch(sizes, TUNING, [array.ctypes.data for array in arrays], aligned.ctypes.data, schedule=schedule)
    return y


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    k=st.integers(1, 8),
    chunk=st.integers(1, 9),
    shared=st.booleans(),
    d_in=st.integers(1, 200),
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=MOST_SIBLINGS),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_the_kernels_compute_what_the_op_is_defined_as(kernels, dtype, k, chunk, shared, d_in, widths, tokens, seed):
    rng = np.random.default_rng(seed)
    projections = [make_projection(rng, k, chunk, shared, d_in, width) for width in widths]
    folded = [op.fold(projection) for projection in projections]
    x = rng.normal(size=(tokens, d_in)) / np.sqrt(d_in)
    feeds = {
        "x": x.astype(dtype),
        "base": rng.normal(size=(tokens, sum(widths))).astype(dtype),
        "down": np.concatenate([f.down for f in folded]).astype(dtype),
        "mix": np.concatenate([f.mix for f in folded]).astype(np.float32),
        "up": np.concatenate([f.up for f in folded], axis=1).astype(dtype),
        "out_splits": np.array(widths),
    }
    assert_defined(run_kernels(kernels, feeds, k, shared, seed), feeds, k, shared)


def assert_defined(
    found: np.ndarray, feeds: dict[str, np.ndarray], k: int, shared: bool, exact_sums: bool = False
) -> None:
    low, high = by_definition(feeds, k, shared, feeds["out_splits"], rounds_product=False, exact_sums=exact_sums)
    found = found.astype(np.float64)
    # Written so that NaN fails.
    assert ((found >= low) & (found <= high)).all(), np.argwhere(~((found >= low) & (found <= high)))[:5]


@pytest.mark.parametrize("tokens", [5, 40])
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=str)
def test_the_router_sees_logits_rounded_as_the_definition_says(kernels, dtype, tokens, rng):
    """Large logits that lie close to each other, from sums that float32 makes exactly: their rounding moves the routing
    by several per cent."""
    k, d_in, columns = 4, 16, 24
    router = np.concatenate(
        [np.tile(rng.integers(16, 32, (1, 4)), (k, 1)), rng.integers(-16, 17, (k, 12)) / 16], axis=1
    )
    feeds = {
        "x": np.concatenate([rng.integers(1, 9, (tokens, 4)), rng.integers(-8, 9, (tokens, 12)) / 8], axis=1),
        "base": np.zeros((tokens, columns)),
        "down": np.concatenate([rng.integers(-8, 9, (8, d_in)), router]),
        "up": rng.integers(-8, 9, (8, columns)),
    }
    feeds = {name: array.astype(dtype) for name, array in feeds.items()}
    feeds |= {"mix": np.eye(k, dtype=np.float32)[None], "out_splits": np.array([columns])}
    logits = feeds["x"].astype(np.float32) @ feeds["down"][8:].astype(np.float32).T
    moved = np.abs(logits - logits.astype(dtype).astype(np.float32)).max(axis=1)
    assert np.median(moved) > 0.05
    assert_defined(run_kernels(kernels, feeds, k, False, 2), feeds, k, False, exact_sums=True)


def test_a_profile_s_workspace_is_enough_for_every_plan_that_check_gpu_tries(kernels):
    """And so is it still where its advice is taken: each constant alone, and many combinations of all."""
    values = {"few_tokens": (0, *BORDERS), **{name: values for name, (values, _) in TRIED.items()}}
    constants = [{name: value} for name, tried in values.items() for value in tried]
    draw = random.Random(5)
    constants += [{name: draw.choice(tried) for name, tried in values.items()} for _ in range(60)]
    shapes = [
        Sizes("fp16", 0, 576, 4, 8, (576, 192, 192)),
        Sizes("fp16", 0, 11008, 4, 32, (4096,)),
        Sizes("fp32", 0, 4096, 4, 32, (11008, 11008)),
        Sizes("bf16", 0, 70001, 3, 7, (13,)),
        Sizes("fp16", 0, 300, 32, 128, (64, 64, 64, 64), shared_down=True),
    ]
    for sizes, chosen in itertools.product(shapes, constants):
        for profile in (1, 40, 130, 2048):
            most = kernels.workspace_bound(replace(sizes, tokens=profile), Tuning(1, **chosen))
            for tokens, processors in itertools.product(
                (1, 31, 32, 33, 64, 65, 128, 700, 2048), (1, 16, 132, 192, 999)
            ):
                if tokens <= profile:
                    needed = kernels.workspace_bytes(replace(sizes, tokens=tokens), Tuning(processors, **chosen))
                    assert needed <= most, (sizes, chosen, profile, tokens, processors)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"inputs": 1 << 30}, None),
        ({"inputs": (1 << 30) + 1}, "more than 2^30 inputs or tokens"),
        ({"inputs": 2**31 - 2047}, "more than 2^30 inputs or tokens"),
        ({"tokens": (1 << 30) + 1}, "more than 2^30 inputs or tokens"),
        ({"outs": (65535 * 128,)}, None),
        ({"outs": (65535 * 128 + 1,)}, "more than 8.3 million outputs"),
        ({"outs": (65534 * 128, 1, 1)}, "more than 8.3 million outputs"),
        ({"outs": (2**31 - 1,) * 4}, "more than 8.3 million outputs"),
        ({"expert_rank": 1025}, "the rank is beyond 4096"),
    ],
)
def test_sizes_that_the_kernels_cannot_count_are_refused_in_words(kernels, changed, reason):
    """Steps along `in` that leave 32 bits, and a grid of more blocks than CUDA takes."""
    sizes = replace(Sizes("fp16", 40, 64, 4, 8, (64,)), **changed)
    assert kernels.unsupported(sizes) == reason
    if reason is None:
        assert all(1 <= y <= 65535 and 1 <= z <= 65535 for _, y, z in grids_of(kernels, sizes))


def grids_of(kernels: Kernels, sizes: Sizes) -> list[tuple[int, int, int]]:
    return [launch.grid for tokens in (1, 40) for launch in kernels.launches(replace(sizes, tokens=tokens), TUNING)]


@pytest.fixture(scope="module")
def sweeps(programs) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """Both sweeps, side by side: each is one process on one core."""
    with ThreadPoolExecutor(2) as pool:
        commands = {
            "emulation": [programs / "sweep_emulation", "--cases", "80"],
            "sanitized": [programs / "sweep_sanitized", "--cases", "10", "--seed", "2"],
        }
        options = {"capture_output": True, "text": True}
        yield {name: pool.submit(subprocess.run, command, **options) for name, command in commands.items()}


def test_the_sweep_passes(sweeps):
    result = sweeps["emulation"].result()
    assert result.returncode == 0, result.stdout
    assert "297 cases, 0 failures" in result.stdout


def test_no_memory_or_integer_error_in_any_order_of_threads(sweeps):
    """AddressSanitizer and UndefinedBehaviorSanitizer watch the kernels, the launch and the plans."""
    result = sweeps["sanitized"].result()
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


# What -> (file, the code that is there, what is put in its place, and so on). One of a kind each; by hand, every
# barrier was taken out in turn, and each was missed.
FAULTS = {
    "copies that nobody waits for": (
        "many_tokens.cuh",
        "        if (step + kStages - 1 < steps) fetch(step + kStages - 1);",
        "        fetch(step + kStages - 1);",
    ),
    "a kernel that opens a call within another": ("launch.cu", "Place::kNext", "Place::kFirst"),
    "a call whose last kernel lets another begin": (
        "launch.cu",
        "Place::kLast, tuning.overlaps, up",
        "Place::kNext, true, up",
    ),
    "half of the threads do not wait": (
        "few_tokens.cuh",
        "    wait_for_kernel_before();\n    parts.",
        "    if (threadIdx.x % 2 == 0) wait_for_kernel_before();\n    parts.",
    ),
    **{
        f"{name} read as if it were aligned": ("launch.cu", f" && on_16_bytes(tensors.{name})", "")
        for name in ("down", "up", "y")
    },
    "no barrier before the router": ("few_tokens.cuh", "    __syncthreads();\n    route<", "    route<"),
    "no barrier before the router, many": ("many_tokens.cuh", "    __syncthreads();\n    route<", "    route<"),
    "z added up before the first kernel has ended": (
        "few_tokens.cuh",
        "    wait_for_kernel_before();\n    parts.",
        "    parts.",
    ),
    "z added up, and then waited for": (
        "few_tokens.cuh",
        "    wait_for_kernel_before();\n    parts.template add_up<T>(z, own_tokens);\n",
        "    parts.template add_up<T>(z, own_tokens);\n    wait_for_kernel_before();\n",
    ),
    "v made before the first product has ended": (
        "many_tokens.cuh",
        "    wait_for_kernel_before();\n    parts.template",
        "    parts.template",
    ),
    "v read before it is made": (
        "many_tokens.cuh",
        "    wait_for_kernel_before();\n    start_stages",
        "    start_stages",
    ),
    "v copied, and then waited for": (
        "many_tokens.cuh",
        "    wait_for_kernel_before();\n    start_stages<Shape::kStages>(steps, fetch_values);\n",
        "    start_stages<Shape::kStages>(steps, fetch_values);\n    wait_for_kernel_before();\n",
    ),
    "the weights of the first stage for those of the second": (
        "many_tokens.cuh",
        "if (step < steps) fetch_weights(step);",
        "if (step < steps) fetch_weights(0);",
    ),
    "rows of weights that are not copied far enough ahead": (
        "few_tokens.cuh",
        "copy_rows_of_up(first + kAhead * kUpRowGroups)",
        "copy_rows_of_up(first + kUpRowGroups)",
    ),
    "a row of weights that is not held far enough ahead": (
        "few_tokens.cuh",
        "load_row_of_up(first + (kAhead + n) * kUpRowGroups)",
        "load_row_of_up(first + (n + 1) * kUpRowGroups)",
    ),
    "rows of weights used before they have arrived": ("few_tokens.cuh", "            wait_for_copies<0>();\n", ""),
    "rows of weights copied over those still to be read": (
        "few_tokens.cuh",
        "            copy_rows_of_up(first + kAhead * kUpRowGroups);\n            __pipeline_commit();\n",
        "",
        "            wait_for_copies<0>();\n",
        "            wait_for_copies<0>();\n            copy_rows_of_up(first + kAhead * kUpRowGroups);\n"
        "            __pipeline_commit();\n",
    ),
    "copies in no group": (
        "few_tokens.cuh",
        "            copy_rows_of_up(first + kAhead * kUpRowGroups);\n            __pipeline_commit();\n",
        "            copy_rows_of_up(first + kAhead * kUpRowGroups);\n",
    ),
    "the interaction used before it has arrived": ("few_tokens.cuh", "    wait_for_copies<1>();", "    "),
    "a wait for the interaction that is none": ("few_tokens.cuh", "wait_for_copies<1>", "wait_for_copies<2>"),
    "the interaction used before it has arrived, many": ("many_tokens.cuh", "    wait_for_copies<0>();\n", ""),
    "base read before others have copied it": (
        "few_tokens.cuh",
        "    __syncthreads();\n#pragma unroll\n    for (int n = 0; n < kOwn; ++n) {\n        const int i",
        "#pragma unroll\n    for (int n = 0; n < kOwn; ++n) {\n        const int i",
    ),
    "base of the block's first token for all": (
        "few_tokens.cuh",
        "own_base + own.place(t) * out + lane_column",
        "own_base + own.place(0) * out + lane_column",
    ),
    "a part read by a thread that has not waited": (
        "few_tokens.cuh",
        "    wait_for_kernel_before();\n    parts.",
        "    if (threadIdx.x == 0) load_written_before(arguments.partials);\n    wait_for_kernel_before();\n    parts.",
    ),
    "rows of weights past the rank": ("few_tokens.cuh", "            if (row >= up_rank) break;\n", ""),
    "an interaction of more than 16 experts cut off": (
        "routing.cuh",
        "i < k * k; i += static_cast<int>(blockDim.x)",
        "i < k * k; i = k * k",
    ),
    "the second round of parts left out": ("parts.cuh", "first < parts_.count;", "first < 1;"),
    "the parts of a thread's first number for all of its numbers": (
        "parts.cuh",
        "begin = begin_of(i);",
        "begin = first_;",
    ),
    "a quotient that is one too small": (
        "divisor.cuh",
        "static_cast<unsigned>(divisor) + 1}",
        "static_cast<unsigned>(divisor)}",
    ),
    "parts that nobody has written": ("parts.cuh", "first + n < parts_.count ? load", "true ? load"),
    "the part of every split in the first's place": ("many_tokens.cuh", "int64_t{blockIdx.z} *", "int64_t{0} *"),
    "a split that reads on into the next": (
        "many_tokens.cuh",
        "end = min(begin + arguments.split_width, arguments.in)",
        "end = arguments.in",
    ),
    "no barrier between the sums of two warps": (
        "many_tokens.cuh",
        "    __syncthreads();\n    if (depth_warp == 0)",
        "    if (depth_warp == 0)",
    ),
    "parts stored before they are there": (
        "many_tokens.cuh",
        "    __syncthreads();\n    // Four sums",
        "    // Four sums",
    ),
    "no barrier between the exponentials and their mix": (
        "routing.cuh",
        "    __syncthreads();\n    for (int i = thread; i < tokens * k",
        "    for (int i = thread; i < tokens * k",
    ),
    "a stage used before it has arrived": ("many_tokens.cuh", "wait_for_copies<kStages - 2>();", ""),
    "a stage filled while others read it": (
        "many_tokens.cuh",
        "        __syncthreads();\n        if (step + kStages - 1 < steps)",
        "        if (step + kStages - 1 < steps)",
    ),
    "the stage before": (
        "many_tokens.cuh",
        "values = stages + step % Shape::kStages",
        "values = stages + (step + Shape::kStages - 1) % Shape::kStages",
    ),
    "sums stored over stages that are still read": (
        "many_tokens.cuh",
        "        use(step);\n    }\n    __syncthreads();",
        "        use(step);\n    }",
    ),
    "y stored before its sums are there": (
        "many_tokens.cuh",
        "    __syncthreads();\n    T* own_y",
        "    T* own_y",
    ),
    "the padding of v left as it was": (
        "many_tokens.cuh",
        "        values[(static_cast",
        "        if (row < up_rank) values[(static_cast",
    ),
    "base of a tile's first rows for all": (
        "many_tokens.cuh",
        "load_raw(own_base + n * kRowStep * out)",
        "load_raw(own_base)",
    ),
    "the interaction transposed": ("routing.cuh", "from * k + expert", "expert * k + from"),
    "another sibling's interaction": ("many_tokens.cuh", "arguments.mix + sibling * k * k", "arguments.mix"),
    "the wrong expert": ("many_tokens.cuh", "expert_rank.quotient(row), k - 1", "expert_rank.quotient(row + 1), k - 1"),
    "an unguarded tail of tokens": ("few_tokens.cuh", "&& column < tile.width && own.has(t)) {", ") {"),
    "z that is not rounded": ("parts.cuh", "rounded<T>(sum)", "sum"),
    "v that is not rounded": ("few_tokens.cuh", "value = rounded<T>(z[", "value = (z["),
    "weights rounded to T": (
        "many_tokens.cuh",
        "* weights[token * k + expert] : 0.0F",
        "* rounded<T>(weights[token * k + expert]) : 0.0F",
    ),
}


def test_planted_faults_are_caught(tmp_path, programs):
    assert not missed(FAULTS, "one-adapter", programs, tmp_path)


def test_only_what_a_fault_itself_does_counts_as_caught():
    assert not tells_a_fault("passes", ["true"], 10)
    assert tells_a_fault("finds it", ["false"], 10)
    assert tells_a_fault("crashes", ["sh", "-c", "kill -SEGV $$"], 10)
    for what, body, message in (
        ("no memory", "kill -KILL $$", r"no memory: -9"),
        ("a left out path", "exit 3", r"a left out path: 3"),
        ("a loop", "exec sleep 60", r"a loop: the sweep is not done after 0\.2 s"),
    ):
        with pytest.raises(AssertionError, match=message):
            tells_a_fault(what, ["sh", "-c", body], 0.2 if what == "a loop" else 10)


def test_a_sweep_that_fails_without_a_fault_is_told(tmp_path, monkeypatch):
    """As were its build wrong: all faults would seem to be caught."""
    monkeypatch.setattr("plugins.planted_faults._is_caught", lambda *_: True)
    monkeypatch.setattr("plugins.planted_faults._compile", lambda *_: None)
    with pytest.raises(AssertionError, match="the sweep fails without a fault"):
        missed(FAULTS, "one-adapter", tmp_path, tmp_path)
