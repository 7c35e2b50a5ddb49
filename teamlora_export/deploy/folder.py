"""The folder that every target starts from: the model's own files, with their hashes, and nothing of this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol, TypedDict

import onnx_ir as ir

from teamlora_export import __version__
from teamlora_export.attach.interface import grow_window_caches
from teamlora_export.bundle import COMPANIONS, ENGINES_NAME, MODEL_NAME, Bundle, check_files, refuse_shelf
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.files import copy_file, read_json, read_record, sha256_of
from teamlora_export.graph.passes.fix_capacity import FixCapacity
from teamlora_export.graph.passes.last_logits import LOGITS, LastLogits
from teamlora_export.graph.read import read_graph
from teamlora_export.manifest import AdapterInFile, AdapterName, Dtype, Manifest, OpForm, Sha256, Task
from teamlora_export.ports import Port, is_capacity
from teamlora_export.staging import entries, real_path, refuse_inside, require_space, staged
from teamlora_export.tokens import Tokens

LOGITS_FORMS = ("last", "all")
DEPLOY_NAME = "deploy.json"
# Of a folder with manifests, which list every file.
KUBERNETES_NAME = "kubernetes.json"
# 2 is what has a shelf of adapters, which a program that knows none would run the base without.
FORMAT_VERSION, SHELF_FORMAT_VERSION = 1, 2
# Fields of configurations that transformers fills with a path or a secret of the machine.
_ORIGIN = {"_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "auth_token", "use_auth_token", "token"}
TEMPLATES = Path(__file__).parent / "templates"


class DeployedShelf(TypedDict):
    """The adapters that rows can have; `slots`: how many of them are to be in memory at a time."""

    slots: int
    adapters: dict[AdapterName, AdapterInFile]


@dataclass(frozen=True)
class Description:
    """`deploy.json`: what the model is, and the SHA-256 of every file.

    Attributes:
        files: the model's, relative to this file's folder; runners check them.
        program: what is around it, relative to the deployment's folder, for its owner to change.
        graph_sha256: of the bundle's graph, where there is a shelf: adapters of another have other slots.
    """

    target: str
    tool: str
    task: Task
    dtype: Dtype
    op: OpForm
    tokens: Tokens
    base_sha256: Mapping[str, Sha256]
    adapter_sha256: Sha256
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    files: Mapping[str, Sha256]
    program: Mapping[str, Sha256]
    format_version: int = FORMAT_VERSION
    shelf: DeployedShelf | None = None
    graph_sha256: Sha256 | None = None


@dataclass(frozen=True)
class Deployment:
    """A folder that is being written, before it takes its place.

    Attributes:
        folder: all of it. model: where the model's own files are.
        bundle: where they are from; its manifest has the outputs of the graph as it is deployed.
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

    def add(self, name: str, source: Path | str | bytes) -> None:
        """A file that belongs to the model: a copy of a path, a text, or bytes."""
        self._write(self.model / name, source)
        self.files.append(name)

    def write(self, name: str, source: Path | str | bytes) -> None:
        """A file of the program around it."""
        self._write(self.folder / name, source)
        self.program.append(name)

    def _write(self, path: Path, source: Path | str | bytes) -> None:
        if not path.is_relative_to(self.folder) or ".." in path.relative_to(self.folder).parts:
            raise ExportError(f"{path}: is not in the folder that is written.")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            # Out of the bundle's folder no link may lead; a file that was named by itself may be one.
            copy_file(source, path, self.bundle.folder if source.is_relative_to(self.bundle.folder) else None)
        else:
            path.write_bytes(source.encode() if isinstance(source, str) else source)


