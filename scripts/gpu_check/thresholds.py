"""What the constants of the plan should be on this GPU: each is tried against others where it matters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gpu_check.kernels import Tuning
from gpu_check.shapes import Projection
from gpu_check.timing import Stopwatch

# A constant stays unless another wins by this much: less is noise.
_WORTH = 1.03
_NEVER, _ALWAYS = 0, 1 << 30


@dataclass(frozen=True)
class Trial:
    """One constant: times relative to the best of its values, a geometric mean over what it was tried on.

    Attributes:
        now: its value. times: value -> relative time.
    """

    name: str
    now: int
    times: Mapping[int, float]

    @property
    def recommended(self) -> int:
        best = min(self.times, key=self.times.__getitem__)
        return best if self.times[self.now] > _WORTH * self.times[best] else self.now

    def __str__(self) -> str:
        shown = ", ".join(f"{value}: {time:.2f}" for value, time in self.times.items())
        kept = self.recommended == self.now
        return f"{self.name} = {self.now}{' stays' if kept else f' should be {self.recommended}'} ({shown})"


# Constant -> the values that are tried, and the numbers of tokens for which it matters.
TRIED: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "overlaps": ((0, 1), (1, 8, 64, 512)),
    "few_slices": ((4, 8, 16), (1, 8)),
    "blocks_each": ((1, 2, 3, 4), (64, 512, 2048)),
    "split_width": ((128, 256, 512), (64, 512)),
    "column_tiles": ((3, 5, 7, 9), (64, 512, 2048)),
}
BORDERS = (8, 16, 24, 32, 48, 64, 96, 128)


def try_constants(
    stopwatch: Stopwatch, tuning: Tuning, projections: Sequence[Projection], dtype: str, small: bool = False
) -> Iterator[Trial]:
    """Every constant of the plan; `small`: with the fewest tokens only, for a dry run."""
    yield _border(stopwatch, tuning, projections, dtype, BORDERS[:2] if small else BORDERS)
    for name, (values, tokens) in TRIED.items():
        now = int(getattr(tuning, name))
        logs = dict.fromkeys(dict.fromkeys((*values, now)), 0.0)
        for projection in projections:
            for count in tokens[:1] if small else tokens:
                calls = stopwatch.calls(projection.sizes(dtype, count))
                for value in logs:
                    kind = type(getattr(tuning, name))
                    logs[value] += math.log(
                        stopwatch.of_kernels(calls, dataclasses.replace(tuning, **{name: kind(value)}))
                    )
        yield Trial(name, now, _relative(logs, len(projections) * (1 if small else len(tokens))))


def _border(
    stopwatch: Stopwatch, tuning: Tuning, projections: Sequence[Projection], dtype: str, borders: Sequence[int]
) -> Trial:
    """Up to how many tokens decode's kernels win: the time of all numbers of tokens together, for each border."""
    few, many = (dict.fromkeys(borders, 0.0) for _ in range(2))
    for projection in projections:
        for count in borders:
            calls = stopwatch.calls(projection.sizes(dtype, count))
            for logs, border in ((few, _ALWAYS), (many, _NEVER)):
                logs[count] += math.log(stopwatch.of_kernels(calls, dataclasses.replace(tuning, few_tokens=border)))
    sums = {
        border: sum(few[count] if count <= border else many[count] for count in borders)
        for border in dict.fromkeys((*borders, tuning.few_tokens))
    }
    return Trial("few_tokens", tuning.few_tokens, _relative(sums, len(projections) * len(borders)))


def _relative(logs: Mapping[int, float], count: int) -> dict[int, float]:
    least = min(logs.values())
    return {value: math.exp((log - least) / count) for value, log in logs.items()}
