"""What quantisation cost: the bundle as it is deployed, on held-out text, beside the adapted model in PyTorch as it was
before, and beside that model without its experts.

Another question than whether the export is right, with another kind of answer: figures, and thresholds that are the
user's. The text is this project's own (`held_out/`): plain prose, and tasks like those that its adapter for SmolLM2
learnt, of those that were kept from it. Models of other tasks than text generation read the prose alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from teamlora_export.adapter import AdapterSpec
from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError, first_line
from teamlora_export.files import LARGEST_TEXT, read_bytes
from teamlora_export.model.base import BaseModel
from teamlora_export.progress import Reporter
from teamlora_export.tokens import longest_input
from teamlora_export.validate.cases import Case, Feeds, first_step
from teamlora_export.validate.lm_eval_tasks import LmEval, Logits, lost, score
from teamlora_export.validate.metrics import log_softmax
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.torch_runner import TorchRunner
from teamlora_export.validate.verdict import Figures, Quality, TaskScore, Thresholds

HELD_OUT = Path(__file__).parent / "held_out"
TOKENIZER = "tokenizer.json"
# Tokens of a paragraph that are read.
_LONGEST = 256
# Tokens of a request of lm-eval, at most.
_LONGEST_REQUEST = 2048
# Rows of logits that are compared at a time: a vocabulary may be wide.
_ROWS = 32
_RESULTS = ("logits", "sentence_embedding", "last_hidden_state")
# Of the tasks that the model solves as it was.
_LEAST_SOLVED = 0.75


def measures_quality(
    bundle: Bundle,
    is_quantised: bool,
    can_measure: bool,
    asked: bool | None,
    thresholds: Thresholds | None,
    reporter: Reporter,
) -> bool:
    """Whether what was lost is measured: as it is `asked`; or, where nothing is said, by what the bundle is.

    Raises:
        ExportError: it is asked for and cannot be measured, or has thresholds and is not wanted.
    """
    if thresholds is not None:
        if asked is False:
            raise ExportError("--no-quality: what is not measured has no threshold. Leave one of the two out.")
        asked = True
    if asked and not can_measure:
        raise ExportError(
            "--quality, and so each of its thresholds: is measured beside a base that is in memory as a whole, and not "
            "on engines. Give --base, or leave it out."
        )
    if asked is not None:
        return asked
    is_rounded = is_quantised or "adapter_dtype" in bundle.manifest.op
    measures = is_rounded and TOKENIZER in bundle.manifest.sha256 and can_measure
    if is_quantised and not measures:
        why = "it has no tokenizer.json" if can_measure else "that takes a base that is in memory as a whole"
        reporter.warn(f"{bundle.folder}: what quantisation cost is not measured, since {why}.")
    return measures


def measure_quality(
    graph: OnnxRunner, base: BaseModel, adapter: AdapterSpec, thresholds: Thresholds, tasks: LmEval | None = None
) -> Quality:
    """Measure a bundle, as it is deployed, against its base and adapter in float32.

    Args:
        tasks: of lm-eval, of a model that generates text, to be scored as well.

    Raises:
        ExportError: the bundle has no tokenizer.json, or cannot be run; or a task cannot.
    """
    bundle = graph.bundle
    pytorch = TorchRunner(base, adapter, torch.float32)
    adapted, quantised, alone, from_base = _Sums(), _Sums(), _Sums(), _Sums()
    for text in _texts(bundle, base):
        feeds = first_step(bundle.manifest.inputs, Case("held out", text.ids, np.ones_like(text.ids))).feeds
        before = _result(pytorch.run(feeds))
        with pytorch.without_experts():
            without = _result(pytorch.run(feeds))
        found = _result(graph.run(feeds))
        is_distribution = "logits" in {port.name for port in bundle.manifest.outputs}
        for sums, rows, beside in (
            (adapted, before, before),
            (quantised, found, before),
            (alone, without, before),
            (from_base, found, without),
        ):
            sums.add(rows, beside, text, is_distribution)
    quality = _judged(adapted.figures(), quantised.figures(), alone.figures(), from_base, thresholds)
    if tasks is None:
        return quality
    scores = _scores(tasks, graph, pytorch, base)
    return replace(quality, scores=scores, findings=(*quality.findings, *lost(scores, _LEAST_SOLVED)))


def _scores(tasks: LmEval, graph: OnnxRunner, pytorch: TorchRunner, base: BaseModel) -> tuple[TaskScore, ...]:
    tokenizer = _tokenizer(graph.bundle)

    def feeds(ids: np.ndarray) -> Feeds:
        return first_step(graph.bundle.manifest.inputs, Case("a task", ids, np.ones_like(ids))).feeds

    def without(ids: np.ndarray) -> np.ndarray:
        with pytorch.without_experts():
            return _result(pytorch.run(feeds(ids)))

    models: dict[str, Logits] = {
        "adapted": lambda ids: _result(pytorch.run(feeds(ids))),
        "quantised": lambda ids: _result(graph.run(feeds(ids))),
        "base": without,
    }
    most = longest_input(base.config.to_dict(), base.folder / "config.json") or _LONGEST_REQUEST
    encode = lambda text: tokenizer.encode(text).ids  # noqa: E731
    return score(tasks, models, encode, tokenizer.decode, min(most, _LONGEST_REQUEST))


@dataclass(frozen=True)
class _Text:
    """Tokens [1, length]; the last `answer` of them are a task's, and none of them where it is prose."""

    ids: np.ndarray
    answer: int = 0


