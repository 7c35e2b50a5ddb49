"""Prints a prefix with what the project of `deploy cpp` is built with, as CMAKE_PREFIX_PATH takes it.

Headers come from Debian's packages (unpacked, not installed), shared libraries from the Python packages of this
environment. ONNX Runtime's headers are in Debian 13; a program built with them runs with any later ONNX Runtime. All is
kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from teamlora_export.graph.template import cache_folder

# Package -> the release that has it.
PACKAGES = {"libonnxruntime-dev": "trixie", "nlohmann-json3-dev": "bookworm", "libssl-dev": "bookworm"}
# Module -> its shared library, and the names under which a linker and a loader look for it.
LIBRARIES = {
    "onnxruntime": ("capi/libonnxruntime.so.*", ("libonnxruntime.so", "libonnxruntime.so.1")),
    "onnxruntime_genai": ("libonnxruntime-genai.so", ("libonnxruntime-genai.so",)),
    "tensorrt_rtx_libs": ("libtensorrt_rtx.so.*", ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")),
}


def get_libraries() -> Path:
    """The prefix; made where it is not there yet."""
    sources = {name: _library(module, pattern) for module, (pattern, names) in LIBRARIES.items() for name in names}
    key = hashlib.sha256(repr((PACKAGES, sorted(sources.items()))).encode()).hexdigest()[:16]
    prefix = cache_folder() / "libraries" / key
    if prefix.is_dir():
        return prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=prefix.parent) as folder:
        _unpack(Path(folder) / "apt", Path(folder) / "unpacked")
        made = Path(folder) / "unpacked" / "usr"
        for broken in made.rglob("*.so"):
            # They point to libraries of packages that are not there; static ones are.
            broken.unlink()
        for name, source in sources.items():
            (made / "lib" / name).symlink_to(source)
        os.replace(made, prefix)
    return prefix


def _library(module: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.submodule_search_locations, module
    return next(Path(spec.submodule_search_locations[0]).glob(pattern))


def _unpack(work: Path, target: Path) -> None:
    """Download the packages with apt, whose own lists and packages are left alone, and unpack them."""
    lists, archives = work / "lists", work / "cache"
    for folder in (lists / "partial", archives / "archives" / "partial"):
        folder.mkdir(parents=True)
    mirror = _run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages")
    address = next(line.split()[0] for line in mirror.splitlines() if line.endswith(" bookworm"))
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (work / "sources.list").write_text(
        "".join(f"deb [signed-by={keyring}] {address} {release} main\n" for release in sorted(set(PACKAGES.values())))
    )
    options = (
        *("-o", f"Dir::Etc::sourcelist={work / 'sources.list'}", "-o", "Dir::Etc::sourceparts=-"),
        *("-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}", "-o", "Acquire::Languages=none"),
        *("-o", "APT::Sandbox::User=root"),
    )
    _run("apt-get", *options, "update", cwd=work)
    _run("apt-get", *options, "download", *(f"{name}/{release}" for name, release in PACKAGES.items()), cwd=work)
    for package in work.glob("*.deb"):
        _run("dpkg", "-x", package, target)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    if shutil.which(str(command[0])) is None:
        sys.exit(f"{command[0]} is needed to fetch {', '.join(PACKAGES)}: this script knows Debian alone.")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr or done.stdout}")
    return done.stdout


if __name__ == "__main__":
    print(get_libraries())
