"""A wheel of the package, installed into a folder of its own, away from the checkout: all that it needs is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, get_model


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that `pip install --target` has put the wheel into."""
    folder = tmp_path_factory.mktemp("package")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    sources = [name for name in names if name and not name.startswith((b"adapters/", b"tests/"))]
    (folder / "checkout").mkdir()
    subprocess.run(["cp", "-P", "--parents", "-t", folder / "checkout", *sources], cwd=ROOT, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "checkout"]
    subprocess.run([*pip, *build], check=True, stdout=subprocess.PIPE)
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "installed", wheel], check=True)
    return folder / "installed"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a command of the installed package, in an empty folder."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "teamlora_export.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = "import teamlora_export; print(teamlora_export.__file__)"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=elsewhere, env=environment
    )
    assert Path(told.stdout.strip()).is_relative_to(installed), "the checkout would hide what the wheel lacks"
    return run


def test_it_exports_and_deploys_to_every_target(run, make_base, make_adapter, tmp_path):
    base, bundle = tmp_path / "base", tmp_path / "bundle"
    shutil.copytree(make_base("llama").name, base)
    for file in get_model("smollm2").glob("tokenizer*.json"):
        shutil.copy(file, base)
    run("onnx", base, "-a", make_adapter("llama"), "-o", bundle, "--retrace")
    for target, program in {
        "python": "runner.py",
        "genai": "genai_config.json",
        "cpp": "runner/tensorrt_backend.cpp",
        "triton": "client.py",
    }.items():
        run("deploy", target, bundle, "-o", tmp_path / target)
        assert (tmp_path / target / program).is_file()
        assert (tmp_path / target / "README.md").stat().st_size > 500


def test_it_compiles_the_plugin_from_its_own_sources(run, installed, plugin):
    """The very sources that the plugin of these tests was compiled from: its build is found under their hash."""
    assert (installed / "teamlora_export" / "plugins" / "kernels" / "launch.cu").is_file()
    assert run("plugins", "build").strip() == str(plugin.path)
