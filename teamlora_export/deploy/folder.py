"""The folder that every target starts from: the model's own files, with their hashes, and nothing of this machine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from teamlora_export import __version__
from teamlora_export.adapter.files import sha256_of
from teamlora_export.bundle import COMPANIONS, DATA_NAME, MODEL_NAME, Bundle, check_files, require_space, staged
from teamlora_export.errors import ExportError

DEPLOY_NAME = "deploy.json"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Deployment:
    """A folder that is being written, before it takes its place."""

    folder: Path
    bundle: Bundle
    target: str

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@contextmanager
def deployment(bundle: Bundle, out: Path, target: str) -> Iterator[Deployment]:
    """A folder with the files of `bundle` in it, to add a target's own to; it becomes `out` when the block ends.

    `deploy.json` is written last: the hash of every file, and what they are, without paths.

    Raises:
        ExportError: the bundle's files are not those that were exported, or `out` is something else or has no room.
    """
    check_files(bundle)
    with staged(out, DEPLOY_NAME) as staging:
        require_space(staging, bundle.model.stat().st_size + bundle.data.stat().st_size)
        for name in (MODEL_NAME, DATA_NAME, *COMPANIONS):
            if (bundle.folder / name).is_file():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.folder / name, staging / name)
        made = Deployment(staging, bundle, target)
        yield made
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        made.write(DEPLOY_NAME, json.dumps(_describe(made, files), indent=2) + "\n")


def _describe(made: Deployment, files: list[Path]) -> dict[str, object]:
    manifest = made.bundle.manifest
    return {
        "format_version": 1,
        "target": made.target,
        "tool": f"teamlora-export {__version__}",
        "task": manifest.task,
        "dtype": manifest.dtype,
        "op": dict(manifest.op),
        "base_sha256": dict(manifest.base["sha256"]),
        "adapter_sha256": manifest.adapter["sha256"],
        "inputs": [dataclasses.asdict(port) for port in manifest.inputs],
        "outputs": [dataclasses.asdict(port) for port in manifest.outputs],
        "files": {path.relative_to(made.folder).as_posix(): sha256_of(path) for path in files},
    }


def require_cpu_dtype(bundle: Bundle, target: str) -> None:
    """Refuse what a CPU's ONNX Runtime has no kernels for."""
    if bundle.manifest.dtype == "bf16":
        raise ExportError(
            f"{bundle.folder}: is in bfloat16, which ONNX Runtime runs on a GPU only, and `deploy {target}` writes for "
            "a CPU. Export it with --dtype fp32 or fp16."
        )
