"""Fixtures of tests that change a shelf of adapters, for their `pytest_plugins`."""

from __future__ import annotations

import shutil

import pytest

from teamlora_export.bundle import Bundle, read_bundle


@pytest.fixture
def bundle(make_shelf, tmp_path) -> Bundle:
    """One of its own."""
    shutil.copytree(make_shelf().folder, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")