def _tokenizer(bundle: Bundle):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer

    if TOKENIZER not in bundle.manifest.sha256:
        raise ExportError(f"{bundle.folder}: has no {TOKENIZER}, and text cannot be read without. Leave out --quality.")
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(bundle.folder / TOKENIZER, bundle.folder, LARGEST_TEXT))
    except Exception as error:  # the package's own kinds
        raise ExportError(f"{bundle.folder / TOKENIZER}: cannot be read ({first_line(error)}).") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _texts(bundle: Bundle, base: BaseModel) -> Iterator[_Text]:
    tokenizer = _tokenizer(bundle)
    longest = min(_LONGEST, longest_input(base.config.to_dict(), base.folder / "config.json") or _LONGEST)

    def ids(text: str, specials: bool = True) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=specials).ids

    for paragraph in (HELD_OUT / "prose.txt").read_text(encoding="utf-8").split("\n\n"):
        yield _Text(np.array([ids(paragraph.strip())[:longest]]))
    if base.task != "text-generation":
        return
    for task in json.loads((HELD_OUT / "tasks.json").read_text(encoding="utf-8")):
        answer = ids(task["answer"], specials=False)
        whole = ids(task["prompt"]) + answer
        if len(whole) <= longest:
            yield _Text(np.array([whole]), len(answer))


def _result(outputs: Feeds) -> np.ndarray:
    """What the model is asked for, as rows [places, width]."""
    array = next(outputs[name] for name in _RESULTS if name in outputs)
    return array.reshape(-1, array.shape[-1]).astype(np.float32)


@dataclass
class _Sums:
    """Of one model beside another, over texts."""

    surprise: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    solved: list[bool] = field(default_factory=list)

    def add(self, rows: np.ndarray, beside: np.ndarray, text: _Text, is_distribution: bool) -> None:
        """`rows` and `beside` [places, width] are what two models make of a text."""
        if not is_distribution:
            lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(beside, axis=1)
            self.cosine += (np.einsum("ij,ij->i", rows, beside) / np.maximum(lengths, 1e-30)).tolist()
            return
        best = rows.argmax(axis=1)
        self.equal += (best == beside.argmax(axis=1)).tolist()
        # What follows each token; one row alone is a label.
        following = text.ids[0, 1:] if len(rows) == text.ids.shape[1] else text.ids[0, :0]
        for start in range(0, len(rows), _ROWS):
            ours, theirs = (log_softmax(logits[start : start + _ROWS]) for logits in (rows, beside))
            self.divergence += (np.exp(theirs) * (theirs - ours)).sum(axis=1).tolist()
            known = following[start : start + _ROWS]
            if not text.answer:
                self.surprise += (-ours[np.arange(len(known)), known]).tolist()
        if text.answer:
            # Greedy from the prompt gives the answer where each of its tokens is the likeliest after those before it.
            self.solved.append(bool((best[-1 - text.answer : -1] == following[-text.answer :]).all()))

    def figures(self) -> Figures:
        surprise = _mean(self.surprise)
        return Figures(
            math.exp(min(surprise, 700.0)) if surprise is not None else None,
            _mean(self.divergence),
            _mean(self.equal),
            _mean(self.cosine),
            _mean(self.solved),
        )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _judged(adapted: Figures, quantised: Figures, base: Figures, from_base: _Sums, thresholds: Thresholds) -> Quality:
    beside_base = from_base.figures()
    findings = []

    def least(name: str, found: float | None, allowed: float) -> None:
        # Written so that NaN is found.
        if found is not None and not found >= allowed:
            findings.append(f"{name} is {found:.3g}, at least {allowed:.3g} is asked for")

    if adapted.perplexity is not None and quantised.perplexity is not None:
        ratio = quantised.perplexity / adapted.perplexity
        if not ratio <= thresholds.perplexity:
            findings.append(
                f"perplexity is {ratio:.3g} times what it was, at most {thresholds.perplexity:g} is allowed"
            )
    least("agreement on the likeliest", quantised.agreement, thresholds.agreement)
    least("similarity", quantised.similarity, thresholds.similarity)
    if adapted.solved:
        least("the share of tasks solved", quantised.solved, _LEAST_SOLVED * adapted.solved)
    from_adapted, to_base = _distance(quantised), _distance(beside_base)
    if to_base < from_adapted:
        findings.append(
            f"it is nearer to the model without experts ({to_base:.3g}) than to the adapted one ({from_adapted:.3g}): "
            "the adapter is lost, or worth less than quantisation costs"
        )
    places = len(from_base.equal) or len(from_base.cosine)
    return Quality(adapted, quantised, base, to_base, places, len(from_base.solved), thresholds, tuple(findings))


def _distance(figures: Figures) -> float:
    if figures.kl is not None:
        return figures.kl
    return 1.0 - figures.similarity if figures.similarity is not None else 0.0
