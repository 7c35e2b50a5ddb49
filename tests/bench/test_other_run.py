"""What another run found, beside what this one does (`claims.py --with`)."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.append(str(Path(__file__).parent))
sys.path.append(str(BENCH))
import claims as command  # noqa: E402
from method import cells as cells_module  # noqa: E402
from method.other_run import beside, read_other_run  # noqa: E402
from method.rows import Figures, fields_of_exports, fields_of_inference, fields_of_steps  # noqa: E402
from tiny_cells import FEW, TINY  # noqa: E402

from teamlora_export.errors import ExportError  # noqa: E402

pytest_plugins = ["claim_fixtures"]
MACHINE = {"processor": "Another", "cores": 2, "load": 0.5, "versions": {"torch": "1"}}
STEP = {
    "row": "lora",
    "family": "lora",
    "experts": 1,
    "implementation": "published",
    "targets": "ffn",
    "parameters": 7,
    "seconds": [1.0, 2.0],
    "moved": 0.01,
    "machine": MACHINE,
    "code": "0123abcd",
}
TEAM_STEP = {**STEP, "row": "teamlora k=4, packed", "family": "teamlora", "experts": 4, "implementation": "packed"}
TEAM_STEP["seconds"] = [1.5, 2.0]
SHORT = {"batch": 1, "length": 64, "count": 8}
INFERENCE = {
    "row": "our export",
    "family": "lora",
    "experts": 1,
    "targets": "ffn",
    "quantity": "decode",
    "workload": {"batch": 1, "length": 64, "count": 24},
    "seconds": [1.0],
    "ratios": [1.25],
    "machine": MACHINE,
    "code": "0123abcd",
}


@pytest.fixture
def theirs(team) -> dict[str, Any]:
    """The cell of the cache, with another seed and of other code."""
    return {**team, "cell": "teamlora-k4-ffn-s1", "seed": 1, "code": "8aab571b"}


@pytest.fixture
def write(theirs, tmp_path) -> Callable[..., Path]:
    """Figures with that cell alone, but for what is given; their path."""

    def write(**changed: object) -> Path:
        path = tmp_path / "figures.json"
        figures = {"settings": dataclasses.asdict(TINY), "code": "8aab571b", "scores": [theirs]}
        path.write_text(json.dumps({**figures, **changed}))
        return path

    return write


@pytest.fixture
def asked(place, monkeypatch, capsys) -> Callable[[Path], str]:
    """What the command tells, asked for the cell of the cache and another run's figures."""

    def asked(path: Path) -> str:
        words = ("--quick", "--base", place.base, "--cache", place.folder, "--cells", "teamlora-k4-ffn", *FEW)
        monkeypatch.setattr(sys, "argv", ["claims.py", *map(str, words), "--with", str(path)])
        monkeypatch.setattr(command, "_alone", lambda *_: pytest.fail("a cell was given to a process"))
        command.main()
        return capsys.readouterr().out

    return asked


def export(team: dict[str, Any], form: str, size: int) -> dict[str, Any]:
    return {"cell": team["cell"], "form": form, "mean": math.nan, "bytes": size, "same": 99.5, "right": team["right"]}


def test_their_cells_count_where_all_but_the_seed_is_the_same(write, asked):
    """Seed 0 is in the cache, seed 1 in the figures: one verdict of both, and nothing is trained."""
    told = asked(write())
    assert "| TeamLoRA, k=4 | gate, up, down | 8 | 7,248 | 2 |" in told
    assert (
        "From figures.json of code 8aab571b, which does not say of which weights its base was: teamlora-k4-ffn-s1."
        in told
    )
    assert "# A quick look at one family of adapters" in told


