"""The user's cache: what can be made again, kept so that it need not be."""

from __future__ import annotations

import os
from pathlib import Path

from teamlora_export.errors import ExportError


def cache_folder() -> Path:
    """`TEAMLORA_EXPORT_CACHE`, or `teamlora-export` in the user's cache folder.

    Raises:
        ExportError: neither is given, and the user has no home.
    """
    if given := os.environ.get("TEAMLORA_EXPORT_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teamlora-export"
    except RuntimeError:
        # A user id without a name, as containers have.
        raise ExportError("This user has no home. Set TEAMLORA_EXPORT_CACHE to a folder for the cache.") from None
