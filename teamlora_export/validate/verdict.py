"""What a validation finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from teamlora_export.validate.metrics import ErrorStats


@dataclass(frozen=True)
class Judgement:
    """An error, what was allowed, and PyTorch's own that this follows from. `name` is an output's or a tap's."""

    name: str
    error: ErrorStats
    pytorch: ErrorStats
    allowed: float

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.error.rms <= self.allowed

    @property
    def severity(self) -> float:
        """The error's share of what was allowed."""
        ratio = self.error.rms / self.allowed if self.allowed > 0 else math.inf if self.error.rms > 0 else 0.0
        return math.inf if math.isnan(ratio) else ratio

    @property
    def times_pytorch(self) -> float:
        return self.error.rms / self.pytorch.rms if self.pytorch.rms > 0 else math.inf if self.error.rms > 0 else 0.0


@dataclass(frozen=True)
class CaseResult:
    """One case. `judgements` has the worst step of each output; token figures are for text generation only."""

    name: str
    judgements: tuple[Judgement, ...]
    greedy_tokens: int = 0
    greedy_equal: int = 0
    greedy_excused: int = 0
    top5: float | None = None
    kl: float | None = None

    @property
    def passed(self) -> bool:
        return all(j.passed for j in self.judgements) and self.greedy_equal + self.greedy_excused == self.greedy_tokens


@dataclass(frozen=True)
class LocalCheck:
    """Every value that can be looked at, each judged on what the candidate itself computed before it.

    Attributes:
        case: the step, and the arithmetic where it is not the candidate's own.
        wide: the arithmetic was float32 whatever the candidate's own is.
    """

    case: str
    wide: bool
    judgements: tuple[Judgement, ...]

    @property
    def worst(self) -> Judgement | None:
        return max(self.judgements, key=lambda j: j.severity, default=None)


@dataclass(frozen=True)
class Departure:
    """Something that is wrong at one place.

    Attributes:
        check: which of the checks says so: "graph", "weights", "modules" or "outputs".
        module: path of the module, or name of the output.
        node: the node of the graph that makes it, or reads the weight.
        reason: what is wrong, and by how much.
    """

    check: str
    module: str
    node: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """All that a validation found; it passes where every check does.

    Attributes:
        departures: what is wrong, the most telling first.
        local: the local checks that were made; none where a candidate shows nothing of its inside.
        weights: how many of the file's weights were compared with their source.
        candidate: what ran, in words.
        library: SHA-256 of the native library that ran the op, where one did.
        not_kept: why the verdict could not be written into the manifest, where it could not.
    """

    dtype: str
    cases: tuple[CaseResult, ...]
    departures: tuple[Departure, ...] = ()
    local: tuple[LocalCheck, ...] = ()
    weights: int = 0
    expert_use: dict[str, list[float]] = field(default_factory=dict)
    candidate: str = "ONNX Runtime"
    library: str | None = None
    not_kept: str | None = None

    @property
    def passed(self) -> bool:
        return not self.departures and all(case.passed for case in self.cases)

    @property
    def departure(self) -> Departure | None:
        return self.departures[0] if self.departures else None

    @property
    def modules(self) -> tuple[Judgement, ...]:
        """Every module in the order in which they finish, in the candidate's own arithmetic where that was judged."""
        checks = [check for check in self.local if not check.wide] or self.local
        return checks[0].judgements if checks else ()

    @property
    def worst(self) -> Judgement:
        """The output that came closest to failing, or failed by most."""
        return max((j for case in self.cases for j in case.judgements), key=lambda j: j.severity)
