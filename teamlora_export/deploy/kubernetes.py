"""`deploy kubernetes`: the repository of `deploy triton`, and manifests that run it in a cluster.

triton/             what `deploy triton` writes
files.yaml          the hash of each file of the repository, which every pod compares before its server starts
deployment.yaml     the pods; service.yaml, policies.yaml, scaling.yaml, monitor.yaml  what goes with them
kustomization.yaml  all of these, for `kubectl apply -k`
kserve.yaml         the same pod as an InferenceService, in place of the Deployment and its Service
adapter.yaml        for prometheus-adapter: the metric by which scaling.yaml scales
Dockerfile          the server with the packages that the models import
kubernetes.json     what was written

The repository has a version, which is the hash of its hashes. Volumes and buckets have a folder for each version, and
the ConfigMap is named after it: another adapter, or another shelf of them, is another pod template, which the cluster
rolls out, and pods of the old version that start again meanwhile still find theirs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from teamlora_export import __version__
from teamlora_export.bundle import Bundle
from teamlora_export.deploy.adapter_slots import READERS
from teamlora_export.deploy.folder import DEPLOY_NAME, KUBERNETES_NAME, Description, our_files
from teamlora_export.deploy.render import render
from teamlora_export.deploy.slots import MOST_PADDING
from teamlora_export.deploy.triton import REPOSITORY, default_name, deploy_triton, pip_arguments, serving_extras
from teamlora_export.deploy.triton_options import DEFAULTS, TritonOptions
from teamlora_export.engine.facts import find_engine, read_facts
from teamlora_export.errors import ExportError
from teamlora_export.files import read_record, sha256_of
from teamlora_export.manifest import Sha256
from teamlora_export.ports import Port, window_of
from teamlora_export.shelf import slot_bytes
from teamlora_export.staging import entries, real_path, refuse_inside, staged

TRITON = "triton"
FORMAT_VERSION = 1
SUMS_NAME = "SHA256SUMS"
# The server that `deploy triton` writes for.
SERVER_IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"
# What the Dockerfile makes of it, before it has a place in a registry.
TEXT_IMAGE = "tritonserver-text:26.07-py3"

_ALWAYS = (
    "files.yaml",
    "deployment.yaml",
    "service.yaml",
    "policies.yaml",
    "kustomization.yaml",
    "kserve.yaml",
    "README.md",
)
_MOST_REPLICAS = 10_000
# Of a label of DNS, less what Kubernetes and we put behind it.
_LONGEST_NAME = 40
_MEBIBYTE = 1 << 20
# The server, its Python back end and ONNX Runtime, without a model; with CUDA's libraries, a guess. On a CPU that makes
# some two times of what SmolLM2-135M took in the server 2.51, in fp32 and fp16.
_BASE_BYTES = {"cpu": 3 << 28, "gpu": 4 << 30}
# Rows of a window's buffer beyond it, at most (`SlotModel`).
_PART = 256
# Where a model does not say how long a text may be.
_TOKENS = 2048

_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HOST = r"[a-z0-9][a-z0-9.-]*(?::[0-9]{1,5})?"
_REFERENCE = rf"(?:{_HOST}/)?[a-z0-9][a-z0-9._/-]*"
_IMAGE = re.compile(rf"{_REFERENCE}(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?")
_SOURCES = {
    "pvc": re.compile(rf"pvc://(?P<name>[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?)(?P<path>(?:/{_SEGMENT})*)/?"),
    "s3": re.compile(rf"s3://(?P<name>[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9])(?P<path>(?:/{_SEGMENT})*)/?"),
    "oci": re.compile(rf"oci://(?P<name>{_REFERENCE}@sha256:[0-9a-f]{{64}})(?P<path>)"),
}
_REPLICAS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


@dataclass(frozen=True)
class Written:
    """`kubernetes.json`: the SHA-256 of every file in its folder.

    Attributes:
        files: the repository's model. program: what is for its owner to change.
    """

    tool: str
    files: Mapping[str, Sha256]
    program: Mapping[str, Sha256]
    target: str = "kubernetes"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Source:
    """Where pods find the repository.

    Attributes:
        kind: "pvc", "s3" or "oci".
        name: the claim, the bucket, or the image with its digest.
        path: of the folder in the claim or bucket; empty for an image, which is one repository.
    """

    kind: str
    name: str
    path: str

    def of_version(self, version: str) -> Source:
        """Where a version's repository is."""
        return self if self.kind == "oci" else dataclasses.replace(self, path=f"{self.path}/{version}".lstrip("/"))


