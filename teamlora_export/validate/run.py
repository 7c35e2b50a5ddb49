"""`teamlora-export validate`: finds what made a bundle, runs the cases, judges, and writes the verdict into its
manifest."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.bundle import Bundle, Validation, check_files, write_manifest
from teamlora_export.engine.facts import EngineFacts, find_engine, read_facts, write_facts
from teamlora_export.errors import ExportError
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.checkpoint import SafetensorsWeights, open_safetensors_weights
from teamlora_export.model.source import weights_sha256
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Case, make_cases
from teamlora_export.validate.engine_runner import EngineRunner, cases_within
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
    engine_name: str | None = None,
    plugin: Path | None = None,
    reporter: Reporter | None = None,
) -> Verdict:
    """Judge `bundle` against the base and adapter that it was made of (found by its manifest, or given if they moved).

    Args:
        layer_by_layer: hold one layer in memory at a time and run fewer cases; None: only where the whole does not fit.
        engine_name: judge this engine instead of the graph; its verdict goes into its own facts.
        plugin: the library for an engine that needs the plugin.

    Raises:
        ExportError: base or adapter are not there, or are not those that the bundle was made of; the bundle's own files
            are damaged; its model cannot be loaded.
    """
    reporter = reporter or Reporter()
    manifest = bundle.manifest
    check_files(bundle)
    engine = _open_engine(bundle, engine_name, plugin, reporter) if engine_name else None
    dtype = engine.facts.dtype if engine else manifest.dtype
    adapter_sha256 = engine.facts.adapter_sha256 if engine else manifest.adapter["sha256"]
    base, adapter = _open_sources(bundle, base_source, adapter_folder, adapter_sha256)
    if layer_by_layer is None:
        layer_by_layer = not _fits(base)
    weights = _open_streamed(base) if layer_by_layer else None
    if weights is not None:
        reporter.say("Layer by layer: the weights are read from disk on every call")
    with reporter.step("Preparing PyTorch in float64 and the bundle's dtype"):
        reference = TorchRunner(base, adapter, torch.float64, weights)
        pytorch = TorchRunner(base, adapter, _TORCH_DTYPES[dtype], weights)
    candidate = engine.runner if engine else OnnxRunner(bundle) if weights is None else LayerwiseOnnxRunner(bundle)
    judge = Judge(dtype, reference, pytorch, candidate, manifest.inputs)
    cases = make_cases(base.config, base.task, brief=weights is not None)
    for case in engine.choose(cases, reporter) if engine else cases:
        with reporter.step(f"Case: {case.name}"):
            judge.add_case(case)
    with reporter.step("Comparing module by module"):
        modules = tuple(judge.judge_modules())
        expert_use = {path: _mean_share(share) for path, share in reference.expert_use().items()}
        departure = judge.locate(candidate.producer_of)
    label = engine.label if engine else "ONNX Runtime"
    verdict = Verdict(dtype, judge.results(), modules, departure, expert_use, label)
    if engine:
        write_facts(dataclasses.replace(engine.facts, validation=_summary(verdict)), engine.path)
    else:
        write_manifest(bundle.folder, dataclasses.replace(manifest, validation=_summary(verdict)))
    return verdict


@dataclass(frozen=True)
class _Engine:
    """An engine that is open."""

    path: Path
    facts: EngineFacts
    runner: EngineRunner

    @property
    def label(self) -> str:
        return f"{'TensorRT-RTX' if self.facts.runtime == 'rtx' else 'TensorRT'} ({self.path.name})"

    def choose(self, cases: list[Case], reporter: Reporter) -> list[Case]:
        """The cases that the engine's profiles take.

        Raises:
            ExportError: there are none.
        """
        chosen = cases_within(cases, self.facts.profiles)
        if not chosen:
            raise ExportError(f"{self.path}: its profiles take none of the cases. Build it with wider --shapes.")
        skipped = [case.name for case in cases if case not in chosen]
        if skipped:
            reporter.warn(f"Outside of the engine's profiles, left out: {', '.join(skipped)}.")
        return chosen


def _open_engine(bundle: Bundle, name: str, plugin: Path | None, reporter: Reporter) -> _Engine:
    """Opened before PyTorch loads anything: most that can be wrong is found here."""
    path = find_engine(bundle, name)
    facts = read_facts(path)
    if dict(facts.model_sha256) != dict(bundle.manifest.sha256):
        raise ExportError(f"{path}: was not built from {bundle.folder} as it is now. Build it again.")
    return _Engine(path, facts, EngineRunner(path, facts, bundle, plugin, reporter))


def _open_sources(
    bundle: Bundle, base_source: str | None, adapter_folder: str | Path | None, adapter_sha256: str
) -> tuple[BaseModel, AdapterSpec]:
    manifest = bundle.manifest
    adapter = read_adapter(adapter_folder or manifest.adapter["source"])
    if adapter.sha256 != adapter_sha256:
        raise ExportError(
            f"{adapter.source}: is not the adapter that is judged here. Give that one with --adapter, or export again."
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


def _summary(verdict: Verdict) -> Validation:
    worst = verdict.worst
    tokens = [case for case in verdict.cases if case.greedy_tokens]
    return {
        "passed": verdict.passed,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "runtime": verdict.candidate,
        "cases": len(verdict.cases),
        "worst_output": worst.name,
        "worst_relative_error": worst.error.relative,
        "worst_times_pytorch": worst.times_pytorch,
        "greedy_tokens": sum(case.greedy_tokens for case in tokens),
        "greedy_equal": sum(case.greedy_equal for case in tokens),
        "first_departure": verdict.departure.module if verdict.departure else None,
    }
