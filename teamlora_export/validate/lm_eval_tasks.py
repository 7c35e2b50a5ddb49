"""Scores of lm-eval's tasks, where that package is installed: of a bundle as it is deployed, of the adapted model as it
was, and of that without its experts.

The package reads the tasks, makes the requests and counts; here is what answers them. A model is a function from
tokens [1, n] to logits [n, vocabulary].
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teamlora_export.errors import ExportError, first_line
from teamlora_export.validate.metrics import log_softmax
from teamlora_export.validate.verdict import TaskScore

Logits = Callable[[np.ndarray], np.ndarray]
_MOST_TOKENS = 256
# Of the rows "acc,none" and "acc_stderr,none".
_NO_METRIC = ("alias", "sample_len", "samples", "name")


@dataclass(frozen=True)
class LmEval:
    """What is asked of lm-eval.

    Attributes:
        tasks: by their names.
        folder: of tasks of one's own (lm-eval's YAML files), beside those that come with the package.
        limit: how many documents of each; None: all.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None

    def require(self) -> None:
        """Refuse what cannot be done, before anything slow begins.

        Raises:
            ExportError: the package is not installed, or the folder is not there.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ExportError(
                "--lm-eval: needs lm-eval, which is not installed: pip install 'teamlora-export[lm-eval]'"
            )
        if self.folder is not None and not self.folder.is_dir():
            raise ExportError(f"--lm-eval-tasks {self.folder}: is no folder.")


def score(
    asked: LmEval,
    models: Mapping[str, Logits],
    encode: Callable[[str], list[int]],
    decode: Callable[..., str],
    most: int,
) -> tuple[TaskScore, ...]:
    """The scores of each of `models` in each task and metric.

    Args:
        encode, decode: the tokenizer. most: tokens that a model takes; of longer requests the end is read.

    Raises:
        ExportError: a task is unknown, or its documents cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Mapping[str, Any]] = {}
    for name, logits in models.items():
        try:
            manager = TaskManager(include_path=str(asked.folder) if asked.folder else None)
            found = simple_evaluate(
                _answering(logits, encode, decode, most),
                tasks=list(asked.tasks),
                limit=asked.limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
            )
        except Exception as error:  # the package's own kinds
            raise ExportError(
                f"--lm-eval {' '.join(asked.tasks)}: {type(error).__name__}: {first_line(error)}"
            ) from None
        results[name] = found or {}
    return tuple(_scores(results))


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskScore]:
    first = next(iter(results.values()))
    for task, figures in first["results"].items():
        higher = first.get("higher_is_better", {}).get(task, {})
        for key, value in figures.items():
            metric, _, _filter = key.partition(",")
            if metric in _NO_METRIC or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            by_model = {name: float(each["results"][task][key]) for name, each in results.items()}
            yield TaskScore(task, metric, bool(higher.get(metric, False)), **by_model)


def _answering(logits: Logits, encode: Callable[[str], list[int]], decode: Callable[..., str], most: int) -> Any:
    """lm-eval's idea of a model."""
    from lm_eval.api.model import LM

    class Answering(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            pairs = (_split(request.args[0], request.args[1], encode) for request in requests)
            return [_likelihood(logits, context, continuation, most) for context, continuation in pairs]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [_rolling(logits, encode(request.args[0]), most) for request in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [_generated(logits, encode, decode, most, request.args[0], request.args[1]) for request in requests]

    return Answering()


def _split(context: str, continuation: str, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Tokens of both, cut where the context ends when both are read as one text."""
    whole = encode(context + continuation)
    start = min(max(len(encode(context)), 1), len(whole) - 1)
    return whole[:start], whole[start:]


def _likelihood(logits: Logits, context: list[int], continuation: list[int], most: int) -> tuple[float, bool]:
    """The logarithm of the continuation's probability, and whether it is the likeliest, token by token."""
    ids = [*context, *continuation][-most:]
    known = np.array(continuation[-(len(ids) - 1) :])
    rows = log_softmax(logits(np.array([ids]))[-1 - len(known) : -1])
    return float(rows[np.arange(len(known)), known].sum()), bool((rows.argmax(axis=1) == known).all())


def _rolling(logits: Logits, ids: list[int], most: int) -> float:
    """The logarithm of a text's probability, its first token given; in pieces of `most` tokens that begin anew."""
    total = 0.0
    for start in range(0, len(ids) - 1, most - 1):
        piece = ids[start : start + most]
        if len(piece) > 1:
            total += _likelihood(logits, piece[:1], piece[1:], most)[0]
    return total


def _generated(
    logits: Logits,
    encode: Callable[[str], list[int]],
    decode: Callable[..., str],
    most: int,
    context: str,
    options: Mapping[str, Any],
) -> str:
    """Greedy, up to one of the texts that end an answer."""
    stops = options.get("until") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    count = int(options.get("max_gen_toks", _MOST_TOKENS))
    ids, made = encode(context)[-max(most - count, 1) :], list[int]()
    text = ""
    while len(made) < min(count, most - 1) and not any(stop in text for stop in stops):
        made.append(int(logits(np.array([[*ids, *made][-most:]]))[-1].argmax()))
        text = decode(made)
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def lost(scores: Sequence[TaskScore], least: float) -> Iterator[str]:
    """Scores of which less than the share `least` is left, where more is better."""
    for each in scores:
        if each.higher_is_better and not each.quantised >= least * each.adapted and not math.isnan(each.adapted):
            yield (
                f"{each.task}: {each.metric} is {each.quantised:.3g}, at least {least * each.adapted:.3g} is asked for"
            )
