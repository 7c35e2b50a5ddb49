"""The verdict on an engine that takes the adapters of a shelf, where the engine is its graph in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from engine_stand_in import (
    EngineGraph,
    Fault,
    StaleSlots,
    clip_to_first,
    exchange_rows,
    off_by_one,
    stand_in_for_polygraphy,
    write_stand_in,
)
from faults import judged
from shelves import SHELF

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.engine.facts import EngineFacts, read_facts, write_facts
from teamlora_export.errors import ExportError
from teamlora_export.inspect import inspect_path
from teamlora_export.shelf import replace_adapter
from teamlora_export.validate.cases import make_cases
from teamlora_export.validate.metrics import ErrorStats
from teamlora_export.validate.shelf import mixed_batches
from teamlora_export.validate.verdict import CaseResult, Judgement, Verdict

SHAPES = "1x1,2x16,4x64"


@pytest.fixture
def open_engine(make_shelf, tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    """A bundle of its own with an engine named tiny, which has a fault."""

    def make(fault: Fault | None = None, cache: str = "in-place", shapes: str = SHAPES) -> Bundle:
        shutil.copytree(make_shelf(cache=cache).folder, tmp_path / "bundle")
        bundle = read_bundle(tmp_path / "bundle")
        _, facts = write_stand_in(bundle, shapes)
        stand_in_for_polygraphy(EngineGraph(bundle, facts.profiles, fault), monkeypatch)
        return bundle

    return make


def facts_of(bundle: Bundle) -> EngineFacts:
    return read_facts(bundle.folder / "engines" / "tiny.engine")


@pytest.mark.parametrize(("cache", "only"), [("in-place", ["lora", "small"]), ("growing", ["small"])])
def test_an_engine_passes_with_each_adapter_and_in_batches_of_several(cache, only, open_engine):
    bundle = open_engine(cache=cache)
    verdict = judged(bundle, engine_name="tiny", only=only)
    assert verdict.passed, [*verdict.departures, *(case for case in verdict.cases if not case.passed)]
    names = [case.name for case in verdict.cases]
    assert all(sum(name.startswith(f"{each}: ") for name in names) >= 4 for each in only)
    assert names[-1] == f"rows of {', '.join([only[0], 'none', *only[1:], only[0]])}"
    assert verdict.candidate == "TensorRT-RTX (tiny.engine)"
    facts = facts_of(bundle)
    assert facts.validation is None, "the others were not judged"
    assert set(facts.adapter_validations) == set(only)
    rows = dict(inspect_path(bundle.folder / "engines" / "tiny.engine").rows)
    assert rows["adapter small"].startswith("passed")
    assert read_bundle(bundle.folder).manifest.validation is None, "the graph was not judged"


def test_a_verdict_on_an_engine_is_of_the_adapters_that_were_judged(open_engine, shelf_adapters, monkeypatch):
    bundle = open_engine()
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(bundle))
    monkeypatch.setattr("teamlora_export.validate.run.judge_mixed", lambda *_: judged_before(bundle))
    judged(bundle, engine_name="tiny", only=["lora", "small"])
    # The engine is still one of the bundle, and nothing is known of it with another adapter.
    replace_adapter(bundle.folder, "small", shelf_adapters["moe"])
    judged(read_bundle(bundle.folder), engine_name="tiny", only=["team"])
    facts = facts_of(bundle)
    assert (facts.validation, set(facts.adapter_validations)) == (None, {"lora", "team"})
    judged(read_bundle(bundle.folder), engine_name="tiny")
    assert facts_of(bundle).validation["passed"]
    assert set(facts_of(bundle).adapter_validations) == set(SHELF)


def judged_before(bundle: Bundle) -> Verdict:
    """Stands for what is judged elsewhere."""
    nothing = ErrorStats(0.0, 0.0, 1.0)
    return Verdict(bundle.manifest.dtype, (CaseResult("before", (Judgement("logits", nothing, nothing, 1.0),)),))


@pytest.mark.parametrize(
    ("fault", "only"),
    [
        *((fault, ["lora", "small"]) for fault in (off_by_one(3), clip_to_first, exchange_rows)),
        # They make room for one another.
        (StaleSlots(), ["team", "small", "lora", "hydra"]),
    ],
    ids=["off by one", "clipped", "rows", "stale"],
)
def test_faults_of_an_engine_show_in_batches_of_several(fault, only, open_engine, monkeypatch):
    bundle = open_engine(fault)
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(bundle))
    verdict = judged(bundle, engine_name="tiny", only=only)
    assert not verdict.passed
    assert {departure.check for departure in verdict.departures} == {"rows"}
    assert facts_of(bundle).validation["passed"] is False


@pytest.mark.parametrize(
    ("fault", "only"),
    [(off_by_one(3), ["small"]), (clip_to_first, ["small"]), (StaleSlots(), ["lora", "team", "small"])],
    ids=["off by one", "clipped", "stale"],
)
def test_faults_of_an_engine_show_with_one_adapter_alone(fault, only, open_engine, monkeypatch):
    """It is copied into another slot for each case, and no other slot holds a number."""
    bundle = open_engine(fault)
    monkeypatch.setattr("teamlora_export.validate.run.make_cases", lambda *of, **_: make_cases(*of, brief=True))
    monkeypatch.setattr("teamlora_export.validate.run._Inside.judge", lambda *_: None)
    monkeypatch.setattr("teamlora_export.validate.run._Inside.follow", lambda *_: None)
    monkeypatch.setattr("teamlora_export.validate.run.judge_mixed", lambda *_: judged_before(bundle))
    verdict = judged(bundle, engine_name="tiny", only=only)
    assert not verdict.passed
    assert {departure.check for departure in verdict.departures} == {"outputs"}
    assert facts_of(bundle).adapter_validations[only[-1]]["validation"]["passed"] is False


def test_batches_have_as_many_rows_as_the_engine_takes():
    names = ["a", "b", "c", "d"]
    assert list(mixed_batches(names, 3, 1, 2)) == [
        *(["a", None], ["b", "c"], ["a"]),
        *(["d", None], ["d"]),
        *(["a", None], ["b", "c"], ["a"]),
    ]
    assert list(mixed_batches(names, 4, 4, 5)) == [["a", None, "b", "c", "d"], ["a", "a", None, "b"]]


def test_an_engine_that_takes_no_batch_of_several_or_is_of_another_bundle_is_refused(open_engine, monkeypatch):
    bundle = open_engine(shapes="1x1,2x4,4x5")
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(bundle))
    with pytest.raises(ExportError, match=r"its profiles take none of the cases\. Build it with wider --shapes"):
        judged(bundle, engine_name="tiny")
    shutil.copy(bundle.folder / "engines" / "tiny.engine", bundle.folder / "engines" / "other.engine")
    facts = dataclasses.replace(
        facts_of(bundle), model_sha256={**facts_of(bundle).model_sha256, "model.onnx": "0" * 64}
    )
    write_facts(facts, bundle.folder / "engines" / "other.engine")
    with pytest.raises(ExportError, match="was not built from"):
        judged(bundle, engine_name="other")
