"""How tokens are drawn, against shares that are computed by hand, and where texts stop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.sampling import Sampler, Sampling, log_probability
from teamlora_export.deploy.words import StoppedText

# Shares 0.4, 0.3, 0.2, 0.1, in an order of their own.
SHARES = np.array([0.2, 0.4, 0.1, 0.3])
LOGITS = np.log(SHARES).astype(np.float32)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), SHARES),
        (Sampling(0.5), SHARES**2 / (SHARES**2).sum()),
        (Sampling(1.0, top_k=2), np.array([0, 4, 0, 3]) / 7),
        (Sampling(1.0, top_k=9), SHARES),
        (Sampling(1.0, top_p=0.65), np.array([0, 4, 0, 3]) / 7),
        (Sampling(1.0, top_p=0.75), np.array([2, 4, 0, 3]) / 9),
        (Sampling(1.0, top_p=0.01), np.array([0, 1, 0, 0])),
        (Sampling(1.0, top_k=3, top_p=0.4), np.array([0, 1, 0, 0])),
        # 4/9 alone is too little for a half of what top_k left.
        (Sampling(1.0, top_k=3, top_p=0.5), np.array([0, 4, 0, 3]) / 7),
        (Sampling(1e-30), np.array([0, 1, 0, 0])),
    ],
)
def test_shares_and_draws_are_those_of_the_temperature_and_the_cuts(sampling, expected):
    sampler = Sampler(sampling, [0])
    assert np.allclose(sampler.shares(LOGITS), expected, atol=1e-6)
    draws = np.bincount(
        [Sampler(Sampling(**{**vars(sampling), "seed": n}), [0]).choose(LOGITS) for n in range(2000)], minlength=4
    )
    assert not draws[expected == 0].any()
    # Five standard deviations.
    assert np.all(np.abs(draws - 2000 * expected) <= 5 * np.sqrt(2000 * expected * (1 - expected)) + 1e-9)


def test_greedy_is_the_default_and_heeds_no_cut():
    assert Sampler(Sampling(), [0]).choose(LOGITS) == Sampler(Sampling(top_k=1, top_p=0.1), [0]).choose(LOGITS) == 1


def test_a_penalty_falls_on_tokens_of_the_prompt_and_of_the_answer():
    logits = np.array([3.0, 2.9, -1.0, 2.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    # 1.5, 2.9, -1, 2; then 1.5, 1.45, -1, 2; then 1.5, 1.45, -1, 1; and on.
    assert [sampler.choose(logits) for _ in range(4)] == [1, 3, 0, 0]
    assert logits.tolist() == pytest.approx([3.0, 2.9, -1.0, 2.0])
    negative = Sampler(Sampling(repetition_penalty=2.0), [0])
    assert negative.choose(np.array([-1.0, -1.5], np.float32)) == 1


def test_presence_and_frequency_fall_on_tokens_of_the_answer_alone():
    logits = np.array([3.0, 2.5, 0.0], np.float32)
    present = Sampler(Sampling(presence_penalty=1.0), [0])
    # 3, 2.5; then 2, 2.5; then 2, 1.5; and on.
    assert [present.choose(logits) for _ in range(4)] == [0, 1, 0, 0]
    frequent = Sampler(Sampling(frequency_penalty=1.0), [0])
    # 3, 2.5; 2, 2.5; 2, 1.5; 1, 1.5; 1, 0.5; 0, 0.5.
    assert [frequent.choose(logits) for _ in range(6)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("penalty", [float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)])
def test_the_largest_and_the_smallest_penalty_leave_something_to_draw(penalty, sign):
    logits = np.array([20.0, 30.0], np.float32) * sign
    # Those that come close to 0 become equal.
    likeliest = {0, 1} if (penalty > 1) == (sign > 0) else {int(logits.argmax())}
    assert Sampler(Sampling(1.0, repetition_penalty=penalty), [0, 1]).choose(logits) in likeliest


def test_what_is_no_way_to_sample_is_refused():
    for name, value in (
        *(("temperature", value) for value in (-1.0, math.inf, math.nan)),
        *(("top_p", value) for value in (0.0, 1.1, math.nan)),
        *(("repetition_penalty", value) for value in (0.0, math.nan, math.inf)),
        *((name, value) for name in ("presence_penalty", "frequency_penalty") for value in (-101.0, math.nan)),
        ("top_k", -1),
        ("seed", -1),
    ):
        with pytest.raises(ModelError, match=f"{name} .*: give"):
            Sampling(**{name: value})


def test_a_log_probability_is_of_the_logits_as_they_are():
    assert log_probability(LOGITS + 800, 3) == pytest.approx(math.log(0.3), abs=1e-4)


def show(pieces: list[str], *stops: str) -> tuple[list[str], bool]:
    """What is shown after each piece, and at the end."""
    text = StoppedText(lambda number: pieces[number], stops)
    shown = []
    for number in range(len(pieces)):
        shown.append(text.add(number))
        if text.stopped:
            break
    return [*shown, text.rest()], text.stopped


def test_text_ends_before_a_stop_string_and_holds_back_no_more_than_its_beginning():
    assert show(["one ", "two"], "END") == (["one ", "two", ""], False)
    assert show(["a E", "N", "D b"], "END") == (["a ", "", "", ""], True)
    assert show(["a E", "N", "d b"], "END") == (["a ", "", "ENd b", ""], False)
    assert show(["a EN"], "END") == (["a ", "EN"], False)
    # What begins within a beginning, and the first of several.
    assert show(["aa", "ab", "!"], "aab") == (["", "a", ""], True)
    assert show(["x; y. z"], ".", ";") == (["x", ""], True)
    assert show(["x"]) == (["x", ""], False)
    for stops in ([""], ["a"] * 17, ["a" * 1025]):
        with pytest.raises(ModelError, match="stop: give 16 strings at most"):
            StoppedText(str, stops)
