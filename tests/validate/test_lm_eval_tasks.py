"""A task's score by lm-eval, offline: a small task of the tests' own, of a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from faults import judged

from teamlora_export.bundle import read_bundle
from teamlora_export.errors import ExportError
from teamlora_export.validate import lm_eval_tasks
from teamlora_export.validate.lm_eval_tasks import LmEval, lost
from teamlora_export.validate.verdict import TaskScore, Thresholds

LENIENT = Thresholds(perplexity=10.0, agreement=0.0)
# Token t is most likely followed by t + 1.
SUCCESSOR = np.roll(np.eye(8) * 5.0, 1, axis=1)


def logits(ids: np.ndarray) -> np.ndarray:
    return SUCCESSOR[ids[0]]


def encode(text: str) -> list[int]:
    return [int(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(map(str, ids))


def test_requests_are_answered_by_the_logits() -> None:
    share = 5.0 - math.log(math.exp(5.0) + 7)
    right, greedy = lm_eval_tasks._likelihood(logits, *lm_eval_tasks._split("12", "345", encode), 100)
    assert greedy
    assert right == pytest.approx(3 * share)
    wrong, greedy = lm_eval_tasks._likelihood(logits, *lm_eval_tasks._split("12", "346", encode), 100)
    assert not greedy
    assert wrong == pytest.approx(3 * share - 5.0)
    # Of a request that is too long the end is read; a text that is, in pieces.
    assert lm_eval_tasks._likelihood(logits, [1, 2], [3, 4, 5], 3)[0] == pytest.approx(2 * share)
    for most in (2, 3, 100):
        assert lm_eval_tasks._rolling(logits, [1, 2, 3, 4, 5], most) == pytest.approx(4 * share)
    options = {"until": ["5"], "max_gen_toks": 6}
    assert lm_eval_tasks._generated(logits, encode, decode, 100, "12", options) == "34"
    assert lm_eval_tasks._generated(logits, encode, decode, 100, "12", {"until": [], "max_gen_toks": 4}) == "3456"


def test_a_score_that_is_lost_is_told_where_more_is_better() -> None:
    scores = [
        TaskScore("a", "acc", True, 0.8, 0.5, 0.1),
        TaskScore("b", "acc", True, 0.8, 0.7, 0.1),
        TaskScore("c", "perplexity", False, 20.0, 2.0, 30.0),
        TaskScore("d", "acc", True, 0.8, math.nan, 0.1),
    ]
    assert [finding.partition(":")[0] for finding in lost(scores, 0.75)] == ["a", "d"]


def test_without_the_package_a_sentence_says_how_to_get_it(make_bundle, monkeypatch) -> None:
    bundle, find = make_bundle("llama", weights_form="int4"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "lm_eval" and find(name, *rest)) or None
    )
    with pytest.raises(ExportError, match=r"pip install 'teamlora-export\[lm-eval\]'"):
        judged(bundle, tasks=LmEval(("arc_easy",)))


@pytest.fixture
def own_task(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = [{"text": f"The letter after {a} is", "right": b} for a, b in ("ab", "bc", "cd", "de")]
    (folder / "letters.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "letters.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / "letters.jsonl"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{['b', 'c', 'd', 'e'].index(right)}}}}"
doc_to_choice: ["b", "c", "d", "e"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs pip install lm-eval, some 600 MB with what it needs"
)
def test_a_task_of_ones_own_is_scored_without_a_network(make_bundle, own_task, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    bundle = make_bundle("llama", weights_form="int4")
    verdict = judged(bundle, thresholds=LENIENT, tasks=LmEval(("letters",), own_task))
    (scored,) = verdict.quality.scores
    assert (scored.task, scored.metric, scored.higher_is_better) == ("letters", "acc", True)
    assert all(round(4 * value) / 4 == value for value in (scored.adapted, scored.quantised, scored.base))
    kept = read_bundle(bundle.folder).manifest.validation["quality"]["scores"]
    assert kept["letters, acc"]["quantised"] == scored.quantised
    with pytest.raises(ExportError, match="--lm-eval nonsense"):
        judged(bundle, thresholds=LENIENT, tasks=LmEval(("nonsense",), own_task))