def test_their_timings_and_exports_come_along(team, write, asked, place, monkeypatch):
    """With their machine and code; those that this run has itself take the place of theirs, model by model."""
    other = {**INFERENCE, "family": "teamlora", "experts": 4, "ratios": [1.4], "workload": SHORT}
    exports = [export(team, "PyTorch", 0), export(team, "int4", 3_000_000)]
    path = write(steps=[STEP, TEAM_STEP], inference=[INFERENCE, other], exports=exports)
    told = asked(path)
    assert "| LoRA | - | gate, up, down | 7 | 1.50 | 1.00 (1.00 - 1.00) | 1.00 % |" in told
    assert "| TeamLoRA, k=4 | packed | gate, up, down | 7 | 1.75 | 1.25 (1.12 - 1.38) | 1.00 % |" in told
    assert "| LoRA | gate, up, down | decode | 1.25 (1.25 - 1.25) |" in told
    assert "| TeamLoRA, k=4 | gate, up, down | decode | 1.40 (1.40 - 1.40) |" in told
    assert "(1 x 64 tokens, 24 more or 1 x 64 tokens, 8 more)" in told
    assert f"| {team['cell']} | ONNX Runtime, int4 | 3 MB | {team['mean']:.1f} | 0 (the same) | 99.5 % |" in told
    assert told.count("Timed on Another, 2 cores, with torch 1, code 0123abcd; load before each: 0.5.") == 2
    ours = {**other, "over_base": {"median": 1.1, "low": 1.0, "high": 1.5}}
    monkeypatch.setattr(command, "_inference", lambda *_: [ours])
    monkeypatch.setattr(command, "_exports", lambda *_: [{**exports[0], "by_task": {}, "mean": 8.0, "bytes": 0}])
    told = asked(path)
    assert "int4" not in told and f"| {team['cell']} | PyTorch, fp32 | - | 8.0 |" in told
    assert "| LoRA | gate, up, down | decode | 1.25 (1.25 - 1.25) |" in told
    assert "| TeamLoRA, k=4 | gate, up, down | decode | 1.10 (1.00 - 1.50) |" in told and "1.40" not in told


def test_figures_that_cannot_stand_beside_this_runs_are_refused(team, theirs, write, place):
    exports = [export(team, "PyTorch", 0), export(team, "int4", 3)]
    settings = dataclasses.asdict(TINY)
    for changed, refused in (
        ({"settings": {**settings, "steps": 3}}, r"was made with steps 3 \(here 2\)"),
        ({"base_sha256": "0"}, "another base"),
        ({"scores": [{**theirs, "rank": 4}]}, "has rank 4, alpha .* here it has 8"),
        ({"scores": [{**theirs, "seed": 2}]}, "is not what its options say"),
        ({"scores": [{**theirs, "right": {"topic": "01"}}]}, "was asked other questions"),
        ({"scores": [{**theirs, "right": {**team["right"], "topic": "2?"}}]}, "Expected `str` matching regex"),
        ({"scores": [{**theirs, "questions_sha256": "0"}]}, r"-s1 was asked other questions\."),
        ({"scores": [{**theirs, "rows_sha256": "0"}]}, r"-s1 was trained on other rows\."),
        ({"questions_sha256": "0", "rows_sha256": "0"}, "made with other questions; other rows to train on"),
        ({"scores": [{**theirs, "cell": "teamlora-k0-ffn-s1", "experts": 0}]}, "no cell of this grid"),
        ({"scores": [{**theirs, "cell": "teamlora-k4-mlp-s1", "targets": "mlp"}]}, "no cell of this grid"),
        ({"scores": [{**theirs, "versions": [1]}]}, "Expected `object`"),
        ({"scores": []}, "has neither scores nor timings"),
        ({"scores": [theirs, theirs]}, "is there twice"),
        ({"scores": [{"cell": "base"}]}, "missing required field"),
        ({"steps": [{"row": "lora"}]}, "missing required field"),
        ({"steps": [{**STEP, "family": "dora"}]}, "Invalid enum value 'dora'"),
        ({"steps": [STEP, {**TEAM_STEP, "seconds": [1.0]}]}, "or of another number of turns"),
        ({"steps": [TEAM_STEP]}, "LoRA's steps on the same targets are not there"),
        ({"steps": [STEP, {**TEAM_STEP, "experts": 3}]}, "has 3 experts, as no cell of this grid"),
        ({"steps": [STEP, STEP]}, "lora, 1, ffn, published is there twice"),
        ({"steps": [{**STEP, "seconds": []}]}, "Expected `array` of length >= 1"),
        ({"steps": [{**STEP, "seconds": [1.0, 0.0]}]}, "Expected `float` >= 1e-09"),
        ({"steps": [{**STEP, "row": "$\\frac$"}]}, "Expected `str` matching regex"),
        ({"steps": [{**STEP, "code": "0123abcd\n"}]}, "Expected `str` matching regex"),
        ({"steps": [{**STEP, "machine": None}]}, "Expected `object`, got `null`"),
        ({"steps": [{**STEP, "machine": {"processor": "Another"}}]}, "missing required field"),
        ({"inference": [{**INFERENCE, "ratios": [math.nan]}]}, "Expected `float` >= 1e-09"),
        ({"inference": [{**INFERENCE, "ratios": [1e300]}]}, "Expected `float` <= 1000000000"),
        ({"inference": [{**INFERENCE, "openings": 2}]}, "has 1 ratios of 2 openings"),
        ({"inference": [{**INFERENCE, "workload": {}}]}, "missing required field"),
        ({"inference": [{**INFERENCE, "experts": 4}]}, "our export: has 4 experts"),
        ({"inference": [INFERENCE, INFERENCE]}, "lora, 1, ffn, our export, decode is there twice"),
        ({"exports": [{**exports[0], "cell": "lora-ffn-s0"}]}, "lora-ffn-s0 is not what is exported"),
        ({"exports": [{**exports[0], "bytes": 10**400}]}, "Expected `int` <= "),
        ({"exports": exports[1:]}, f"{team['cell']} is exported, and not once scored in PyTorch"),
        ({"exports": [*exports, exports[0]]}, "not once scored in PyTorch"),
        ({"exports": [*exports, exports[1]]}, "-s0, int4 is there twice"),
        ({"exports": [exports[0], {**exports[1], "code": 7}]}, "Expected `str"),
        ({"scores": [{**theirs, "processor": None}]}, "Expected `str"),
        ({"scores": [{**theirs, "versions": {"torch\n# A title": "1"}}]}, "Expected `str` matching regex"),
        ({"scores": [{**theirs, "settings": {**settings, "steps": 3}}]}, "-s1 was trained with other settings"),
        ({"settings": {"rank": 8}}, "its settings do not say batch, data_seed, dtype"),
        ({"exports": [exports[0], {**exports[1], "right": {"topic": "1"}}]}, "int4, was asked other questions"),
    ):
        with pytest.raises(ExportError, match=refused):
            read_other_run(write(**changed), place)


