"""Programs that `deploy cpp` and its tests build, and what they are run on; the fixtures come through conftest.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from workers import made_once

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.cpp import SOURCES, deploy_cpp
from teamlora_export.engine.toolchain import find_toolchain
from teamlora_export.files import sha256_of
from teamlora_export.graph.passes.fix_capacity import FixCapacity
from teamlora_export.graph.passes.fix_slots import FixSlots

AROUND = Path(__file__).parent / "deploy" / "cpp"
sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from get_libraries import get_libraries  # noqa: E402


def build_cpp(source: Path, folder: Path, *options: str, targets: Sequence[str] = ("all",)) -> Path:
    """Build a CMake project on the libraries that deployments are built on; every warning stops it."""
    prefix = f"{get_libraries()};{find_toolchain().cuda_root}"
    configure = ["cmake", "-S", source, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}", "-DTEAMLORA_WERROR=ON", *options]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2", "--target", *targets]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def cpp_programs(run_folder) -> Path:
    """The folder of the programs around the project that `deploy cpp` writes; built once for all that run tests."""
    return made_once(run_folder, "cpp_programs", lambda folder: build_cpp(AROUND, folder, f"-DDEPLOYED={SOURCES}"))


@pytest.fixture(scope="session")
def cpp_project(smollm2, tmp_path_factory) -> Path:
    return deploy_cpp(smollm2, tmp_path_factory.mktemp("cpp") / "smollm2")


@pytest.fixture(scope="session")
def both_caches(make_bundle, tmp_path_factory) -> tuple[Path, Path]:
    """Folders of a model whose cache is in place, and of the same with a growing one."""
    return both_forms("llama", make_bundle, tmp_path_factory.mktemp("llama"))


def run(program: Path, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def generate(program: Path, model: Path, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    return generate_and_tell(program, model, prompts, count)[0]


def generate_and_tell(
    program: Path, model: Path, prompts: Sequence[Sequence[int]], count: int
) -> tuple[list[list[int]], str]:
    """The answers, and what the program said beside them."""
    lines = "".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts)
    done = run(program, "--model", model, "--ids", "--tokens", count, input=lines)
    assert done.returncode == 0, done.stderr
    return [[int(token) for token in line.split()] for line in done.stdout.splitlines()], done.stderr


def launches(told: str) -> int:
    """How many steps of decoding were CUDA graphs, of what a program on the emulated CUDA said."""
    found = re.search(r"graph launches: (\d+)", told)
    assert found is not None, told
    return int(found[1])


def as_engine(model: Path, capacity: int | None = None) -> Path:
    """The same model's folder with its graph as the engine of the emulated TensorRT, which takes slots where the folder
    has a shelf. `capacity`: of a cache in place."""
    (model / "engines").mkdir()
    (model / "model.onnx").rename(model / "engines" / "emulated.engine")
    (model / "model.onnx.data").rename(model / "engines" / "model.onnx.data")
    fields = json.loads((model / "deploy.json").read_text())
    passes: list[ir.passes.InPlacePass] = [] if capacity is None else [FixCapacity(capacity)]
    if fields.get("shelf") is not None:
        passes.append(FixSlots(fields["shelf"]["slots"]))
    if passes:
        fixed = ir.from_proto(onnx.load(model / "engines" / "emulated.engine", load_external_data=False))
        assert all(change(fixed).modified for change in passes)
        onnx.save(ir.to_proto(fixed), model / "engines" / "emulated.engine")
    names = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    fields["files"] = {name: sha256_of(model / name) for name in names if name != "deploy.json"}
    (model / "deploy.json").write_text(json.dumps(fields))
    return model


def endless(bundle: Bundle, folder: Path) -> Path:
    """The model's folder of a deployment that takes 4,096 tokens, and never stops."""
    model = deploy_cpp(bundle, folder, logits="all") / "model"
    fields = json.loads((model / "deploy.json").read_text())
    fields["tokens"] |= {"most": 4096, "stops": []}
    (model / "deploy.json").write_text(json.dumps(fields))
    return model


def both_forms(name: str, make_bundle: Callable[..., Bundle], folder: Path) -> tuple[Path, Path]:
    """`endless` folders of a model whose cache is in place, and of the same with a growing one."""
    both_caches, growing = (endless(make_bundle(name, cache=form), folder / form) for form in ("in-place", "growing"))
    return both_caches, growing
