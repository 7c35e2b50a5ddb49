"""The versions of transformers that work, said once."""

from __future__ import annotations

import tomllib

import pytest
from conftest import ROOT

from teamlora_export.errors import ExportError
from teamlora_export.model.versions import OLDEST, TESTED, TOO_NEW, require_transformers


@pytest.mark.parametrize("version", ["4.57.1", "5.22.2", "6.0.0", "6.0.0rc1", "nonsense"])
def test_a_transformers_that_does_not_work_is_refused_with_the_way_out(version):
    with pytest.raises(ExportError, match=r"is installed, which does not work; .*pip install 'transformers>="):
        require_transformers(version)


@pytest.mark.parametrize("version", [*TESTED, "5.23.1.dev0"])
def test_a_tested_transformers_is_taken(version):
    require_transformers(version)


def test_the_package_asks_for_the_range_that_is_checked_and_pins_a_tested_version():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}" in dependencies
    pins = (ROOT / "constraints.txt").read_text().split()
    assert any(f"transformers=={version}" in pins for version in TESTED)
