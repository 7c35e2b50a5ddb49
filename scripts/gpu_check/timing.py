"""Times of the op, against the bytes it must move and what PyTorch makes of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpu_check.kernels import Kernels, Sizes, Tuning
from gpu_check.machine import Machine
from gpu_check.operation import Call, by_pytorch, definition, difference, make_call, ours, two_products
from gpu_check.shapes import Projection

# As many copies of a call's tensors as fill the cache this often: each call of a graph finds its own in memory.
_CACHES, _MOST_COPIES = 3, 256
_COPY_BYTES = 1 << 29
# Of a shape that torch.compile compiles: no more of them then, since other figures tell more.
_LONG_SECONDS = 20.0


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call; None: not measured.

    Attributes:
        floor: of the least bytes at the speed of a copy.
        difference: see `operation.difference`.
    """

    projection: str
    dtype: str
    tokens: int
    floor: float
    ours: float
    eager: float
    products: float
    compiled: float | None
    difference: float

    @property
    def correct(self) -> bool:
        return self.difference <= 1


def copy_speed(torch: Any, machine: Machine, size: int = _COPY_BYTES) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    return 2 * size / machine.seconds(lambda: target.copy_(source))


class Stopwatch:
    """Times calls with their tensors in memory, not in the cache."""

    def __init__(self, torch: Any, machine: Machine, kernels: Kernels) -> None:
        self._torch, self._machine, self._kernels = torch, machine, kernels
        self._cache = machine.describe().cache_bytes

    def calls(self, sizes: Sizes) -> list[Call]:
        copies = min(_MOST_COPIES, -(-_CACHES * self._cache // sizes.least_bytes))
        return [make_call(self._torch, self._machine, sizes, seed) for seed in range(max(copies, 1))]

    def of_kernels(self, calls: Sequence[Call], tuning: Tuning) -> float:
        """Microseconds of one call of the kernels."""
        return self.of([ours(self._torch, self._machine, self._kernels, call, tuning) for call in calls])

    def of(self, runs: Sequence[Callable[[], object]]) -> float:
        """Microseconds of one of `runs`, which are made one after another."""

        def all_of_them() -> None:
            for run in runs:
                run()

        return 1e6 * self._machine.seconds(all_of_them) / len(runs)


def time_all(
    torch: Any,
    stopwatch: Stopwatch,
    machine: Machine,
    tuning: Tuning,
    speed: float,
    projections: Sequence[Projection],
    dtypes: Sequence[str],
    tokens: Sequence[int],
    compiler: Compiler,
) -> Iterator[Timing]:
    """Each projection at each number of tokens in each dtype; the most telling ones first."""
    for dtype in dtypes:
        for projection in projections:
            for count in tokens:
                sizes = projection.sizes(dtype, count)
                calls = stopwatch.calls(sizes)
                taken = stopwatch.of_kernels(calls, tuning)
                machine.synchronize()
                yield Timing(
                    str(projection),
                    dtype,
                    count,
                    floor=1e6 * sizes.least_bytes / speed,
                    ours=taken,
                    eager=stopwatch.of([functools.partial(by_pytorch, torch, call) for call in calls]),
                    products=stopwatch.of([two_products(torch, call) for call in calls]),
                    compiled=compiler.seconds(stopwatch, calls) if count in (tokens[0], tokens[-1]) else None,
                    difference=max(difference(torch, call) for call in calls[:1]),
                )


class Compiler:
    """torch.compile, as long as it works here and there is time: it takes many seconds for each shape."""

    def __init__(self, torch: Any, most: int) -> None:
        self._torch = torch
        self._left = most
        self.problem: str | None = None

    def seconds(self, stopwatch: Stopwatch, calls: Sequence[Call]) -> float | None:
        """Microseconds of one call, or None: no more are to be compiled, or it fails, which `problem` tells."""
        if self._left <= 0 or self.problem is not None:
            return None
        self._left -= 1
        begin = time.monotonic()
        try:
            sizes = calls[0].sizes
            compiled = self._torch.compile(functools.partial(definition, self._torch, sizes), dynamic=False)
            compiled(*calls[0].tensors()[:5])
            if time.monotonic() - begin > _LONG_SECONDS:
                self._left = 0
            return stopwatch.of([functools.partial(compiled, *call.tensors()[:5]) for call in calls])
        except Exception as error:
            # Of many kinds: no C++ compiler, no Triton, a GPU that it does not know.
            self.problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            return None
