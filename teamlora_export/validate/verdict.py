"""What a validation finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
class Thresholds:
    """What quantisation may cost.

    Attributes:
        perplexity: of the quantised model, in multiples of what it was before.
        agreement: share of places at which the likeliest token, or label, must be the same. similarity: of vectors.
    """

    perplexity: float = 1.5
    agreement: float = 0.6
    similarity: float = 0.95


def thresholds_of(perplexity: float | None, agreement: float | None) -> Thresholds | None:
    """Those that are given, beside the defaults; None where none is."""
    given = {"perplexity": perplexity, "agreement": agreement}
    kept = {name: value for name, value in given.items() if value is not None}
    return Thresholds(**kept) if kept else None


@dataclass(frozen=True)
class Figures:
    """One model on the held-out text. All but perplexity and `solved` are beside the adapted model as it was.

    Attributes:
        perplexity: of the prose, where text is generated.
        kl: mean divergence of the distribution over tokens or labels, in nats.
        agreement: share of places with the same likeliest token or label.
        similarity: mean cosine of the vectors that a model without logits gives.
        solved: share of tasks that are answered to the letter, greedily.
    """

    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    similarity: float | None = None
    solved: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """A metric of one of lm-eval's tasks, of the three models of `Quality`."""

    task: str
    metric: str
    higher_is_better: bool
    adapted: float
    quantised: float
    base: float


@dataclass(frozen=True)
class Quality:
    """What was measured, and what of it is more than the thresholds allow.

    Attributes:
        adapted: the model as it was. quantised: the bundle. base: the model as it was, without experts.
        from_base: how far the bundle is from `base`: mean divergence, or one less the mean cosine.
        places: tokens or vectors that were compared. tasks: how many were tried. scores: of lm-eval's tasks.
    """

    adapted: Figures
    quantised: Figures
    base: Figures
    from_base: float
    places: int
    tasks: int
    thresholds: Thresholds
    findings: tuple[str, ...] = ()
    scores: tuple[TaskScore, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class Verdict:
    """All that a validation found; it passes where every check does.

    Attributes:
        departures: what is wrong, the most telling first.
        local: the local checks that were made; none where a candidate shows nothing of its inside.
        weights: how many of the file's weights were compared with their source.
        candidate: what ran, in words.
        library: SHA-256 of the native library that ran the op, where one did.
        quality: what quantisation cost, where that was measured. qualities: of a shelf's adapters, by name.
        multiple: of PyTorch's error, that outputs are allowed.
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
    quality: Quality | None = None
    qualities: Mapping[str, Quality] = field(default_factory=dict)
    multiple: float = 10.0
    not_kept: str | None = None

    @property
    def passed(self) -> bool:
        return self.exact and all(quality.passed for quality in self.measured.values())

    @property
    def measured(self) -> dict[str, Quality]:
        """Every quality that was measured; without a name where there is one adapter and no shelf."""
        return dict(self.qualities) if self.quality is None else {"": self.quality}

    @property
    def exact(self) -> bool:
        """The export is right, whatever quantisation cost."""
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
