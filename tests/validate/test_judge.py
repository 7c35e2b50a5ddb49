"""The verdict on outputs: what a single step is allowed, and what all steps together are."""

from __future__ import annotations

import numpy as np
import pytest

from teamlora_export.bundle import Port
from teamlora_export.validate.cases import Case
from teamlora_export.validate.judge import Judge

INPUTS = (Port("input_ids", "int64", ("batch", "sequence")), Port("attention_mask", "int64", ("batch", "total")))
_RNG = np.random.default_rng(0)
NOISE = {seed: _RNG.normal(size=(1, 4, 32)) for seed in range(40)}


class Noisy:
    """Gives 1 and `size` times the noise of the call's number, from `first` on."""

    def __init__(self, size: float, first: int = 0) -> None:
        self._size, self._call = size, first

    def run(self, feeds, choices=None):
        self._call += 1
        tokens = feeds["input_ids"].shape[1]
        return {"logits": 1 + self._size * NOISE[self._call % 40][:, :tokens]}


def judged(size: float, cases: int) -> Judge:
    """A candidate that errs by `size` where PyTorch errs by 1e-5."""
    judge = Judge("fp32", Noisy(0.0), Noisy(1e-5), Noisy(size, first=7), INPUTS)
    for number in range(cases):
        ones = np.ones((1, 4), np.int64)
        judge.add_case(Case(f"case {number}", ones, ones))
    return judge


@pytest.mark.parametrize(
    ("times", "each", "together"), [(1, True, True), (3, True, True), (6, True, False), (30, False, False)]
)
def test_over_all_steps_less_is_allowed_than_in_one(times, each, together):
    judge = judged(times * 1e-5, 24)
    assert all(case.passed for case in judge.results()) == each
    verdict = judge.together()
    assert verdict is not None
    assert verdict.passed == together
    [logits] = verdict.judgements
    assert logits.times_pytorch == pytest.approx(times, rel=0.2)
    failure = judge.first_failure()
    if together:
        assert failure is None
    else:
        assert failure is not None
        assert failure[0] == ("case 0" if not each else "all steps together")


def test_a_few_steps_are_judged_one_by_one_alone():
    assert judged(6e-5, 10).together() is None
