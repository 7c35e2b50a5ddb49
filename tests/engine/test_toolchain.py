"""Finding what the plugin is compiled with, and saying what is missing."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path

import pytest

from teamlora_export.engine import plugin as plugins
from teamlora_export.engine import toolchain
from teamlora_export.engine.gpu import Gpu
from teamlora_export.engine.plugin import build_plugin, find_plugin, plugin_of_engine, read_plugin, sources_sha256
from teamlora_export.engine.runtime import TensorRT
from teamlora_export.engine.toolchain import (
    TENSORRT_HEADER,
    find_tensorrt_include,
    find_toolchain,
    tensorrt_version,
)
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.progress import Reporter


def test_everything_that_is_missing_is_said_at_once_with_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    # It may also lie where it is looked for without being told.
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    with pytest.raises(ExportError) as raised:
        find_toolchain()
    message = str(raised.value)
    assert "4 problems" in message
    for hint in ("nvcc: install", "set TENSORRT_INCLUDE_DIR", "apt-get install cmake", "apt-get install g++"):
        assert hint in message


def test_headers_of_any_version_tell_it(tmp_path):
    header = tmp_path / "NvInferVersion.h"
    header.write_text("#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n")
    assert tensorrt_version(tmp_path) == "10.3.0"
    header.write_text(
        "#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 4\n#define TRT_PATCH_ENTERPRISE 1\n"
        "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n"
    )
    assert tensorrt_version(tmp_path) == "11.4.1"


def headers(folder: Path, version: str) -> Path:
    """A folder that looks like the headers of a version."""
    folder.mkdir()
    (folder / TENSORRT_HEADER).touch()
    names = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (folder / "NvInferVersion.h").write_text("".join(f"#define NV_TENSORRT_{name} {n}\n" for name, n in names))
    return folder


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Makes a version of the `tensorrt` package look installed."""
    monkeypatch.delenv("TENSORRT_INCLUDE_DIR", raising=False)
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(version: str) -> None:
        shutil.rmtree(site, ignore_errors=True)
        described = site / f"tensorrt-{version}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n")

    return install


def test_the_headers_are_those_nearest_to_the_installed_tensorrt(install, monkeypatch, tmp_path):
    folders = [headers(tmp_path / v, v) for v in ("11.1.0", "10.3.0", "10.13.3")]
    monkeypatch.setattr(toolchain, "_SYSTEM_INCLUDES", tuple(map(str, folders)))
    monkeypatch.setattr(toolchain, "_HEADERS_PACKAGE", "none")
    assert find_tensorrt_include() == folders[0], "without an installed TensorRT, the system's first"
    for version, chosen in (("11.4.1", 0), ("10.4.0", 1), ("10.14.1.48", 2)):
        install(version)
        assert find_tensorrt_include() == folders[chosen]
    install("12.0.0")
    assert find_tensorrt_include() is None
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(folders[0]))
    assert find_tensorrt_include() == folders[0], "who names headers builds for another machine"


def test_headers_of_another_major_version_are_refused_with_both_versions(install):
    install("11.4.1")
    with pytest.raises(ExportError, match=r"of TensorRT 11, since 11\.4\.1 is installed \(there are those of 10\."):
        find_toolchain()


