"""A short campaign of bad input with a fixed seed (scripts/fuzz.py runs longer ones), and proof that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = 60


def test_no_bad_input_is_more_than_a_message(tmp_path):
    # A process of its own: its children are forked, which needs a parent without threads.
    command = [sys.executable, ROOT / "scripts" / "fuzz.py", "--cases", str(CASES), "--seed", "10", "--keep", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{CASES} cases of seed 10, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("code", "output", "problem"),
    [
        (70, "", "ended with 70"),
        (1, "", "ended with 1"),
        (-11, "", "ended with -11"),
        (2, "Traceback (most recent call last):\nError: x", "says 'Traceback"),
        (2, "Error: Unexpected KeyError: a fault of teamlora-export.", "says 'fault of"),
        (2, "Error: \x1b[31mred", "control character"),
        (2, "", "has 0 messages"),
        (2, "Error: a\nError: b", "has 2 messages"),
        (2, "Error: " + "x" * 5000, "too long"),
        (0, "Exception ignored in: <_io.TextIOWrapper>", "says 'Exception ignored"),
    ],
)
def test_the_campaign_sees_a_wrong_code_or_message(code, output, problem):
    from fuzz import judge_message
    from fuzz_cases import Case

    (found,) = judge_message(Case("planted", ("inspect", "x")), code, output)
    assert problem in found


def test_the_campaign_sees_every_file_that_is_touched_without_leave(tmp_path):
    from fuzz import judge_files, snapshot
    from fuzz_cases import SECRET, Case

    (tmp_path / "sibling").write_text("before")
    (tmp_path / "gone").write_text("before")
    before = snapshot(tmp_path)
    (tmp_path / "sibling").write_text("after")
    (tmp_path / "gone").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text(SECRET)
    (tmp_path / ".out.7.partial").mkdir()
    after = snapshot(tmp_path)
    case = Case("planted", ("onnx",), "out")
    assert judge_files(case, 0, before, after, tmp_path) == [
        ".out.7.partial was made or removed",
        "gone was made or removed",
        "out/tokenizer.json holds text from outside",
        "sibling was changed",
    ]
    assert "out was made or removed" in judge_files(case, 2, before, after, tmp_path)
    assert not judge_files(
        Case("planted", ("onnx",), "deep/out"), 0, {}, {"deep": "folder", "deep/out": "folder"}, tmp_path
    )
