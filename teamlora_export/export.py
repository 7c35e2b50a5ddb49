"""`teamlora-export onnx`: base and adapter in, bundle out.

    read and check the adapter -> trace -> rewrite -> write weights past PyTorch -> manifest

Everything that can be wrong with the input is found in the first step, before anything slow starts or is written.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import onnx_ir as ir

from teamlora_export import __version__
from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.adapter.files import sha256_of
from teamlora_export.bundle import (
    DATA_NAME,
    MODEL_NAME,
    Bundle,
    Manifest,
    Port,
    copy_companions,
    read_bundle,
    require_space,
    staged,
    write_manifest,
)
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
OP_FORMS = ("function", "standard")
_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def export_onnx(
    base_source: str,
    adapter_folder: str | Path,
    out: str | Path,
    *,
    dtype: str = "fp32",
    task: str = "auto",
    op_form: str = "function",
    every_layer: bool = False,
    reporter: Reporter | None = None,
) -> Bundle:
    """Export `base_source` (a folder or a hub name) with the adapter in `adapter_folder` to the bundle `out`.

    Args:
        dtype: fp32, fp16 or bf16: the type of weights and activations.
        task: auto, or one of `model.base.TASKS`.
        op_form: "function" keeps the op, with its body in the model; "standard" inlines the body.
        every_layer: trace all layers, even where they are alike and one of each kind would do.

    Raises:
        ExportError: wrong input or environment; nothing has been written then.
    """
    reporter = reporter or Reporter()
    out = Path(out)
    if dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")
    if op_form not in OP_FORMS:
        raise ExportError(f"--op {op_form}: unknown. Use {' or '.join(OP_FORMS)}.")
    adapter = read_adapter(adapter_folder)

    # Heavy imports wait until the adapter is known to be readable.
    import torch

    from teamlora_export.graph import weights
    from teamlora_export.graph.build import build_graph
    from teamlora_export.graph.passes import inline_bodies
    from teamlora_export.model.base import open_base
    from teamlora_export.model.checkpoint import open_weights, weights_sha256

    base = open_base(base_source, task)
    adapter = align_with_base(adapter, base.signature)
    _warn_of_normalizers(adapter, reporter)
    with staged(out) as folder:
        source = open_weights(base, base.skeleton(torch.float32))
        model = build_graph(base, adapter, getattr(torch, DTYPES[dtype]), reporter, every_layer=every_layer)
        _warn_of_unused(model, adapter, reporter)
        nodes = _count_op_nodes(model)
        if op_form == "standard":
            inline_bodies(model)
        model.producer_name, model.producer_version = "teamlora-export", __version__
        size = weights.total_bytes(model)
        require_space(folder, size)
        with reporter.bytes("Writing weights", size) as progress:
            data_sha256 = weights.write_external_data(model, source, adapter, folder / DATA_NAME, progress)
        ir.save(model, folder / MODEL_NAME)
        copy_companions(base.folder, folder)
        if base.gguf_file is not None:
            base.save_companions(folder)
        write_manifest(
            folder,
            Manifest(
                tool={
                    "teamlora-export": __version__,
                    **{name: importlib.metadata.version(name) for name in _LIBRARIES},
                },
                base={
                    "source": str(base.folder.resolve()) if Path(base_source).is_dir() else base_source,
                    "model_type": base.config.model_type,
                    "sha256": weights_sha256(base),
                },
                adapter={
                    "source": adapter.source,
                    "sha256": adapter.sha256,
                    "family": adapter.family,
                    "r": adapter.config.r,
                    "num_experts": max(p.num_experts for p in adapter.projections.values()),
                    "modules": len(adapter.projections),
                    "parameters": adapter.num_parameters,
                },
                op={
                    "domain": "teamlora",
                    "name": "MixedExpertProjection",
                    "version": 1,
                    "nodes": nodes,
                    "form": op_form,
                },
                task=base.task,
                dtype=dtype,
                inputs=tuple(_port(value) for value in model.graph.inputs),
                outputs=tuple(_port(value) for value in model.graph.outputs),
                sha256={MODEL_NAME: sha256_of(folder / MODEL_NAME), DATA_NAME: data_sha256},
            ),
        )
    return read_bundle(out)


def _warn_of_normalizers(adapter: AdapterSpec, reporter: Reporter) -> None:
    unsafe = adapter.unsafe_normalizers()
    for path, floor in list(unsafe.items())[:5]:
        reporter.warn(
            f"{path}: its routing normaliser can fall to {floor:.3g}; a token there divides by zero or flips sign."
        )
    if len(unsafe) > 5:
        reporter.warn(f"{len(unsafe) - 5} more modules have such a normaliser; `teamlora-export inspect` lists them.")


def _warn_of_unused(model: ir.Model, adapter: AdapterSpec, reporter: Reporter) -> None:
    """Adapted modules that this task's graph never runs (a pooler, another head)."""
    from teamlora_export.graph.weights import OP_SOURCES, recipe_of

    recipes = [recipe_of(value) for value in model.graph.initializers.values()]
    used = {part.key for recipe in recipes if recipe for part in recipe.parts if part.source in OP_SOURCES}
    unused = sorted(set(adapter.projections) - used)
    if unused:
        reporter.warn(f"{len(unused)} adapted modules are not part of this task's graph: {', '.join(unused[:5])}.")
    if not used:
        raise ExportError("None of the adapted modules is part of this task's graph. Choose another --task.")


def _count_op_nodes(model: ir.Model) -> int:
    from teamlora_export.graph import op

    return sum(op.is_op(node) for node in model.graph)


def _port(value: ir.Value) -> Port:
    assert value.dtype is not None
    sizes = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    return Port(value.name or "", value.dtype.name.lower(), sizes)