@contextmanager
def deployment(
    bundle: Bundle,
    out: Path,
    target: str,
    inside: str = ".",
    graph: bool = True,
    logits: str = "last",
    capacity: int | None = None,
    shelf: str | None = None,
) -> Iterator[Deployment]:
    """A folder with the bundle's files in its folder `inside`, to add a target's own to.

    It becomes `out` when the block ends.

    `deploy.json`, beside the model, is written last.

    Args:
        graph: with model.onnx and its weights.
        logits: of which tokens of a prompt the graph of a text generator gives logits: the "last" alone, or "all".
        capacity: of a cache in place, where it is to be a number.
        shelf: how the target's programs have the adapters of a shelf: "slots", in files as the bundle has them, or
            "own", in files that the target adds; None: they know no shelf.

    Raises:
        ExportError: the bundle has a shelf of adapters, and no program here knows one; its files are not those that
            were exported; `logits` is unknown; or `out` is something else, holds somebody's work, or has no room.
    """
    if logits not in LOGITS_FORMS:
        raise ExportError(f"--logits {logits}: unknown. Use {' or '.join(LOGITS_FORMS)}.")
    if shelf is None:
        refuse_shelf(bundle, f"`deploy {target}`")
    check_files(bundle)
    described = Path(inside) / DEPLOY_NAME
    refuse_inside(real_path(out), bundle.folder)
    with staged(
        out,
        lambda there: our_files(there, described, Description),
        [bundle.folder],
        lambda there: held_in(there / inside),
    ) as staging:
        rewritten = _rewritten(bundle, target, logits, capacity) if graph else None
        made = Deployment(staging, staging / inside, bundle if rewritten is None else rewritten.bundle, target)
        if graph:
            require_space(
                staging, sum((bundle.folder / name).stat().st_size for name in (MODEL_NAME, *bundle.data_names))
            )
            made.add(MODEL_NAME, bundle.model if rewritten is None else rewritten.graph)
            for name in bundle.data_names:
                made.add(name, bundle.folder / name)
        in_slots = shelf_of(bundle.manifest) if shelf == "slots" else None
        for adapter in in_slots["adapters"].values() if in_slots is not None else ():
            made.add(adapter["file"], bundle.folder / adapter["file"])
        for name in COMPANIONS:
            if name in bundle.manifest.sha256:
                made.add(name, _without_origin(bundle.folder / name, bundle.folder))
        yield made
        fields = dataclasses.asdict(_describe(made, in_slots))
        (staging / described).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def held_in(model: Path) -> Path:
    """The file in the model's folder of a deployment that those who change its shelf hold (`held_file`): none of them
    writes to it."""
    there = [path for path in (model / MODEL_NAME, model / "model.plan") if path.exists()]
    there += sorted(model.glob(f"{ENGINES_NAME}/*.engine"))
    return there[0] if there else model / MODEL_NAME


@dataclass(frozen=True)
class _Rewritten:
    """A graph for this deployment, and its bundle with the inputs and outputs that it has."""

    graph: bytes
    bundle: Bundle


def _rewritten(bundle: Bundle, target: str, logits: str, capacity: int | None) -> _Rewritten | None:
    """None where the bundle's own graph is to be deployed; that of logits that do not show where to cut them is."""
    if bundle.manifest.task != "text-generation":
        return None
    model, manifest = read_graph(bundle), bundle.manifest
    cut = logits == "last" and LastLogits()(model).modified
    if cut:
        outputs = tuple(
            dataclasses.replace(port, shape=(port.shape[0], 1, *port.shape[2:])) if port.name == LOGITS else port
            for port in manifest.outputs
        )
        manifest = dataclasses.replace(manifest, outputs=outputs)
    if capacity is not None:
        FixCapacity(capacity)(model)
        manifest = _with_capacity(manifest, capacity)
    # The buffers that onnxruntime-genai's own graphs ask for are provided by its generator alone.
    grown = target != "genai" and grow_window_caches(model)
    if not cut and not grown and capacity is None:
        return None
    return _Rewritten(ir.to_proto(model).SerializeToString(), dataclasses.replace(bundle, manifest=manifest))


def _with_capacity(manifest: Manifest, capacity: int) -> Manifest:
    """Ports have the number, and no text is longer."""

    def fixed(ports: Sequence[Port]) -> tuple[Port, ...]:
        return tuple(
            dataclasses.replace(port, shape=tuple(capacity if is_capacity(size) else size for size in port.shape))
            for port in ports
        )

    most = min(manifest.tokens.most or capacity, capacity)
    return dataclasses.replace(
        manifest,
        inputs=fixed(manifest.inputs),
        outputs=fixed(manifest.outputs),
        tokens=dataclasses.replace(manifest.tokens, most=most),
    )


