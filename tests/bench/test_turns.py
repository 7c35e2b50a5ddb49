"""Ratios, their spread and the verdict on noise, on rows and a clock that do exactly what the test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, repeat

import pytest

from teamlora_export.bench.measure import FEWEST_TURNS, Benchmark, Machine
from teamlora_export.bench.report import conclusion
from teamlora_export.bench.turns import AGAIN, DECODE, PREFILL, Figure, Workload, take_turns

WORKLOAD = Workload(batch=2, length=10, count=4)


class World:
    """A clock that rows move on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.steps: list[str] = []

    def row(self, name: str, prefill: float, step: float, slowness: Iterator[float] | None = None) -> Callable:
        """What reads and makes tokens in so many seconds, times the next of `slowness` for each call."""
        slowness = slowness or repeat(1.0)

        def read(_prompts: object, _count: int) -> Callable[[], None]:
            self.calls.append(name)
            factor = next(slowness)
            self.now += prefill * factor
            return lambda: self._step(name, step * factor)

        return read

    def _step(self, name: str, seconds: float) -> None:
        self.steps.append(name)
        self.now += seconds

    def measure(self, rows: dict[str, Callable], turns: int, workload: Workload = WORKLOAD) -> list[Figure]:
        return take_turns(rows, "base", workload, [[1]], turns, clock=lambda: self.now)


def pick(figures: list[Figure], row: str, quantity: str) -> Figure:
    (found,) = [figure for figure in figures if (figure.row, figure.quantity) == (row, quantity)]
    return found


def as_benchmark(figures: list[Figure], turns: int) -> Benchmark:
    return Benchmark("base", turns, 1, Machine("none", 1, None, {}), tuple(figures), {}, ())


def test_times_and_ratios_are_those_of_the_rows():
    world = World()
    figures = world.measure({"base": world.row("base", 2.0, 0.5), "other": world.row("other", 3.0, 0.25)}, 5)
    prefill, decode = pick(figures, "other", PREFILL), pick(figures, "other", DECODE)
    assert prefill.median == pytest.approx(3.0) and prefill.ratio.median == pytest.approx(1.5)
    assert decode.median == pytest.approx(0.25) and decode.ratio.median == pytest.approx(0.5)
    assert decode.tokens_a_second == pytest.approx(2 / 0.25)
    assert prefill.tokens_a_second == pytest.approx(2 * 10 / 3.0)
    assert len(prefill.seconds) == 5


def test_an_encoder_has_a_prefill_alone():
    world = World()
    figures = world.measure({"base": world.row("base", 2.0, 0.5)}, 2, Workload(1, 10, 0))
    assert {figure.quantity for figure in figures} == {PREFILL}


def test_every_row_runs_once_a_turn_and_the_baseline_twice_in_another_order_each_time():
    world, turns = World(), 6
    world.measure({name: world.row(name, 1.0, 1.0) for name in ("base", "one", "other")}, turns)
    orders = [tuple(world.calls[start : start + 4]) for start in range(0, len(world.calls), 4)]
    assert len(orders) == turns + 1, "one turn warms up, and does not count"
    assert all(sorted(order) == ["base", "base", "one", "other"] for order in orders)
    assert len(set(orders)) > 1


def test_turns_of_another_seed_come_in_another_order():
    orders = set()
    for seed in range(6):
        world = World()
        rows = {name: world.row(name, 1.0, 1.0) for name in ("base", "one", "other")}
        take_turns(rows, "base", WORKLOAD, [[1]], turns=1, clock=lambda world=world: world.now, seed=seed)
        orders.add(tuple(world.calls))
    assert len(orders) > 3


