"""What the native tests run: built once by scripts/build_native.py (scripts/test calls it first)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from teamlora_export.engine.plugin import PluginLibrary, build_plugin

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder of the tests' own programs."""
    command = [sys.executable, ROOT / "scripts" / "build_native.py"]
    return Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def plugin(programs) -> PluginLibrary:
    """The plugin for every GPU."""
    return build_plugin()
