"""A batch whose rows have adapters of their own, which is version 2 of the op: what it costs, and what a swap needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpu_check.kernels import Kernels, Sizes, Tuning
from gpu_check.machine import Machine
from gpu_check.operation import Call, difference, enqueued, make_call
from gpu_check.shapes import Projection


@dataclass(frozen=True)
class BatchTiming:
    """A decoding step of `rows` texts, in microseconds.

    Attributes:
        alone: by version 1, whose weights are one adapter's.
        same: by version 2, all rows with one adapter of the slots. mixed: each row with its own.
        difference: see `operation.difference`; the largest of all rows.
    """

    projection: str
    dtype: str
    rows: int
    alone: float
    same: float
    mixed: float
    difference: float

    @property
    def correct(self) -> bool:
        return self.difference <= 1

    def __str__(self) -> str:
        return (
            f"{self.projection}, {self.dtype}, {self.rows} rows: one adapter {self.alone:.1f} us, of slots "
            f"{self.same:.1f}, {self.rows} adapters {self.mixed:.1f}; {'right' if self.correct else 'WRONG'} "
            f"({self.difference:.2f})"
        )


class Batch:
    """Rows of `each` tokens, and adapters in slots."""

    def __init__(
        self,
        torch: Any,
        machine: Machine,
        kernels: Kernels | None,
        projection: Projection,
        dtype: str,
        rows: int,
        slots: int,
        each: int = 1,
    ) -> None:
        self._torch, self._machine, self._kernels, self._each = torch, machine, kernels, each
        one = projection.sizes(dtype, 1)
        self.sizes = replace(projection.sizes(dtype, rows * each), slots=slots, batch=rows)
        texts = make_call(torch, machine, projection.sizes(dtype, rows * each))
        self.x, self.base, self.y = texts.x, texts.base, texts.y
        adapters = [make_call(torch, machine, one, seed) for seed in range(slots)]
        self.down, self.mix, self.up = (
            torch.stack([getattr(adapter, name) for adapter in adapters]).contiguous() for name in ("down", "mix", "up")
        )
        self._kept: list[Any] = []

    def indices(self, slots: Sequence[int]) -> Any:
        """int32 [rows], on the machine."""
        return self._torch.tensor(list(slots), dtype=self._torch.int32, device=self._machine.device)

    def run(self, tuning: Tuning, adapter: Any) -> Callable[[], None]:
        """A function that enqueues version 2."""
        return self._enqueued(self.sizes, tuning, self.down, self.mix, self.up, adapter)

    def run_alone(self, tuning: Tuning, slot: int) -> Callable[[], None]:
        """A function that enqueues version 1, of one slot's weights."""
        sizes = replace(self.sizes, slots=0, batch=0)
        return self._enqueued(sizes, tuning, self.down[slot], self.mix[slot], self.up[slot])

    def _enqueued(
        self, sizes: Sizes, tuning: Tuning, down: Any, mix: Any, up: Any, *adapter: Any
    ) -> Callable[[], None]:
        assert self._kernels is not None
        tensors = (self.x, self.base, down, mix, up, self.y, *adapter)
        run = enqueued(self._torch, self._machine, self._kernels, sizes, tuning, tensors)
        # A graph that is captured of it has their addresses, and those of what it holds itself.
        self._kept += [run, *tensors]
        return run

    def difference(self, slots: Sequence[int]) -> float:
        """Of y, after a run with these slots; NaN where a row without an adapter, below 0, is not its base."""
        self._machine.synchronize()
        return worst(*(self._difference(row, slot) for row, slot in enumerate(slots)))

    def copy(self, source: int, target: int) -> None:
        """An adapter into another's slot: the addresses stay."""
        for slots in (self.down, self.mix, self.up):
            slots[target].copy_(slots[source])

    def forget(self) -> None:
        """What is not written anew is no number."""
        self.y.fill_(float("nan"))

    def _difference(self, row: int, slot: int) -> float:
        tokens = slice(row * self._each, (row + 1) * self._each)
        x, base, y = (tensor[tokens] for tensor in (self.x, self.base, self.y))
        if slot < 0:
            return 0.0 if self._torch.equal(y, base) else float("nan")
        sizes = replace(self.sizes, tokens=self._each, slots=0, batch=0)
        return difference(self._torch, Call(sizes, x, base, self.down[slot], self.mix[slot], self.up[slot], y, v=None))


def time_batch(
    torch: Any,
    machine: Machine,
    kernels: Kernels,
    tuning: Tuning,
    projection: Projection,
    dtype: str,
    rows: int,
    slots: int,
) -> BatchTiming:
    """One step after another takes other slots, so that no weights stay in the L2 cache where they are larger."""
    batch = Batch(torch, machine, kernels, projection, dtype, rows, slots)
    mixed = [[(start + row) % slots for row in range(rows)] for start in range(0, slots, rows)]

    def time(runs: Sequence[Callable[[], None]]) -> float:
        def all_of_them() -> None:
            for run in runs:
                run()

        return 1e6 * machine.seconds(all_of_them) / len(runs)

    alone = time([batch.run_alone(tuning, slot) for slot in range(slots)])
    same = time([batch.run(tuning, batch.indices([slot] * rows)) for slot in range(slots)])
    wrong = batch.difference([slots - 1] * rows)
    # A row that nobody writes is not what the run before left there.
    batch.forget()
    each = time([batch.run(tuning, batch.indices(slots_of_rows)) for slots_of_rows in mixed])
    return BatchTiming(str(projection), dtype, rows, alone, same, each, worst(wrong, batch.difference(mixed[-1])))


def swap_in_graph(
    torch: Any,
    machine: Machine,
    kernels: Kernels,
    tuning: Tuning,
    projection: Projection,
    dtype: str,
    rows: int,
    each: int,
) -> float:
    """See `swapped`, of the kernels alone, captured once, and rows of `each` tokens."""
    batch = Batch(torch, machine, kernels, projection, dtype, rows, 3, each)
    adapter = batch.indices([row % 3 for row in range(rows)])
    return swapped(batch, adapter, machine.captured(batch.run(tuning, adapter)))


def swapped(batch: Batch, adapter: Any, run: Callable[[], None]) -> float:
    """The largest difference of y where a slot is copied into between two runs, and where the indices change, which
    are [0, 1, 2, 0, ..] at first. A row without an adapter must be its base."""
    rows = len(adapter)
    slots = [row % 3 for row in range(rows)]

    def found() -> float:
        batch.forget()
        run()
        return batch.difference(slots)

    differences = [found()]
    batch.copy(2, 0)
    differences.append(found())
    for choice in ([0, -1, 1], [-1, 2, 0], [1, 1, -1]):
        slots = [choice[row % 3] for row in range(rows)]
        adapter.copy_(batch.indices(slots))
        differences.append(found())
    return worst(*differences)


def worst(*differences: float) -> float:
    """The largest, or NaN where one is: `max` loses a NaN that is not the first."""
    return float("nan") if any(map(math.isnan, differences)) else max(differences)