def test_rows_of_committed_figures_are_read_as_they_are():
    found = 0
    for path in BENCH.glob("claims*/figures.json"):
        fields = json.loads(path.read_text())
        figures = msgspec.convert(fields, Figures)
        assert fields_of_steps(figures.steps) == fields["steps"]
        assert fields_of_inference(figures.inference) == fields["inference"]
        assert fields_of_exports(figures.exports) == fields["exports"]
        found += sum(len(fields[part]) for part in ("steps", "inference", "exports"))
    assert found > 100


def test_timings_alone_are_another_runs_as_well(write, asked):
    told = asked(write(scores=[], steps=[STEP]))
    assert "From figures.json of code 8aab571b, which does not say of which weights its base was: steps, where" in told
    assert "| LoRA | - | gate, up, down | 7 | 1.50 | 1.00 (1.00 - 1.00) | 1.00 % |" in told


def test_rows_of_this_run_take_the_place_of_those_that_are_alike():
    theirs = [{"targets": "ffn", "of": 1}, {"targets": "all", "of": 1}, {"targets": "all", "of": 2}]
    ours = [{"targets": "all", "of": 3}]
    assert beside(theirs, ours, ["targets"]) == [theirs[0], *ours]
    assert beside((), ours, ["targets"]) == ours and beside(theirs, (), ["targets"]) == theirs


def test_what_is_read_of_their_cells_is_their_answers_and_this_codes_own_come_first(team, theirs, write, place):
    hashes = {
        "base_sha256": cells_module.hash_of_base(place.base),
        "questions_sha256": theirs["questions_sha256"],
        "rows_sha256": theirs["rows_sha256"],
    }
    known = "From figures.json of code 8aab571b: teamlora-k4-ffn-s1."
    # What tables read is taken from the answers.
    found = read_other_run(write(**hashes, scores=[{**theirs, "mean": math.nan, "by_task": {}}]), place)
    assert (found.scores, found.told) == ([theirs], known)
    unsaid = {name: value for name, value in theirs.items() if not name.endswith("_sha256")}
    assert (
        "not say which questions were asked, which rows were trained on: "
        in read_other_run(write(**hashes, scores=[unsaid]), place).told
    )
    # Of what this code has found itself, that comes first.
    turned = {task: right.translate({48: 49, 49: 48}) for task, right in team["right"].items()}
    found = read_other_run(
        write(**hashes, scores=[{**theirs, "cell": team["cell"], "seed": 0, "right": turned}]), place
    )
    assert found.scores[0]["right"] == team["right"] and found.scores[0]["code"] == team["code"]
    assert found.told == "Of figures.json left out, for results of this code: teamlora-k4-ffn-s0."
