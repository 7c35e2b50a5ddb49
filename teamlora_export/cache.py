"""The user's cache: what can be made again, kept so that it need not be."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`TEAMLORA_EXPORT_CACHE`, or `teamlora-export` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teamlora-export"
    return Path(os.environ.get("TEAMLORA_EXPORT_CACHE") or default)
