"""`teamlora-export inspect` and `plugins info`: what an adapter, a bundle, an engine or a library is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from teamlora_export.adapter import AdapterSpec, read_adapter
from teamlora_export.adapter.config import CONFIG_NAME
from teamlora_export.attach.describe import Contents, describe
from teamlora_export.attach.read import GENAI_NAME, Foreign, open_foreign
from teamlora_export.bundle import MODEL_NAME, Bundle, read_bundle
from teamlora_export.cli_output import Description
from teamlora_export.engine.facts import EngineFacts, read_facts
from teamlora_export.engine.onnxruntime_library import OnnxRuntimeLibrary, is_library, library_here, read_library
from teamlora_export.engine.plugin import PluginLibrary, latest_plugin, read_plugin
from teamlora_export.errors import ExportError
from teamlora_export.graph.lifted import Lifted, find_lifted
from teamlora_export.graph.read import read_graph
from teamlora_export.manifest import MANIFEST_NAME, AdapterOrigin, Quantisation
from teamlora_export.ports import Port
from teamlora_export.shelf import slot_megabytes, slot_sizes

_MOST_OPERATORS = 12


def inspect_path(path: Path) -> Description:
    """What the adapter, the bundle or the graph in the folder `path` is, or the engine or graph of that name.

    Raises:
        ExportError: it is neither, or it is damaged.
    """
    if (path / MANIFEST_NAME).is_file():
        bundle = read_bundle(path)
        lifted = find_lifted(read_graph(bundle))
        fields = {**dataclasses.asdict(bundle.manifest), "graph": dataclasses.asdict(lifted)}
        return _describe("bundle", path, _bundle_rows(bundle, lifted), fields)
    if (path / CONFIG_NAME).is_file():
        adapter = read_adapter(path)
        return _describe("adapter", path, _adapter_rows(adapter), _adapter_fields(adapter))
    if path.suffix == ".engine":
        facts = read_facts(path)
        return _describe("engine", path, _engine_rows(facts), dataclasses.asdict(facts))
    if path.suffix == ".onnx" or (path / GENAI_NAME).is_file() or any(path.glob("*.onnx")):
        foreign = open_foreign(path)
        contents = describe(foreign)
        return _describe("graph", foreign.path, _graph_rows(foreign, contents), dataclasses.asdict(contents))
    raise ExportError(
        f"{path}: neither an adapter ({CONFIG_NAME}) nor a bundle ({MANIFEST_NAME}) nor an ONNX graph nor NAME.engine."
    )


def inspect_plugin(path: Path | None, onnxruntime: bool = False) -> Description:
    """What the library at `path` is, a plugin or the native op for ONNX Runtime; or the plugin that was built here.

    Args:
        onnxruntime: it is the native op; without a path the one that commands take, carried or built here.

    Raises:
        ExportError: there is none, or it is none of ours.
    """
    if onnxruntime or (path is not None and is_library(path)):
        native = library_here() if path is None else read_library(path)
        return _describe("native op", native.path, _library_rows(native), dataclasses.asdict(native))
    library = read_plugin(path or latest_plugin())
    return _describe("plugin", library.path, _plugin_rows(library), dataclasses.asdict(library))


def _describe(kind: str, path: Path, rows: Iterable[tuple[str, str]], fields: dict[str, Any]) -> Description:
    return Description(f"{kind.capitalize()} {path}", tuple(rows), {"kind": kind, **fields, "path": str(path)})


def _adapter_fields(adapter: AdapterSpec) -> dict[str, Any]:
    return {
        "family": adapter.family,
        "config": dataclasses.asdict(adapter.config),
        "modules": {
            name: {
                "in": p.in_features,
                "out": p.out_features,
                "rank": p.down_rank,
                "experts": p.num_experts,
                "scaling": p.scaling,
                "normalizer_floor": p.normalizer_floor,
            }
            for name, p in adapter.projections.items()
        },
        "overrides": {name: list(value.shape) for name, value in adapter.overrides.items()},
        "parameters": adapter.num_parameters,
        "bytes": adapter.num_bytes,
        "dtype": adapter.dtype,
        "unsafe_normalizers": adapter.unsafe_normalizers(),
        "sha256": adapter.sha256,
    }


def _adapter_rows(adapter: AdapterSpec) -> Iterable[tuple[str, str]]:
    projections = adapter.projections.values()
    config = adapter.config
    kinds = Counter(path.rpartition(".")[2] for path in adapter.projections)
    yield "family", adapter.family
    yield "rank r", ", ".join(map(str, sorted({p.down_rank for p in projections})))
    yield "experts k", ", ".join(map(str, sorted({p.num_experts for p in projections})))
    yield "scaling", ", ".join(f"{value:g}" for value in sorted({p.scaling for p in projections}))
    yield "targets", ", ".join(f"{name} ({count})" for name, count in kinds.items())
    yield "modules", str(len(adapter.projections))
    if adapter.overrides:
        yield "replaced base parameters", str(len(adapter.overrides))
    yield "parameters", f"{adapter.num_parameters:,}"
    yield "size", f"{adapter.num_bytes / 1e6:.2f} MB"
    yield "dtype", adapter.dtype
    yield "bias", config.bias
    if config.base_model_name_or_path:
        yield "trained on", config.base_model_name_or_path
    worst = min(projections, key=lambda p: p.normalizer_floor)
    yield "router normaliser, least value", f"{worst.normalizer_floor:.4g} ({worst.path})"
    for path, floor in adapter.unsafe_normalizers().items():
        yield "UNSAFE normaliser", f"{path}: {floor:.4g}, some token divides by zero or flips sign"
    yield "SHA-256", adapter.sha256


def _bundle_rows(bundle: Bundle, lifted: Lifted) -> Iterable[tuple[str, str]]:
    manifest = bundle.manifest
    adapter = manifest.adapter
    yield "task", manifest.task
    yield "dtype", manifest.dtype
    yield "base", f"{manifest.base['model_type']}, {manifest.base['source'] or 'not given'}"
    if manifest.attached is not None:
        yield "attached to", manifest.attached["source"]
    if manifest.shelf is not None:
        sizes = slot_sizes(manifest.refit)
        yield "slots", f"{manifest.shelf['slots']} of {slot_megabytes(manifest)} each, with room for {sizes}"
        for name, each in manifest.shelf["adapters"].items():
            origin, judged = each["origin"], each.get("validation")
            state = "not validated" if judged is None else "passed" if judged["passed"] else "FAILED"
            sizes = f"r={origin['r']}, k={origin['num_experts']}, {origin['modules']} modules"
            yield f"adapter {name}", f"{origin['family']}, {sizes}, {origin['source']}, {state}"
    else:
        yield "adapter", _adapter_origin(adapter)
    op = manifest.op
    form = "kept, with its body" if op["form"] == "function" else "inlined"
    narrow = f", the adapter in {op['adapter_dtype']}" if "adapter_dtype" in op else ""
    yield "op", f"{op['domain']}::{op['name']} version {op['version']}, {op['nodes']} nodes, {form}{narrow}"
    if manifest.quantisation is not None:
        yield "quantised", _quantisation(manifest.quantisation)
    yield "standard operators", str(lifted)
    yield (
        "size",
        f"{sum((bundle.folder / name).stat().st_size for name in (MODEL_NAME, *bundle.data_names)) / 1e6:,.1f} MB",
    )
    yield "inputs", _ports(manifest.inputs)
    yield "outputs", _ports(manifest.outputs)
    yield "made with", ", ".join(f"{name} {version}" for name, version in manifest.tool.items())
    validation = manifest.validation
    if validation is None:
        what = "not yet" if manifest.shelf is None else "not as a whole, since its shelf was changed"
        yield "validated", f"{what}: run `teamlora-export validate`"
    else:
        verdict = "passed" if validation["passed"] else f"FAILED at {validation['first_departure']}"
        yield (
            "validated",
            (
                f"{verdict} on {validation['date']} with {validation['runtime']}: "
                f"worst output {validation['worst_output']}, "
                f"{validation['worst_times_pytorch']:.2g} times PyTorch's own error"
            ),
        )


def _adapter_origin(adapter: AdapterOrigin) -> str:
    return (
        f"{adapter['family']}, r={adapter['r']}, k={adapter['num_experts']}, {adapter['modules']} modules, "
        f"{adapter['parameters']:,} parameters, {adapter['source']}"
    )


def _graph_rows(foreign: Foreign, contents: Contents) -> Iterable[tuple[str, str]]:
    yield "made by", contents.producer
    yield "opset", str(contents.opset)
    yield "weights", ", ".join(foreign.data) or "in the graph"
    counts = contents.operators.items()
    yield "operators", ", ".join(f"{name} {count}" for name, count in list(counts)[:_MOST_OPERATORS])
    yield (
        "attention",
        ", ".join(f"{name} {count}" for name, count in contents.attention.items()) or "in pieces, or none",
    )
    yield "cache", contents.cache
    for form, count in contents.products.items():
        yield "products", f"{count} x {form}"
    for kind, layers in contents.modules.items():
        yield f"projection {kind}", layers
    if contents.unknown:
        yield "other products", str(contents.unknown)
    for obstacle in contents.obstacles:
        yield "OBSTACLE", obstacle
    found = bool(contents.modules) and not contents.obstacles
    yield "an adapter", "can be attached to these projections" if found else "can be attached in part at most"


def _quantisation(how: Quantisation) -> str:
    head = f"the head in {how['head']} bits" if how["head"] else "the head is not"
    zeros = "with zero points" if how["zero_points"] else "symmetric"
    return (
        f"the base's linear weights in {how['bits']} bits, blocks of {how['block']}, {zeros}; {head} "
        f"(rounded by ONNX Runtime {how['onnxruntime']})"
    )


def _engine_rows(facts: EngineFacts) -> Iterable[tuple[str, str]]:
    yield "runtime", f"{facts.runtime} {facts.runtime_version}"
    yield "built for", ", ".join(facts.targets)
    yield "task", facts.task
    yield "dtype", facts.dtype
    if facts.capacity is not None:
        yield "cache", f"in place, {facts.capacity} tokens"
    for profile in facts.profiles:
        shapes = [
            f"{name}: {' / '.join(str(list(shape)) for shape in points)}"
            for name, points in profile.inputs.items()
            if (not name.startswith("past_key_values.") or name == "past_key_values.0.key")
            # Slots have one size each, and there are hundreds.
            and not (facts.slots is not None and points[0] == points[2])
        ]
        yield f"profile {profile.name}", "\n".join(shapes)
    plugin = facts.plugin
    yield (
        "op",
        (
            f"plugin, version {plugin['op_version']}, build {plugin['build']}, TensorRT headers {plugin['tensorrt']}, "
            f"SHA-256 {plugin['sha256']}"
            if plugin
            else "inlined"
        ),
    )
    if facts.plugin_times is not None:
        plugin_us, inlined_us = (1e6 * facts.plugin_times[name] for name in ("plugin", "inlined"))
        yield "a step", f"{plugin_us:,.0f} us with the plugin, {inlined_us:,.0f} us with the op's body"
    yield "adapter", facts.adapter_sha256 if facts.slots is None else f"any of a shelf, {facts.slots} slots as inputs"
    for name, judged in (facts.adapter_validations or {}).items():
        state = "passed" if judged["validation"]["passed"] else "FAILED"
        yield f"adapter {name}", f"{state}, as its file with the SHA-256 {judged['sha256'][:16]}..."
    yield "refit", f"{len(facts.refit_weights)} weights of the adapter" if facts.refit_weights else "no"
    yield "weights", "left out" if facts.stripped else "in the engine"
    yield "size", f"{facts.size / 1e6:,.1f} MB"
    yield "made with", f"teamlora-export {facts.tool_version}"


def _plugin_rows(library: PluginLibrary) -> Iterable[tuple[str, str]]:
    yield "op", f"{library.op} version {library.op_version} ({', '.join(library.attributes)})"
    yield "GPUs", ", ".join(f"sm_{name}" for name in library.architectures)
    yield "TensorRT headers", library.tensorrt
    yield "CUDA", library.cuda
    yield "build", library.build
    yield "size", f"{library.path.stat().st_size / 1e6:,.1f} MB"
    yield "SHA-256", library.sha256


def _library_rows(library: OnnxRuntimeLibrary) -> Iterable[tuple[str, str]]:
    yield "op", f"{library.op} version {library.op_version} ({', '.join(library.attributes)})"
    yield "ONNX Runtime", f"1.{library.onnxruntime_api} or newer"
    yield "processor", f"{library.processor}, here: {', '.join(library.instructions)}"
    if library.cuda:
        yield "GPUs", ", ".join(f"sm_{name}" for name in library.architectures)
        yield "CUDA", library.cuda
    yield "build", library.build
    yield "size", f"{library.path.stat().st_size / 1e6:,.1f} MB"
    yield "SHA-256", library.sha256


def _ports(ports: tuple[Port, ...]) -> str:
    """Ports a line each; the cache's many in one."""
    lines = [_port(port) for port in ports if "." not in port.name]
    caches = [port for port in ports if "." in port.name]
    if caches:
        first, last = caches[0], caches[-1]
        lines.append(f"{first.name} .. {last.name}: {first.dtype} [{', '.join(map(str, first.shape))}]")
    return "\n".join(lines)


def _port(port: Port) -> str:
    return f"{port.name}: {port.dtype} [{', '.join(map(str, port.shape))}]"
