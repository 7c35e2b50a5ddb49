"""What a call moves and launches, from the grids that the kernels' own plan gives: no second copy of the plan.

| kernel | reads, beyond what is written there | writes |
|---|---|---|
| few_down | `down` for each tile of tokens; x for each group of rows | parts of z |
| few_up | `up` for each tile of tokens; the parts of a sibling for each of its tiles of columns; base | y |
| many_down | x for each tile of columns of z; `down` for each tile of tokens | parts of z |
| many_route | the parts | v |
| many_up | v of a sibling for each of its tiles of columns; `up` for each tile of tokens; base | y |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from gpu_check.kernels import ELEMENT_SIZE, Kernels, Launch, Sizes, Tuning


@dataclass(frozen=True)
class Account:
    """A call of the op.

    Attributes:
        launches: its kernels.
        least: bytes that any implementation moves: each input once, and y.
        memory: bytes that go to or come from memory at least once: also parts of z and v, written and read.
        requested: bytes that all blocks ask for together, most of them again, from the L2 cache.
    """

    launches: tuple[Launch, ...]
    least: int
    memory: int
    requested: int


def account(kernels: Kernels, sizes: Sizes, tuning: Tuning) -> Account:
    """Of an emulated library."""
    launches = kernels.launches(sizes, tuning)
    by_name = {launch.kernel: launch.grid for launch in launches}
    size, tokens = ELEMENT_SIZE[sizes.dtype], sizes.tokens
    x, down, up = (size * count for count in (tokens * sizes.inputs, sizes.rows * sizes.inputs, _up_elements(sizes)))
    outputs = 2 * size * tokens * sizes.out
    if "few_down" in by_name:
        groups, slices, tiles = by_name["few_down"]
        column_tiles = by_name["few_up"][0]
        parts = 4 * slices * tokens * sizes.rows
        between = 2 * parts
        requested = tiles * down + groups * x + parts + tiles * up + outputs
        requested += column_tiles * 4 * slices * tokens * sizes.sibling_rows
    else:
        token_tiles, column_blocks, splits = by_name["many_down"]
        _, column_tiles, _ = by_name["many_up"]
        parts = 4 * splits * tokens * sizes.rows
        values = size * tokens * len(sizes.outs) * sizes.up_rank
        between = 2 * (parts + values)
        requested = column_blocks * x + token_tiles * down + 2 * parts + values
        requested += column_tiles * size * tokens * sizes.up_rank + token_tiles * up + outputs
    return Account(tuple(launches), sizes.least_bytes, sizes.least_bytes + between, requested)


def _up_elements(sizes: Sizes) -> int:
    return sizes.up_rank * sizes.out


def table(kernels: Kernels, tuning: Tuning, projections: tuple, tokens: tuple[int, ...], dtype: str = "fp16") -> str:
    """Markdown: a row for each projection and number of tokens."""
    lines = [
        "| projection | tokens | least | memory | requested | blocks a multiprocessor | shared memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for projection in projections:
        for count in tokens:
            one = account(kernels, projection.sizes(dtype, count), tuning)
            blocks = " + ".join(f"{launch.blocks / tuning.multiprocessors:.2g}" for launch in one.launches)
            shared = " + ".join(f"{launch.shared_bytes / 1024:.3g}" for launch in one.launches)
            lines.append(
                f"| {projection} | {count:,} | {_bytes(one.least)} | {one.memory / one.least:.2f} "
                f"| {one.requested / one.least:.1f} | {blocks} | {shared} KB |"
            )
    return "\n".join(lines)


# Of the kernels for few tokens: of one adapter in a block, and that are looked at together.
_TILE, _TOGETHER = 8, 32


def adapters_table(
    kernels: Kernels, tuning: Tuning, projections: tuple, batches: tuple[int, ...], slots: int, dtype: str = "fp16"
) -> str:
    """Markdown: decoding steps of some rows, all with one adapter of `slots` and each with its own."""
    lines = [
        "| projection | rows | adapters | least | weights asked for | blocks a multiprocessor | at work |",
        "|---|---|---|---|---|---|---|",
    ]
    for projection in projections:
        for batch in batches:
            sizes = replace(projection.sizes(dtype, batch), slots=slots, batch=batch)
            launches = kernels.launches(sizes, tuning)
            launched = [launch.blocks / tuning.multiprocessors for launch in launches]
            for adapters in (1, batch):
                groups = (
                    adapters
                    if adapters > 1
                    else sum(ceil(min(_TOGETHER, batch - first) / _TILE) for first in range(0, batch, _TOGETHER))
                )
                weights = sizes.weight_bytes
                least = sizes.least_bytes + (adapters - 1) * weights
                # Tiles of tokens are the second dimension of one kernel, and the third of the other.
                part = groups / launches[1].grid[1]
                at_work = " + ".join(f"{part * blocks:.2g}" for blocks in launched)
                all_blocks = " + ".join(f"{blocks:.2g}" for blocks in launched)
                lines.append(
                    f"| {projection} | {batch} | {adapters} | {_bytes(least)} | {groups / adapters:.0f} times "
                    f"| {all_blocks} | {at_work} |"
                )
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 1e6:.3g} MB"
