"""Finding what the plugin is compiled with, and saying what is missing."""

from __future__ import annotations

import shutil
from importlib.metadata import files

import pytest

from teamlora_export.engine.plugin import build_plugin
from teamlora_export.engine.toolchain import find_toolchain, tensorrt_version
from teamlora_export.errors import ExportError


def test_everything_that_is_missing_is_said_at_once_with_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(ExportError) as raised:
        find_toolchain()
    message = str(raised.value)
    assert "3 problems" in message or "4 problems" in message
    for hint in ("set TENSORRT_INCLUDE_DIR", "apt-get install cmake", "apt-get install g++"):
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


def test_the_compiler_of_the_packages_builds_the_plugin_where_there_is_no_cuda_toolkit(monkeypatch, tmp_path):
    nvcc = next(file.locate() for file in files("nvidia-cuda-nvcc") if file.name == "nvcc")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setenv("TEAMLORA_EXPORT_CACHE", str(tmp_path))
    toolchain = find_toolchain()
    assert toolchain.nvcc == nvcc.resolve()
    assert (toolchain.cuda_include / "cuda_fp16.h").is_file()
    library = build_plugin(("90",))
    assert library.path.is_relative_to(tmp_path)
    assert library.architectures == ("90",)
    shutil.rmtree(tmp_path / "plugins")


def test_an_architecture_that_is_none_is_refused():
    with pytest.raises(ExportError, match=r"--arch sm_80: not a compute capability"):
        build_plugin(("sm_80",))