def deploy_kubernetes(
    bundle: Bundle,
    out: Path,
    served: TritonOptions = DEFAULTS,
    *,
    source: str | None = None,
    image: str | None = None,
    replicas: str = "2-8",
    cpus: int = 4,
    monitor: bool = True,
) -> Path:
    """Write the repository and its manifests into `out`.

    Args:
        served: what the repository is; its name is also that of what is made in the cluster, as far as DNS allows. Its
            threads are `cpus`; a pod has one copy of it.
        source: where pods find the repository: pvc://CLAIM[/PATH], s3://BUCKET[/PATH], or oci://IMAGE@sha256:DIGEST.
            Default: a claim of the name, with "-models" behind it.
        image: of the server. Default: Triton's own, or, where models import more, the one that the Dockerfile makes.
        replicas: pods, as a number, or as MIN-MAX, between which they are scaled.
        cpus: for each pod, and threads of ONNX Runtime. monitor: add a PodMonitor.

    Raises:
        ExportError: see `deploy_triton`; or one of these is none.
    """
    least, most = _replicas(replicas)
    if image is not None and not _IMAGE.fullmatch(image):
        raise ExportError(f"--image {image}: give the name of an image, like registry.example/triton:26.07.")
    label = dns_label(served.name or default_name(bundle))
    given = _source(source or f"pvc://{label}-models")
    refuse_inside(real_path(out), bundle.folder)
    with staged(out, lambda there: our_files(there, Path(KUBERNETES_NAME), Written), [bundle.folder]) as staging:
        deploy_triton(bundle, staging / TRITON, dataclasses.replace(served, threads=cpus, instances=1))
        repository = read_repository(staging / TRITON / REPOSITORY)
        on_gpu = served.gpu or served.engine is not None
        facts = read_facts(find_engine(bundle, served.engine)) if served.engine is not None else None
        packages = serving_extras(facts, served.gpu) if repository.continuous else ["tokenizers"]
        server = image or (TEXT_IMAGE if repository.imports else SERVER_IMAGE)
        needed = memory_bytes(bundle, repository, on_gpu, served.batch or 8, served.sequences, served.capacity)
        values = {
            "label": label,
            "version": repository.version,
            "sums": repository.sums,
            "sums_name": SUMS_NAME,
            "source": given.of_version(repository.version),
            "server_image": SERVER_IMAGE,
            "text_image": TEXT_IMAGE,
            "image": server,
            "image_name": re.sub(r"(:[^:/@]+)?(@.*)?$", "", server),
            "built": repository.imports,
            "library": served.library,
            # Of Triton's own back end; ours loads it.
            "plugin": None
            if repository.continuous
            else next((path for path in repository.sums if "/plugins/" in path), None),
            "pip": pip_arguments(packages),
            "least": least,
            "most": most,
            "scaled": most > least,
            "monitor": monitor,
            "cpus": cpus,
            "gpu": on_gpu,
            "megabytes": needed // _MEBIBYTE,
            # Of a copy in the pod.
            "storage": math.ceil(repository.bytes * 1.05 / _MEBIBYTE) + 64,
            "continuous": repository.continuous,
            "adapter_sha256": repository.adapter_sha256,
            "shelf": repository.described.shelf,
        }
        for file, wanted in (
            *((file, True) for file in _ALWAYS),
            ("scaling.yaml", most > least),
            ("adapter.yaml", most > least),
            ("monitor.yaml", monitor),
            ("Dockerfile", repository.imports),
        ):
            if wanted:
                (staging / file).write_text(render(f"kubernetes/{file}.j2", bundle, **values), encoding="utf-8")
        record = dataclasses.asdict(_record(staging, repository))
        (staging / KUBERNETES_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out


def dns_label(name: str) -> str:
    """A name as DNS-1035 has labels: small letters, digits and '-', a letter first; short enough for what goes behind
    it."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"model-{label}"
    return label[:_LONGEST_NAME].strip("-")


@dataclass(frozen=True)
class Repository:
    """What `deploy_triton` has written.

    Attributes:
        sums: path of every file in it -> its SHA-256. bytes: of all of them.
        model: paths of the model's own files. described: its `deploy.json`.
    """

    sums: Mapping[str, Sha256]
    bytes: int
    model: frozenset[str]
    described: Description

    @property
    def has_engine(self) -> bool:
        return any(name.endswith(".plan") for name in self.described.files)

    @property
    def version(self) -> str:
        """Of all that is in it, 12 hexadecimal digits."""
        lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(self.sums.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:12]

    @property
    def imports(self) -> bool:
        """Whether some of its models are in Python, and import what the server's image has not."""
        return any(path.endswith("/model.py") for path in self.sums)

    @property
    def adapter_sha256(self) -> Sha256:
        """Of the adapter; where there is a shelf, of the names and hashes of those on it."""
        shelf = self.described.shelf
        if shelf is None:
            return self.described.adapter_sha256
        lines = "".join(f"{adapter['sha256']}  {name}\n" for name, adapter in sorted(shelf["adapters"].items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def continuous(self) -> bool:
        return any(path.endswith("/scheduler.py") for path in self.sums)


def read_repository(folder: Path) -> Repository:
    """The repository in a `folder` that was just written. Its weights are not read again."""
    (described,) = folder.glob(f"*/1/{DEPLOY_NAME}")
    found = read_record(described, Description, "Deploy the model again.", folder)
    inside = described.parent.relative_to(folder)
    model = {(inside / path).as_posix(): digest for path, digest in found.files.items()}
    paths = sorted(entries(folder))
    return Repository(
        sums={path: model.get(path) or sha256_of(folder / path) for path in paths},
        bytes=sum((folder / path).stat().st_size for path in paths),
        model=frozenset({*model, described.relative_to(folder).as_posix()}),
        described=found,
    )


def memory_bytes(
    bundle: Bundle, repository: Repository, gpu: bool, batch: int, sequences: int, capacity: int | None
) -> int:
    """What a pod needs at most, in whole units of 256 MiB: the server, the weights, the slots of adapters, and the
    cache of every text.

    Args:
        batch: texts that are written at a time. sequences: texts at work, where each has its cache as a state.
        capacity: tokens of a text.
    """
    weights = bundle.data.stat().st_size
    manifest, adapter = bundle.manifest, 0
    if manifest.shelf is not None:
        adapter = slot_bytes(manifest.refit, manifest.op.get("adapter_dtype", manifest.dtype))
    if gpu:
        # An engine is read as a whole, and is all but the whole of the model.
        needed = _BASE_BYTES["gpu"] + max(weights, repository.bytes if repository.has_engine else 0)
    else:
        # ONNX Runtime packs some of what it multiplies with again, and 16-bit weights as float32.
        needed = _BASE_BYTES["cpu"] + math.ceil(weights * (1.5 if bundle.manifest.dtype == "fp32" else 3))
        # What becomes longer is there twice for a moment.
        texts = batch + (batch if repository.continuous else sequences)
        needed += texts * cache_bytes(bundle, repository, capacity)
        if bundle.manifest.shelf is not None:
            needed += bundle.manifest.shelf["slots"] * adapter
    # Files that are read into slots are there as a whole.
    needed += READERS * adapter
    unit = 256 * _MEBIBYTE
    return math.ceil(needed / unit) * unit


def cache_bytes(bundle: Bundle, repository: Repository, capacity: int | None) -> int:
    """Of the longest text."""
    tokens = capacity or repository.described.tokens.most or _TOKENS
    kept = [port for port in bundle.manifest.inputs if port.name.startswith("past_key_values.")]
    return sum(_row_bytes(port) * _rows(port, tokens, repository.continuous) for port in kept)


def _row_bytes(port: Port) -> int:
    _, heads, _, size = port.shape
    return int(heads) * int(size) * (4 if port.dtype == "float" else 2)


def _rows(port: Port, tokens: int, continuous: bool) -> int:
    window = window_of(port.shape[2]) if continuous else None
    longest = tokens + (MOST_PADDING if continuous else 0)
    return longest if window is None else min(longest, window - 1 + _PART)


def _replicas(text: str) -> tuple[int, int]:
    match = _REPLICAS.fullmatch(text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most <= _MOST_REPLICAS:
        raise ExportError(f"--replicas {text}: give a number of pods, like 3, or how few and how many, like 2-8.")
    return least, most


def _source(text: str) -> Source:
    kind = text.partition("://")[0]
    match = _SOURCES[kind].fullmatch(text) if kind in _SOURCES else None
    if match is None:
        raise ExportError(
            f"--source {text}: give pvc://CLAIM[/PATH], s3://BUCKET[/PATH] or oci://IMAGE@sha256:DIGEST."
            + (" A tag may mean another image tomorrow; its digest does not." if kind == "oci" else "")
        )
    return Source(kind, match["name"], match["path"].strip("/"))


def _record(staging: Path, repository: Repository) -> Written:
    files = {f"{TRITON}/{REPOSITORY}/{path}": repository.sums[path] for path in repository.model}
    program = {path: sha256_of(staging / path) for path in sorted(entries(staging)) if path not in files}
    return Written(f"teamlora-export {__version__}", files, program)
