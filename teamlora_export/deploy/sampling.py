"""How a text generator's next token is chosen: greedily by default, or drawn.

The order is the one that transformers keeps: the penalties of tokens that are there already, the temperature, the
likeliest `top_k`, of these the likeliest that make up `top_p`, and a draw from what is left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.failure import ModelError
else:
    # Deployed: the files lie beside one another.
    from failure import ModelError

_LARGEST_PENALTY = 100.0


@dataclass(frozen=True)
class Sampling:
    """What a request asks for.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token, whatever `top_k` and `top_p` say.
        top_k: the draw is from so many of the likeliest tokens, and those as likely as the last; 0: from all.
        top_p: the draw is from the fewest of the likeliest tokens that are so likely together; 1: from all.
        repetition_penalty: logits of the prompt's and the answer's tokens are divided by it where they are positive,
            and multiplied elsewhere (Keskar et al. 2019, section 4.1).
        presence_penalty, frequency_penalty: are taken from the logits of the answer's tokens: once, and as often as a
            token was written.
        seed: the same one draws the same tokens; None: another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_k", self.top_k >= 0, "a whole number from 0 on"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0"),
            ("presence_penalty", abs(self.presence_penalty) <= _LARGEST_PENALTY, f"at most {_LARGEST_PENALTY:.0f}"),
            ("frequency_penalty", abs(self.frequency_penalty) <= _LARGEST_PENALTY, f"at most {_LARGEST_PENALTY:.0f}"),
            ("seed", self.seed is None or self.seed >= 0, "a whole number from 0 on"),
        ):
            if not holds:
                raise ModelError(f"{name} {getattr(self, name)}: give {range_}.")


GREEDY = Sampling()


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)
        self._seen = set(prompt)
        self._written: Counter[int] = Counter()

    def choose(self, logits: np.ndarray) -> int:
        """The next token, of logits float [vocabulary]."""
        logits = self._penalised(logits)
        if self._sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            shares = self.shares(logits)
            token = int(self._generator.choice(len(shares), p=shares))
        self._seen.add(token)
        self._written[token] += 1
        return token

    def shares(self, logits: np.ndarray) -> np.ndarray:
        """How likely each token is to be drawn, float64 [vocabulary]."""
        asked = self._sampling
        # The likeliest is 0 before it is divided, so that nothing overflows.
        scaled = (logits.astype(np.float64) - logits.max()) / asked.temperature
        if 0 < asked.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -asked.top_k)[-asked.top_k]] = -np.inf
        shares = np.exp(scaled)
        shares /= shares.sum()
        if asked.top_p < 1:
            # The others together are less likely than what is cut off, so that they need no order.
            likely = np.flatnonzero(shares >= (1 - asked.top_p) / len(shares))
            likely = likely[np.argsort(-shares[likely], kind="stable")]
            kept = likely[: int(np.searchsorted(np.cumsum(shares[likely]), asked.top_p)) + 1]
            cut = np.zeros_like(shares)
            cut[kept] = shares[kept] / shares[kept].sum()
            return cut
        return shares

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        asked = self._sampling
        if (asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty) == (1, 0, 0):
            return logits
        # No penalty that a request can name makes them infinite there.
        logits = logits.astype(np.float64)
        seen, penalty = np.fromiter(self._seen, np.int64), asked.repetition_penalty
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        written, times = (np.fromiter(values, np.int64) for values in (self._written, self._written.values()))
        logits[written] -= asked.presence_penalty + asked.frequency_penalty * times
        return logits


def log_probability(logits: np.ndarray, token: int) -> float:
    """Of a token, as the model itself holds it likely: before any penalty, temperature or cut."""
    logits = logits.astype(np.float64)
    highest = logits.max()
    return float(logits[token] - highest - np.log(np.exp(logits - highest).sum()))