def test_an_older_compiler_is_asked_for_what_it_knows_and_what_is_left_out_is_said(monkeypatch, tmp_path, capsys):
    """The compiler of the packages, as where there is no CUDA toolkit, behind a script that lists one GPU alone. CMake
    is a stand-in: scripts/build_native.py compiles the plugin itself."""
    packaged = next(file.locate() for file in files("nvidia-cuda-nvcc") if file.name == "nvcc")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f'#!/bin/sh\ntest "$1" = --list-gpu-code && echo sm_90 && exit\nexec {packaged} "$@"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path / "cache"))
    tools = find_toolchain()
    assert tools.nvcc == nvcc
    assert (tools.cuda_include / "cuda_fp16.h").is_file()
    with pytest.raises(ExportError, match=r"--arch 120: CUDA .* does not build for it. It knows 90"):
        build_plugin(("90", "120"))
    commands, run = [], subprocess.run

    def stand_in(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
        if command[0] != str(tools.cmake):
            return run(command, **options)  # type: ignore[call-overload]
        assert options["env"] == tools.environment()
        commands.append(command)
        if "--build" in command:
            says = _SAYS.replace('"80"', '"90"').replace("10.14.1", tools.tensorrt_version)
            compile_library(Path(command[2]) / plugins.LIBRARY_NAME, says.replace('"b"', f'"{sources_sha256()}"'))
        return subprocess.CompletedProcess(command, 0, "", "")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", stand_in)
        library = build_plugin()
    configure, build = commands
    assert f"-DCMAKE_CUDA_COMPILER={nvcc}" in configure
    assert [option for option in configure if "ARCHITECTURES" in option] == ["-DCMAKE_CUDA_ARCHITECTURES=90"]
    assert f"-DTENSORRT_INCLUDE_DIR={tools.tensorrt_include}" in configure
    assert f"-DTEAMLORA_BUILD_ID={sources_sha256()}" in configure
    assert build[-1] == "teamlora_tensorrt"
    assert library.path.is_relative_to(tmp_path)
    assert library.architectures == ("90",)
    told = capsys.readouterr().err
    assert "without sm_80, sm_86, sm_89, sm_100, sm_120" in told
    assert f"headers of TensorRT {tools.tensorrt_version}" in told
    # Kept, and taken by every command that needs one for this TensorRT and a GPU that it runs on.
    runtime = TensorRT("tensorrt", None, library.tensorrt, Gpu("H100", (9, 0)))
    assert find_plugin(None, runtime, Reporter(quiet=True)) == library
    with pytest.raises(ExportError, match=r"built with the headers of TensorRT .*is not for TensorRT 99\.1"):
        find_plugin(library.path, dataclasses.replace(runtime, version="99.1"), Reporter(quiet=True))
    described = {"sha256": library.sha256, "build": library.build, "tensorrt": library.tensorrt}
    assert plugin_of_engine(Path("a.engine"), described, None) == library
    with pytest.raises(ExportError, match=r"built with the plugin 0000.*not among those in.*--plugin"):
        plugin_of_engine(Path("a.engine"), {**described, "sha256": "0" * 64}, None)


_SAYS = (
    '"op": "teamlora::MixedExpertProjection", "op_version": 2, "build": "b", "cuda": "13.0", "architectures": "80", '
    '"attributes": ["num_experts", "shared_down", "out_splits"], "tensorrt": "10.14.1"'
)


def compile_library(path: Path, says: str = _SAYS) -> Path:
    """A library that is none but says that it is a plugin."""
    text = f"{{{says}}}".replace('"', '\\"')
    source = f'const char* teamlora_plugin_info(void) {{ return "{text}"; }} void getCreators(void) {{}}\n'
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", path]
    subprocess.run(command, input=f"{source}void setLoggerFinder(void) {{}}", text=True, check=True)
    return path


def test_a_kept_plugin_that_cannot_be_loaded_is_built_again(monkeypatch, tmp_path):
    """One for a newer C library, or a damaged one, would otherwise stand in the way of every build, and of engines."""
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plugins, "_compile", lambda folder, *_: compile_library(folder / plugins.LIBRARY_NAME))
    kept = build_plugin(("80",))
    whole = kept.path.read_bytes()
    assert find_plugin(None, TensorRT("tensorrt", None, "10.14.1", None), Reporter(quiet=True)) == kept
    described = {"sha256": kept.sha256, "build": kept.path.parent.name.partition("-")[0], "tensorrt": kept.tensorrt}
    assert plugin_of_engine(Path("a.engine"), described, None) == kept
    kept.path.write_bytes(whole[:4096])
    with pytest.raises(ExportError, match=r"not a plugin library.*\(.+\)\. Build one: teamlora-export plugins build"):
        read_plugin(kept.path)
    damaged = {**described, "sha256": sha256_of(kept.path)}
    with pytest.raises(ExportError, match=r"cannot be loaded on this machine\. Build both again"):
        plugin_of_engine(Path("a.engine"), damaged, None)
    assert build_plugin(("80",)) == kept
    assert kept.path.read_bytes() == whole
    kept.path.write_bytes(whole[:4096])
    found = find_plugin(None, TensorRT("tensorrt", None, "10.14.1", None), Reporter(quiet=True))
    assert found.sha256 == kept.sha256


@pytest.mark.parametrize("says", ['"op": "teamlora::MixedExpertProjection"', _SAYS.replace('["num', '[1], "x": ["num')])
def test_a_library_that_says_half_of_what_it_is_is_refused(says, tmp_path):
    with pytest.raises(ExportError, match=r"not a plugin library.*it does not say what it is"):
        read_plugin(compile_library(tmp_path / "half.so", says))


@pytest.mark.parametrize(
    ("architectures", "gpu", "runs"),
    [
        (("80", "89"), (8, 0), True),
        (("80", "89"), (8, 6), True),  # code of its family, no newer than itself
        (("86", "89"), (8, 0), False),
        (("80", "89"), (9, 0), True),  # what comes after the last is compiled from its PTX
        (("80", "120"), (9, 0), False),
    ],
)
def test_a_plugin_runs_on_the_gpus_that_it_has_code_for(architectures, gpu, runs, plugin):
    assert dataclasses.replace(plugin, architectures=architectures).runs_on(Gpu("", gpu)) == runs


def test_an_architecture_that_is_none_is_refused():
    with pytest.raises(ExportError, match=r"--arch sm_80: not a compute capability"):
        build_plugin(("sm_80",))
