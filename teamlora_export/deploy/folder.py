"""The folder that every target starts from: the model's own files, with their hashes, and nothing of this machine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from teamlora_export import __version__
from teamlora_export.bundle import COMPANIONS, DATA_NAME, MODEL_NAME, Bundle, Port, check_files, require_space, staged
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of

DEPLOY_NAME = "deploy.json"
# Fields of configurations that transformers fills with a path or a secret of the machine.
_ORIGIN = {"_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "auth_token", "use_auth_token", "token"}
_FLOATS = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Deployment:
    """A folder that is being written, before it takes its place.

    Attributes:
        folder: all of it. model: where the model's own files are.
        files: names of the model's files, below `model`. program: names of the others, below `folder`.
        differs: fields of `deploy.json` in which the model is not what its bundle is.
    """

    folder: Path
    model: Path
    bundle: Bundle
    target: str
    files: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)
    differs: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, source: Path | str) -> None:
        """A file that belongs to the model: a copy of a path, or a text."""
        _write(self.model / name, source)
        self.files.append(name)

    def write(self, name: str, source: Path | str | bytes) -> None:
        """A file of the program around it."""
        _write(self.folder / name, source)
        self.program.append(name)


def _write(path: Path, source: Path | str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        shutil.copyfile(source, path)
    else:
        path.write_bytes(source.encode() if isinstance(source, str) else source)


@contextmanager
def deployment(bundle: Bundle, out: Path, target: str, inside: str = ".", graph: bool = True) -> Iterator[Deployment]:
    """A folder with the bundle's files in its folder `inside`, to add a target's own to.

    It becomes `out` when the block ends.

    `deploy.json`, beside the model, is written last: what the model is and the hash of every file, without paths.
    "files" are the model's, which runners check; "program" is what is around it, for its owner to change.

    Args:
        graph: with model.onnx and its weights.

    Raises:
        ExportError: the bundle's files are not those that were exported, or `out` is something else, holds somebody's
            work, or has no room.
    """
    check_files(bundle)
    described = Path(inside) / DEPLOY_NAME
    _refuse_work(out, described)
    with staged(out, described.as_posix()) as staging:
        made = Deployment(staging, staging / inside, bundle, target)
        if graph:
            require_space(staging, bundle.model.stat().st_size + bundle.data.stat().st_size)
        for name in (*((MODEL_NAME, DATA_NAME) if graph else ()), *COMPANIONS):
            if (bundle.folder / name).is_file():
                made.add(name, _without_origin(bundle.folder / name))
        yield made
        _write(staging / described, json.dumps(_describe(made), indent=2) + "\n")


def _without_origin(path: Path) -> Path | str:
    """A configuration without what tells where, or with which token, its model was loaded; another file as it is."""
    if path.name not in ("config.json", "generation_config.json", "tokenizer_config.json"):
        return path
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in fields.items() if name not in _ORIGIN}
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{path}: cannot be read ({error}). Export the model again.") from None
    return path if kept == fields else json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def port_in(port: Port, dtype: str | None) -> Port:
    """The port as an engine in `dtype` ("fp32", "fp16", "bf16") has it; None: as the graph has it."""
    return port if dtype is None or port.dtype == "int64" else dataclasses.replace(port, dtype=_FLOATS[dtype])


def _describe(made: Deployment) -> dict[str, object]:
    manifest = made.bundle.manifest
    dtype = made.differs.get("dtype")
    return {
        "format_version": 1,
        "target": made.target,
        "tool": f"teamlora-export {__version__}",
        "task": manifest.task,
        "dtype": dtype or manifest.dtype,
        "op": dict(manifest.op),
        "base_sha256": dict(manifest.base["sha256"]),
        "adapter_sha256": made.differs.get("adapter_sha256", manifest.adapter["sha256"]),
        "inputs": [dataclasses.asdict(port_in(port, dtype)) for port in manifest.inputs],
        "outputs": [dataclasses.asdict(port_in(port, dtype)) for port in manifest.outputs],
        "files": {name: sha256_of(made.model / name) for name in sorted(made.files)},
        "program": {name: sha256_of(made.folder / name) for name in sorted(made.program)},
    }


def _refuse_work(out: Path, described: Path) -> None:
    """Refuse to replace a deployment whose program somebody has changed or added to."""
    if not (out / described).is_file():
        return
    try:
        fields = json.loads((out / described).read_text(encoding="utf-8"))
        program, model = dict(fields["program"]), {(described.parent / name).as_posix() for name in fields["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{out / described}: cannot be read ({error!r}). Choose another -o.") from None
    known = {*program, *model, described.as_posix()}
    work = [name for name, digest in program.items() if (out / name).is_file() and sha256_of(out / name) != digest]
    for path in out.rglob("*"):
        relative = path.relative_to(out)
        if path.is_file() and relative.as_posix() not in known and not _is_built(relative):
            work.append(relative.as_posix())
    if work:
        raise ExportError(
            f"{out / work[0]}: is not as it was written, and would be lost. Choose another -o, or remove {out}."
        )


def _is_built(path: Path) -> bool:
    """What following a README leaves behind: a build, libraries, an environment, compiled Python."""
    return any(part in ("__pycache__", "libraries") or part.startswith((".", "build")) for part in path.parts[:-1])


def require_cpu_dtype(bundle: Bundle, target: str) -> None:
    """Refuse what a CPU's ONNX Runtime has no kernels for."""
    if bundle.manifest.dtype == "bf16":
        raise ExportError(
            f"{bundle.folder}: is in bfloat16, which ONNX Runtime runs on a GPU only, and `deploy {target}` writes for "
            "a CPU. Export it with --dtype fp32 or fp16."
        )
