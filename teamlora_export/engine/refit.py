"""`teamlora-export trt refit`: another adapter of the same shapes into a built engine, without a rebuild."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from teamlora_export.adapter import AdapterSpec, BaseSignature, LinearShape, align_with_base, read_adapter
from teamlora_export.bundle import Bundle
from teamlora_export.engine.facts import EngineFacts, read_facts, write_engine
from teamlora_export.engine.load import load_engine, open_engine_runtime
from teamlora_export.engine.runtime import Messages
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.graph.cooked import adapter_weights
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.graph.weights import Recipe
from teamlora_export.origin import refuse_cancelled_routing
from teamlora_export.progress import Reporter


def refit_engine(
    engine: Path,
    bundle: Bundle,
    adapter_folder: str | Path,
    output: Path | None = None,
    plugin: Path | None = None,
    reporter: Reporter | None = None,
) -> tuple[Path, EngineFacts]:
    """Exchange the adapter of `engine` (built with `--refit` from `bundle`); returns the path written and its facts.

    The adapter is read and checked first: what is wrong with it is found on a machine without a GPU too.

    Args:
        output: NAME.engine to write; None: `engine` itself.

    Raises:
        ExportError: the engine is not refittable, the adapter has other shapes, or there is no GPU.
    """
    reporter = reporter or Reporter()
    facts = read_facts(engine)
    weights = refit_weights(engine, facts, bundle, adapter_folder)
    runtime = open_engine_runtime(engine, facts)
    loaded = load_engine(engine, facts, runtime, plugin, bundle, reporter)
    messages = Messages()
    refitter = runtime.trt.Refitter(loaded, runtime.logger(messages))
    with reporter.step(f"Exchanging {len(weights)} weights"):
        for name, array in weights.items():
            if not refitter.set_named_weights(name, _as_weights(runtime.trt, array)):
                raise ExportError(f"{engine}: does not take {name}: {messages.reason()}")
        if not refitter.refit_cuda_engine():
            raise ExportError(f"{engine}: cannot be refitted: {messages.reason()}")
    settings = loaded.create_serialization_config()
    # Versions that have the flag drop what refitting needs without it; older ones keep it.
    keep_refittable = getattr(runtime.trt.SerializationFlag, "INCLUDE_REFIT", None)
    if keep_refittable is not None:
        settings.set_flag(keep_refittable)
    made = memoryview(loaded.serialize_with_config(settings))
    path = output or engine
    changed = replace(
        facts,
        adapter_sha256=read_adapter(adapter_folder).sha256,
        stripped=False,
        size=len(made),
        sha256=hashlib.sha256(made).hexdigest(),
    )
    write_engine(made, changed, path)
    return path, changed


def refit_weights(
    engine: Path, facts: EngineFacts, bundle: Bundle, adapter_folder: str | Path
) -> dict[str, np.ndarray]:
    """The adapter's weights as `engine` names them, in its dtype.

    Raises:
        ExportError: the engine is not refittable, is of another bundle, or the adapter has other shapes than its own.
    """
    if facts.refit_weights is None:
        raise ExportError(f"{engine}: was built without --refit. Build it again with it.")
    if dict(facts.model_sha256) != dict(bundle.manifest.sha256):
        raise ExportError(f"{bundle.folder}: is not the bundle that {engine.name} was built from.")
    adapter = _aligned(read_adapter(adapter_folder), bundle)
    recipes = {name: Recipe.from_json(text) for name, text in facts.refit_weights.items()}
    # Each array is copied: the maker uses its memory again.
    return {name: array.copy() for name, array in adapter_weights(recipes, adapter, IR_DTYPES[facts.dtype])}


def _aligned(adapter: AdapterSpec, bundle: Bundle) -> AdapterSpec:
    """`adapter` under the base's names, checked against the shapes of the one that the bundle was exported with."""
    refuse_cancelled_routing(adapter)
    layout = bundle.manifest.refit
    assert layout is not None
    signature = BaseSignature(
        name=str(bundle.manifest.base["source"]),
        linears={
            path: LinearShape(sizes[0], sizes[1], has_bias=False, transposed=False)
            for path, sizes in layout["projections"].items()
        },
        parameters={name: tuple(shape) for name, shape in layout["overrides"].items()},
        body_prefix=layout["body_prefix"],
    )
    aligned = align_with_base(adapter, signature)
    findings = []
    for path, (_, _, down_rank, num_experts, expert_rank) in layout["projections"].items():
        found = aligned.projections.get(path)
        if found is None:
            findings.append(f"{path}: the adapter has no weights for it")
        elif (found.down_rank, found.num_experts, found.expert_rank) != (down_rank, num_experts, expert_rank):
            findings.append(
                f"{path}: has {found.num_experts} experts of rank {found.expert_rank}, the engine {num_experts} of "
                f"rank {expert_rank}"
            )
    findings += [
        f"{name}: the adapter does not replace it" for name in layout["overrides"] if name not in aligned.overrides
    ]
    raise_findings(f"The adapter {adapter.source} does not fit this engine; export and build anew", findings)
    return aligned


def _as_weights(trt: Any, array: np.ndarray) -> Any:
    """TensorRT's view of an array, bfloat16 included, which NumPy does not know."""
    kinds = {"float32": trt.float32, "float16": trt.float16, "bfloat16": trt.bfloat16}
    return trt.Weights(kinds[array.dtype.name], array.ctypes.data, array.size)