def _without_origin(path: Path, folder: Path) -> Path | str:
    """A configuration without what tells where, or with which token, its model was loaded; another file as it is."""
    if path.name not in ("config.json", "generation_config.json", "tokenizer_config.json"):
        return path
    fields = read_json(path, "Export the model again.", folder)
    kept = {name: value for name, value in fields.items() if name not in _ORIGIN}
    return path if kept == fields else json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def port_in(port: Port, dtype: str | None) -> Port:
    """The port as an engine in `dtype` ("fp32", "fp16", "bf16") has it; None: as the graph has it."""
    return port if dtype is None or port.dtype == "int64" else dataclasses.replace(port, dtype=DTYPES[dtype].onnx)


def _describe(made: Deployment, shelf: DeployedShelf | None) -> Description:
    manifest = made.bundle.manifest
    dtype = made.differs.get("dtype")
    return Description(
        target=made.target,
        tool=f"teamlora-export {__version__}",
        task=manifest.task,
        dtype=dtype or manifest.dtype,
        op=manifest.op,
        tokens=manifest.tokens,
        base_sha256=manifest.base["sha256"],
        adapter_sha256=made.differs.get("adapter_sha256", manifest.adapter["sha256"]),
        inputs=tuple(port_in(port, dtype) for port in manifest.inputs),
        outputs=tuple(port_in(port, dtype) for port in manifest.outputs),
        files={name: sha256_of(made.model / name) for name in sorted(made.files)},
        program={name: sha256_of(made.folder / name) for name in sorted(made.program)},
        format_version=FORMAT_VERSION if shelf is None else SHELF_FORMAT_VERSION,
        shelf=shelf,
        graph_sha256=None if shelf is None else manifest.sha256[MODEL_NAME],
    )


def shelf_of(manifest: Manifest) -> DeployedShelf | None:
    """Without where the adapters came from."""
    if manifest.shelf is None:
        return None
    adapters: dict[str, AdapterInFile] = {
        name: {"file": adapter["file"], "sha256": adapter["sha256"]}
        for name, adapter in manifest.shelf["adapters"].items()
    }
    return {"slots": manifest.shelf["slots"], "adapters": adapters}


class Listed(Protocol):
    """A record of what we wrote into a folder; see `Description`."""

    @property
    def files(self) -> Mapping[str, Sha256]: ...

    @property
    def program(self) -> Mapping[str, Sha256]: ...


def our_files(out: Path, described: Path, kind: type[Listed]) -> set[str]:
    """What a deployment's folder holds that we wrote, whose program nobody has changed since.

    Args:
        described: the record, of class `kind`; its files are relative to its folder, its program to `out`.

    Raises:
        ExportError: there is no such record, or a file of the program was changed.
    """
    refusal = f"{out}: exists and is not a deployment of this kind; it is left as it is. Choose another -o."
    try:
        found = read_record(out / described, kind, "Choose another -o.", out, newest=SHELF_FORMAT_VERSION)
    except FileNotFoundError:
        raise ExportError(refusal) from None
    except ExportError as reason:
        raise ExportError(f"{refusal} ({reason})") from None
    for name, digest in found.program.items():
        if (out / name).is_file() and sha256_of(out / name, out) != digest:
            raise ExportError(
                f"{out / name}: is not as it was written, and would be lost. Choose another -o, or remove {out}."
            )
    ours = {*found.program, *((described.parent / name).as_posix() for name in found.files), described.as_posix()}
    return {*ours, *(name for name in entries(out) if _source_of(name) in ours)}


def _source_of(compiled: str) -> str | None:
    """The program that Python compiled into the file, where it is one of those."""
    path = PurePosixPath(compiled)
    if path.parent.name != "__pycache__" or path.suffix != ".pyc":
        return None
    return (path.parent.parent / f"{path.name.partition('.')[0]}.py").as_posix()


def require_cpu_dtype(bundle: Bundle, target: str) -> None:
    """Refuse what a CPU's ONNX Runtime has no kernels for."""
    if bundle.manifest.dtype == "bf16":
        raise ExportError(
            f"{bundle.folder}: is in bfloat16, which ONNX Runtime runs on a GPU only, and `deploy {target}` writes for "
            "a CPU. Export it with --dtype fp32 or fp16."
        )
