"""Traced graphs, kept: the next adapter of the same shapes on the same base needs no tracing, and no torch.

A graph depends on the base's configuration, the task, the dtype, the adapter's shapes and the versions of the
libraries that traced it, and on no weight. A template is kept in the user's cache under a hash of exactly these: the
graph with its recipes, and what is needed to check another adapter and to read the base's weights. A damaged entry is
thrown away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from teamlora_export import __version__
from teamlora_export.adapter import AdapterSpec, BaseSignature, LinearShape
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.graph.weights import Recipe, WeightTensor, bind, recipe_of
from teamlora_export.model.source import BaseSource

LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")
_FORMAT = 1
_GRAPH, _FACTS = "graph.onnx", "template.json"


@dataclass(frozen=True)
class Template:
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


def cache_folder() -> Path:
    """`TEAMLORA_EXPORT_CACHE`, or `teamlora-export` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teamlora-export"
    return Path(os.environ.get("TEAMLORA_EXPORT_CACHE") or default)


def template_key(source: BaseSource, adapter: AdapterSpec, task: str, dtype: str) -> str:
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
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_template(key: str) -> Template | None:
    """The template under `key`, or None. An entry that cannot be trusted is removed."""
    folder = cache_folder() / "templates" / key
    if not folder.is_dir():
        return None
    try:
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if facts["sha256"] != sha256_of(folder / _GRAPH):
            raise ValueError("the graph is not the one that was kept")
        model = ir.load(folder / _GRAPH)
        for name, recipe in facts["recipes"].items():
            value = model.graph.initializers[name]
            tensor = value.const_value
            assert tensor is not None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
            bind(value, Recipe.from_json(recipe))
        return Template(model, _signature(facts["signature"]), facts["aliases"], facts["task"], facts["model_type"])
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def keep_template(key: str, template: Template) -> None:
    """Keep `template` under `key`. A cache that cannot be written is no reason to fail: the export goes on without."""
    folder = cache_folder() / "templates" / key
    graph = template.model.graph
    weights = [value for value in graph.initializers.values() if recipe_of(value) is not None]
    tensors = [value.const_value for value in weights]
    recipes = {value.name: recipe.to_json() for value in weights if (recipe := recipe_of(value))}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            for value, tensor in zip(weights, tensors, strict=True):
                assert isinstance(tensor, WeightTensor)
                # A reference to a file that need not exist; the recipe takes its place when the template is loaded.
                shape, name = ir.Shape(tensor.shape.numpy()), value.name or ""
                value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
            ir.save(template.model, Path(staging) / _GRAPH)
            facts = {
                "sha256": sha256_of(Path(staging) / _GRAPH),
                "recipes": recipes,
                "signature": dataclasses.asdict(template.signature),
                "aliases": template.aliases,
                "task": template.task,
                "model_type": template.model_type,
            }
            (Path(staging) / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
            made = folder.with_name(f"{key}.{os.getpid()}")
            shutil.copytree(staging, made)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
    except OSError:
        pass
    finally:
        for value, tensor in zip(weights, tensors, strict=True):
            value.const_value = tensor


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
    sources = [root / "bundle.py"]
    for folder in ("adapter", "graph", "model"):
        sources += sorted((root / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()
