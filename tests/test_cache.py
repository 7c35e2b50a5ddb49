"""Where the cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from teamlora_export.cache import cache_folder
from teamlora_export.errors import ExportError


def test_a_user_without_a_home_names_a_folder(tmp_path, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("TEAMLORA_EXPORT_CACHE")
    with pytest.raises(ExportError, match="Set TEAMLORA_EXPORT_CACHE"):
        cache_folder()
