"""The package's wheels, one installed into a folder of its own, away from the checkout: all that it needs is in it, the
native op for ONNX Runtime too where the wheel carries it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from build_wheel import CARRIED_NAME, build_wheel, carry, platform_tag
from conftest import get_model

from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import LIBRARY_NAME, build_library


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> tuple[Path, Path]:
    """Of Python alone, and with the library."""
    wheel = build_wheel(tmp_path_factory.mktemp("package"), "--no-build-isolation")
    return wheel, carry(build_library().path, wheel)


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    """The folder that `pip install --target` has put the wheel with the library into."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", folder, wheels[1]], check=True)
    return folder


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
        "kubernetes": "deployment.yaml",
    }.items():
        run("deploy", target, bundle, "-o", tmp_path / target)
        assert (tmp_path / target / program).is_file()
        assert (tmp_path / target / "README.md").stat().st_size > 500


def test_it_compiles_the_plugin_from_its_own_sources(run, installed, plugin):
    """The very sources that the plugin of these tests was compiled from: its build is found under their hash."""
    assert (installed / "teamlora_export" / "plugins" / "kernels" / "launch.cu").is_file()
    assert run("plugins", "build").strip() == str(plugin.path)


def test_the_wheel_of_python_alone_has_all_but_the_library(wheels):
    alone, carrying = (set(ZipFile(wheel).namelist()) for wheel in wheels)
    assert carrying - alone == {CARRIED_NAME}
    assert not alone - carrying
    assert wheels[0].name.endswith("-py3-none-any.whl")


def test_a_wheel_is_tagged_for_the_systems_that_can_load_its_library(wheels):
    """The oldest C library that has what it is linked to; `readelf` reads that from the ELF file itself."""
    needed = subprocess.run(["readelf", "-V", build_library().path], capture_output=True, text=True, check=True).stdout
    versions = re.findall(r"Name: GLIBC_(\d+)\.(\d+)", needed)
    newest = max((int(major), int(minor)) for major, minor in versions)
    assert wheels[1].name.endswith(f"-py3-none-manylinux_{newest[0]}_{newest[1]}_{platform.machine()}.whl")
    (description,) = (name for name in ZipFile(wheels[1]).namelist() if name.endswith(".dist-info/WHEEL"))
    lines = ZipFile(wheels[1]).read(description).decode().splitlines()
    assert f"Tag: py3-none-{wheels[1].stem.rpartition('-')[2]}" in lines
    assert "Root-Is-Purelib: false" in lines, "it belongs to the folder for one processor's packages"
    assert platform_tag(b"no symbols") == f"linux_{platform.machine()}"


@pytest.fixture
def bare(installed, tmp_path):
    """Runs a command where there is no compiler and nothing was ever built; of another package, if one is given."""
    (tmp_path / "elsewhere").mkdir()

    def bare(*arguments: object, package: Path = installed, more: str = "") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{more}:{package}",
            "PATH": str(tmp_path / "elsewhere"),
            "TEAMLORA_EXPORT_CACHE": str(tmp_path / "cache"),
            "ONNXRUNTIME_INCLUDE_DIR": str(tmp_path / "elsewhere"),
        }
        command = [sys.executable, "-m", "teamlora_export.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=environment)

    return bare


def test_the_carried_library_runs_where_there_is_no_compiler(bare, installed, make_bundle, tmp_path):
    bundle = make_bundle("llama")
    carried = installed / CARRIED_NAME
    done = bare("generate", bundle.folder, "a", "--tokens", 2, "--library", "auto")
    assert done.returncode == 0, done.stderr
    assert f"Native op: taken from {carried}" in done.stderr.replace("\n", "")
    done = bare("deploy", "python", bundle.folder, "-o", tmp_path / "out", "--library", "auto")
    assert done.returncode == 0, done.stderr
    deployed = tmp_path / "out" / LIBRARY_NAME
    assert deployed.read_bytes() == carried.read_bytes() == build_library().path.read_bytes()
    program = """
import runner
from pathlib import Path
write, library = runner._write, Path("libteamlora_onnxruntime.so").resolve()
def look_and_write(text):
    print(str(library) in Path("/proc/self/maps").read_text())
    write(text)
runner._write = look_and_write
runner.main(["--ids", "5", "6", "7", "--tokens", "8"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True)
    answer = " ".join(map(str, Model(bundle.folder).generate([[5, 6, 7]], 8)[0]))
    assert done.stdout.splitlines() == ["True", answer], done.stderr
    with deployed.open("ab") as file:
        file.write(b"changed")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 2
    assert LIBRARY_NAME in done.stderr


def test_a_carried_library_that_does_not_fit_is_refused_in_a_sentence_or_built(bare, run, installed, tmp_path):
    def refused(package: Path, more: str = "") -> str:
        done = bare("plugins", "build", "--onnxruntime", package=package, more=more)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    other = tmp_path / "other"
    shutil.copytree(installed, other)
    with (other / "teamlora_export" / "plugins" / "op.h").open("a") as file:
        file.write("// changed\n")
    assert "was built from other sources" in refused(other)
    old = tmp_path / "old" / "onnxruntime-1.20.1.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime\nVersion: 1.20.1\n")
    assert "or newer, 1.20 is installed" in refused(installed, str(old.parent))
    carried = installed / CARRIED_NAME
    content = carried.read_bytes()
    try:
        carried.write_bytes(content[:18] + (243).to_bytes(2, "little") + content[20:])
        assert "is built for another processor" in refused(installed)
        # With what this machine has, it is built here.
        assert run("plugins", "build", "--onnxruntime").strip() == str(build_library().path)
        carried.unlink()
        assert "The native op cannot be built here; missing" in bare("plugins", "build", "--onnxruntime").stderr
    finally:
        carried.write_bytes(content)