def test_rows_make_their_tokens_side_by_side_a_few_at_once():
    world = World()
    world.measure({name: world.row(name, 1.0, 1.0) for name in ("base", "other")}, 3, Workload(1, 10, 11))
    assert len(world.steps) == 3 * 11 * (3 + 1)
    for start in range(0, len(world.steps), 3 * 11):
        turn = world.steps[start : start + 3 * 11]
        assert (turn[:24].count("base"), turn[:24].count("other")) == (16, 8)
        assert {tuple(turn[at : at + 8]) for at in (0, 8, 16)} == {("base",) * 8, ("other",) * 8}
        assert {tuple(turn[at : at + 3]) for at in (24, 27, 30)} == {("base",) * 3, ("other",) * 3}


def test_the_first_step_after_another_row_is_not_in_the_time_of_a_step():
    world, made = World(), iter(range(1000))

    def read(_prompts: object, _count: int) -> Callable[[], None]:
        return lambda: world._step("other", 9.0 if next(made) % 2 == 0 else 1.0)

    figures = world.measure({"base": world.row("base", 1.0, 1.0), "other": read}, 3, Workload(1, 10, 2))
    assert pick(figures, "other", DECODE).seconds == pytest.approx((1.0, 1.0, 1.0))


def test_a_step_that_was_disturbed_is_not_in_the_time_of_a_step():
    world, disturbed = World(), iter(range(1000))

    def read(_prompts: object, _count: int) -> Callable[[], None]:
        return lambda: world._step("other", 9.0 if next(disturbed) % WORKLOAD.count == 0 else 1.0)

    figures = world.measure({"base": world.row("base", 1.0, 1.0), "other": read}, 3)
    assert pick(figures, "other", DECODE).seconds == pytest.approx((1.0, 1.0, 1.0))


def test_what_slows_a_whole_turn_is_in_no_ratio():
    """Each row and the baseline twice: three calls of two rows a turn, of which each is slower than the turn before."""
    world = World()
    turns = [factor for factor in range(1, 20) for _ in range(3)]
    shared = iter(turns)
    rows = {"base": world.row("base", 1.0, 1.0, shared), "other": world.row("other", 1.2, 1.2, shared)}
    figures = world.measure(rows, 9)
    found = pick(figures, "other", DECODE)
    assert max(found.seconds) > 3 * min(found.seconds)
    assert (found.ratio.low, found.ratio.high, found.noise) == pytest.approx((1.2, 1.2, 0.0))
    assert found.tells


def test_quartiles_are_those_of_the_ratios_within_a_turn():
    world = World()
    slowness = iter([1.0, 1.0, 1.1, 1.2, 1.3, 1.4])
    rows = {"base": world.row("base", 1.0, 1.0), "other": world.row("other", 1.0, 1.0, slowness)}
    ratio = pick(world.measure(rows, 5), "other", PREFILL).ratio
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.2, 1.3))


@pytest.mark.parametrize(
    ("jump", "turns", "verdict"),
    [
        pytest.param(1.0, 9, "Quiet enough to tell", id="quiet"),
        pytest.param(1.03, 9, "Quiet enough to tell", id="nearly"),
        pytest.param(1.3, 9, "Too noisy to tell", id="noisy"),
        pytest.param(1.0, FEWEST_TURNS - 1, "Too few turns to tell", id="too few turns"),
    ],
)
def test_noise_of_the_baseline_decides_what_can_be_told(jump, turns, verdict):
    """Every third call of the baseline is slower: the first of a turn in one turn, the second in another."""
    world = World()
    rows = {
        "base": world.row("base", 1.0, 1.0, cycle([1.0, 1.0, jump])),
        "slower": world.row("slower", 1.2, 1.2),
    }
    figures = world.measure(rows, turns)
    benchmark = as_benchmark(figures, turns)
    assert conclusion(benchmark).startswith(verdict)
    assert benchmark.quiet == verdict.startswith("Quiet")
    assert pick(figures, AGAIN, DECODE).noise == pick(figures, AGAIN, DECODE).ratio.reach
    assert pick(figures, "slower", DECODE).tells == (jump < 1.2)
