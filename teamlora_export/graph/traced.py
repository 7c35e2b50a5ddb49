"""Traced graphs, kept: the next adapter of the same shapes on the same base needs no tracing, and no torch.

A graph depends on the base's configuration, the task, the dtype, the adapter's shapes and the versions of the
libraries that traced it, and on no weight. A traced graph is kept in the user's cache under a hash of exactly these, as
one file: the hash of all that follows, a line of JSON with the recipes of the weights and what is needed to check
another adapter and to read the base's weights, and the graph. A damaged entry is thrown away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from teamlora_export import __version__
from teamlora_export.adapter import AdapterSpec, BaseSignature, LinearShape
from teamlora_export.cache import cache_folder
from teamlora_export.errors import ExportError
from teamlora_export.files import read_bytes
from teamlora_export.graph import op
from teamlora_export.graph.weights import Recipe, WeightTensor, bind, recipe_of
from teamlora_export.model.source import BaseSource
from teamlora_export.staging import write_aside

LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_FORMAT = 2
# A graph without weights has a few MB.
_LARGEST = 512 << 20


@dataclass(frozen=True)
class TracedGraph:
    """A graph whose weights are recipes, and what makes it usable for another adapter.

    Attributes:
        model: the rewritten graph.
        signature: of the base, to check an adapter against.
        aliases: the base's tensors, with those that each is tied to.
        task, model_type: as the base's configuration resolved them.
    """

    model: ir.Model
    signature: BaseSignature
    aliases: Mapping[str, list[str]]
    task: str
    model_type: str


def graph_key(source: BaseSource, adapter: AdapterSpec, task: str, dtype: str, in_place: bool) -> str:
    """Hash of all that a graph depends on. `adapter` as it was read, `task` as it was asked for."""
    shapes = {
        path: [sorted(op.weight_shapes(p).items()), p.shared_down, p.num_experts]
        for path, p in adapter.projections.items()
    }
    fields = {
        "format": _FORMAT,
        "tool": __version__,
        "code": _code_sha256(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "base": source.identity(),
        "adapter": shapes,
        "task": task,
        "dtype": dtype,
        "in_place": in_place,
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_graph(key: str) -> TracedGraph | None:
    """The graph under `key`, or None. An entry that cannot be trusted is removed."""
    path = _entry(key)
    try:
        facts, graph = _unpack(read_bytes(path, largest=_LARGEST))
        model = ir.from_proto(onnx.ModelProto.FromString(graph))
        for name, recipe in facts["recipes"].items():
            value = model.graph.initializers[name]
            tensor = value.const_value
            assert tensor is not None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            bind(value, Recipe.from_json(recipe))
        return TracedGraph(model, _signature(facts["signature"]), facts["aliases"], facts["task"], facts["model_type"])
    except FileNotFoundError:
        return None
    except Exception:
        with suppress(OSError):
            path.unlink()
        return None


def keep_graph(key: str, traced: TracedGraph) -> None:
    """Keep `traced` under `key`. A cache that cannot be written, or a graph that is too large to be kept (of more than
    protobuf's 2 GB), is no reason to fail: the export goes on without."""
    weights = [value for value in traced.model.graph.initializers.values() if recipe_of(value) is not None]
    tensors = [value.const_value for value in weights]
    facts = {
        "recipes": {value.name: recipe.to_json() for value in weights if (recipe := recipe_of(value))},
        "signature": dataclasses.asdict(traced.signature),
        "aliases": traced.aliases,
        "task": traced.task,
        "model_type": traced.model_type,
    }
    try:
        for value, tensor in zip(weights, tensors, strict=True):
            assert isinstance(tensor, WeightTensor)
            # A reference to a file that need not exist; the recipe takes its place when the graph is loaded.
            shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
            value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
        with suppress(ExportError, EncodeError, ValueError):
            graph = ir.to_proto(traced.model).SerializeToString()
            write_aside(_entry(key), _pack(facts, graph), result=False)
    finally:
        for value, tensor in zip(weights, tensors, strict=True):
            value.const_value = tensor


def _entry(key: str) -> Path:
    return cache_folder() / "graphs" / key


def _pack(facts: dict[str, object], graph: bytes) -> bytes:
    content = json.dumps(facts).encode() + b"\n" + graph
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def _unpack(entry: bytes) -> tuple[dict[str, Any], bytes]:
    digest, _, content = entry.partition(b"\n")
    if digest.decode() != hashlib.sha256(content).hexdigest():
        raise ValueError("the entry is not the one that was kept")
    facts, _, graph = content.partition(b"\n")
    return json.loads(facts), graph


def _signature(fields: dict[str, object]) -> BaseSignature:
    linears: dict[str, dict[str, int]] = fields["linears"]  # type: ignore[assignment]
    parameters: dict[str, list[int]] = fields["parameters"]  # type: ignore[assignment]
    return BaseSignature(
        name=str(fields["name"]),
        linears={path: LinearShape(**linear) for path, linear in linears.items()},  # type: ignore[arg-type]
        parameters={name: tuple(shape) for name, shape in parameters.items()},
        body_prefix=str(fields["body_prefix"]),
    )


def _code_sha256() -> str:
    """Of this package's own code, so that a changed tracer or pass never meets a graph of the old one."""
    root = Path(__file__).parents[1]
    sources = [root / name for name in ("dtypes.py", "files.py", "ports.py")]
    for folder in ("adapter", "graph", "model"):
        sources += sorted((root / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()
