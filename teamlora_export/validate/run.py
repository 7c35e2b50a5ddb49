"""`teamlora-export validate`: finds what made a bundle, runs the cases, judges, and writes the verdict into its
manifest."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path

import numpy as np
import psutil
import torch

from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.adapter.files import sha256_of
from teamlora_export.bundle import Bundle, write_manifest
from teamlora_export.errors import ExportError
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.checkpoint import SafetensorsWeights, open_safetensors_weights
from teamlora_export.model.source import weights_sha256
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import make_cases
from teamlora_export.validate.judge import Judge, Verdict
from teamlora_export.validate.layerwise import LayerwiseOnnxRunner
from teamlora_export.validate.runners import OnnxRunner, TorchRunner

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def validate_bundle(
    bundle: Bundle,
    *,
    base_source: str | None = None,
    adapter_folder: str | Path | None = None,
    layer_by_layer: bool | None = None,
    reporter: Reporter | None = None,
) -> Verdict:
    """Judge `bundle` against the base and adapter that it was made of (found by its manifest, or given if they moved).

    Args:
        layer_by_layer: hold one layer in memory at a time and run fewer cases; None: only where the whole does not fit.

    Raises:
        ExportError: base or adapter are not there, or are not those that the bundle was made of; the bundle's own files
            are damaged; its model cannot be loaded.
    """
    reporter = reporter or Reporter()
    manifest = bundle.manifest
    _check_own_files(bundle)
    base, adapter = _open_sources(bundle, base_source, adapter_folder)
    if layer_by_layer is None:
        layer_by_layer = not _fits(base)
    weights = _open_streamed(base) if layer_by_layer else None
    if weights is not None:
        reporter.say("Layer by layer: the weights are read from disk on every call")
    with reporter.step("Preparing PyTorch in float64 and the bundle's dtype"):
        reference = TorchRunner(base, adapter, torch.float64, weights)
        pytorch = TorchRunner(base, adapter, _TORCH_DTYPES[manifest.dtype], weights)
    candidate = OnnxRunner(bundle) if weights is None else LayerwiseOnnxRunner(bundle)
    judge = Judge(manifest.dtype, reference, pytorch, candidate, manifest.inputs)
    for case in make_cases(base.config, base.task, brief=weights is not None):
        with reporter.step(f"Case: {case.name}"):
            judge.add_case(case)
    with reporter.step("Comparing module by module"):
        modules = tuple(judge.judge_modules())
        expert_use = {path: _mean_share(share) for path, share in reference.expert_use().items()}
        departure = judge.locate(candidate.producer_of)
    verdict = Verdict(manifest.dtype, judge.results(), modules, departure, expert_use)
    write_manifest(bundle.folder, dataclasses.replace(manifest, validation=_summary(verdict)))
    return verdict


def _check_own_files(bundle: Bundle) -> None:
    for name, expected in bundle.manifest.sha256.items():
        if sha256_of(bundle.folder / name) != expected:
            raise ExportError(
                f"{bundle.folder / name}: is not what was exported (its SHA-256 differs). Export the model again."
            )


def _open_sources(
    bundle: Bundle, base_source: str | None, adapter_folder: str | Path | None
) -> tuple[BaseModel, AdapterSpec]:
    manifest = bundle.manifest
    adapter = read_adapter(adapter_folder or manifest.adapter["source"])
    if adapter.sha256 != manifest.adapter["sha256"]:
        raise ExportError(
            f"{adapter.source}: is not the adapter that {bundle.folder} was made of. Export again, or give --adapter."
        )
    base = open_base(base_source or manifest.base["source"], manifest.task)
    if weights_sha256(base.source) != manifest.base["sha256"]:
        raise ExportError(
            f"{base.name}: is not the base that {bundle.folder} was made of. Export again, or give --base."
        )
    return base, align_with_base(adapter, base.signature)


def _fits(base: BaseModel) -> bool:
    """Whether PyTorch in float64, PyTorch in the bundle's dtype, and ONNX Runtime fit into what memory is free."""
    parameters = sum(math.prod(shape) for shape in base.signature.parameters.values())
    return parameters * (8 + 4 + 4) * 1.3 < psutil.virtual_memory().available


def _open_streamed(base: BaseModel) -> SafetensorsWeights:
    weights = open_safetensors_weights(base.source, base.aliases(), base.signature.body_prefix)
    if weights is None:
        raise ExportError(
            f"{base.name}: does not fit into this machine's memory, and only safetensors can be read layer by layer."
        )
    return weights


def _mean_share(share: np.ndarray) -> list[float]:
    return [float(value) for value in share.reshape(-1, share.shape[-1]).mean(axis=0)]


def _summary(verdict: Verdict) -> dict[str, object]:
    worst = verdict.worst
    tokens = [case for case in verdict.cases if case.greedy_tokens]
    return {
        "passed": verdict.passed,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "runtime": "onnxruntime",
        "cases": len(verdict.cases),
        "worst_output": worst.name,
        "worst_relative_error": worst.error.relative,
        "worst_times_pytorch": worst.times_pytorch,
        "greedy_tokens": sum(case.greedy_tokens for case in tokens),
        "greedy_equal": sum(case.greedy_equal for case in tokens),
        "first_departure": verdict.departure.module if verdict.departure else None,
    }
