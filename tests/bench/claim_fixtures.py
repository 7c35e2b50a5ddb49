"""Fixtures of tests of the measure of the method, for their `pytest_plugins`: others need not load what it is of."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from workers import made_once

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from method.cells import Place
from tiny_cells import TINY, save_base, train_team


@pytest.fixture(scope="session")
def base(run_folder) -> Path:
    """A tiny Llama that takes the longest prompts; one for all workers, which nobody changes."""
    return made_once(run_folder, "claims_base", save_base)


@pytest.fixture
def place(base, tmp_path_factory) -> Place:
    """Where nothing is kept yet; each test has its own."""
    return Place(base, TINY, tmp_path_factory.mktemp("claims"))


@pytest.fixture
def team(place, base, run_folder) -> dict[str, Any]:
    """What `run_cell` told of `TEAM`, which is trained once in a run of all workers; `place` has it then."""
    trained = made_once(run_folder, "claims_team", partial(train_team, base))
    shutil.copytree(trained / "cache", place.folder, dirs_exist_ok=True)
    return json.loads((trained / "told.json").read_text())
