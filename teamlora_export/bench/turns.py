"""Times several ways to run one model in strict turns, and says what can be told from it.

In a turn every row reads the same prompts, and then all make their tokens side by side: each makes its first few, then
each its next few, every time in another order. What else the machine does hits each alike, and a ratio within a turn is
worth more than two times from different minutes. A few at once, as they are made where a model is alone: the first of
them wakes threads and brings weights back that the row before pushed out of the caches, and is not timed. The baseline
runs twice in a turn, as if it were another row. Its ratio to itself is 1 but for noise, so that the spread of this
ratio says how much of every other one is noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Reads prompts, all of one length, with so many tokens to follow; returns what makes one more token of each.
Reader = Callable[[Sequence[Sequence[int]], int], Callable[[], object]]
PREFILL, DECODE = "prefill", "decode"
AGAIN = "the baseline again"
_WARM_UP = 1
# Tokens that a row makes before the next one's turn.
_BURST = 8
# Threads of the row before still spin for some milliseconds, on a core that the next one needs.
_PAUSE = 0.005


@dataclass(frozen=True)
class Workload:
    """What is asked of a model: `count` tokens after each of `batch` prompts of `length` tokens; 0 for an encoder."""

    batch: int
    length: int
    count: int


@dataclass(frozen=True)
class Ratio:
    """Time over the baseline's in the same turn: the median over the turns, and the quartiles. Below 1 is faster."""

    median: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        """How far from 1 the farther quartile is."""
        return max(abs(self.low - 1.0), abs(self.high - 1.0))


@dataclass(frozen=True)
class Figure:
    """What one row took for one part of a workload.

    Attributes:
        quantity: "prefill", the time of reading the prompts, or "decode", that of one step: a token for each of them.
        seconds: of each turn.
        noise: the reach of the baseline's ratio to itself.
    """

    row: str
    quantity: str
    workload: Workload
    seconds: tuple[float, ...]
    ratio: Ratio
    noise: float

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def tokens_a_second(self) -> float:
        """Of all sequences of the batch together."""
        tokens = self.workload.length if self.quantity == PREFILL else 1
        return self.workload.batch * tokens / self.median

    @property
    def tells(self) -> bool:
        """Whether the row is faster or slower than the baseline by more than noise."""
        return abs(self.ratio.median - 1.0) > self.noise


def take_turns(
    readers: Mapping[str, Reader],
    baseline: str,
    workload: Workload,
    prompts: Sequence[Sequence[int]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> list[Figure]:
    """The figures of every row, and of the baseline once more (`AGAIN`): prefill, then decode where tokens are made.

    Args:
        seed: of the orders in which the rows take their turns.
    """
    entrants = {**readers, AGAIN: readers[baseline]}
    orders = np.random.default_rng(seed)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in entrants}
    for turn in range(-_WARM_UP, turns):
        for name, taken in _time(entrants, orders, prompts, workload.count, clock).items():
            if turn >= 0:
                times[name].append(taken)
    quantities = (PREFILL, DECODE) if workload.count else (PREFILL,)
    return [
        figure
        for index, quantity in enumerate(quantities)
        for figure in judge(
            {name: [t[index] for t in taken] for name, taken in times.items()}, baseline, quantity, workload
        )
    ]


def judge(times: Mapping[str, Sequence[float]], baseline: str, quantity: str, workload: Workload) -> list[Figure]:
    """A figure for each row of `times` (seconds of each turn), which has the baseline `AGAIN`."""
    ratios = {name: _ratio(np.array(seconds) / np.array(times[baseline])) for name, seconds in times.items()}
    noise = ratios[AGAIN].reach
    return [Figure(name, quantity, workload, tuple(seconds), ratios[name], noise) for name, seconds in times.items()]


def _time(
    readers: Mapping[str, Reader],
    orders: np.random.Generator,
    prompts: Sequence[Sequence[int]],
    count: int,
    clock: Callable[[], float],
) -> dict[str, tuple[float, float]]:
    """Seconds of each row's prefill, and of its step of decoding in the median of those of `count` that are timed."""
    steps: dict[str, Callable[[], object]] = {}
    prefills: dict[str, float] = {}
    decodes: dict[str, list[float]] = {name: [] for name in readers}
    for name in orders.permutation(list(readers)).tolist():
        time.sleep(_PAUSE)
        begin = clock()
        steps[name] = readers[name](prompts, count)
        prefills[name] = clock() - begin
    for done in range(0, count, _BURST):
        for name in orders.permutation(list(readers)).tolist():
            time.sleep(_PAUSE)
            taken = []
            for _ in range(min(_BURST, count - done)):
                begin = clock()
                steps[name]()
                taken.append(clock() - begin)
            decodes[name] += taken[1:] or taken
    return {name: (prefills[name], float(np.median(decodes[name])) if count else 0.0) for name in readers}


def _ratio(ratios: np.ndarray) -> Ratio:
    low, median, high = np.percentile(ratios, (25, 50, 75))
    return Ratio(float(median), float(low), float(high))
