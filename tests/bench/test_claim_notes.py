"""What stands above the tables of the measure of the method."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from method import cells
from method.notes import by_group, notes_of, title_of
from method.plan import BASE, QUICK

FOUND = {
    "command": "python scripts/bench/claims.py",
    "machine": {"processor": "This one", "cores": 2},
    "base": "SmolLM2",
    "code": "0123abcd",
    "quick": False,
    "pooled": "",
    "missing": [],
}


def cell(name: str, **fields: object) -> dict[str, object]:
    return {"cell": name, "family": name.partition("-")[0], "code": "0123abcd", "questions_sha256": "0", **fields}


def told(*scores: dict[str, object]) -> str:
    return "\n".join(notes_of({**FOUND, "scores": scores}, QUICK, ()))


def test_cells_that_are_missing_are_told_by_group():
    names = [BASE, "teamlora-k4-ffn-half-s0", "lora-ffn-s1", "lora-ffn-s2"]
    assert by_group(names) == "base, teamlora-k4-ffn-half (seed 0), lora-ffn (seeds 1, 2)"


def test_processors_are_told_where_they_are_not_one_and_the_same():
    here, there = cell("lora-ffn-s1", processor="One"), cell("lora-ffn-s2", processor="Another")
    unsaid = cell("lora-ffn-s0")
    assert "Trained on Another: lora-ffn (seed 2); One: lora-ffn (seed 1)." in told(here, there)
    assert "Trained on One: lora-ffn (seed 1); not known of lora-ffn (seed 0)." in told(here, unsaid)
    assert "not known of lora-ffn (seed 0)" in told(here, {**unsaid, "processor": "unknown"})
    # Nothing is trained of the base.
    assert "Trained on" not in told(here, cell(BASE, processor="Another"))
    assert "Trained on" not in told(here) and "Trained on" not in told(unsaid)


def test_a_cell_that_moved_to_another_machine_names_both(tmp_path, monkeypatch):
    for name, expected in (("One", "One"), ("One", "One"), ("Another", "One, then Another"), ("One", None)):
        monkeypatch.setattr(cells, "processor", lambda name=name: name)
        assert cells._processors(tmp_path) == (expected or "One, then Another")


@pytest.mark.parametrize(
    ("families", "expected"), [(["lora"], "one family"), ([BASE, "lora", "moelora"], "two families"), ([], "four")]
)
def test_the_title_says_of_how_many_families_the_tables_are(families, expected):
    assert title_of([{"family": family} for family in families], False).startswith(f"The measure of {expected}")
