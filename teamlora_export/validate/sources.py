"""Finds what a bundle was made of, for it to be judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.bundle import Bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.source import find_base, weights_sha256
from teamlora_export.ports import Port
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import make_cases
from teamlora_export.validate.held_as_codes import HeldAsCodes
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.stored import recipes_of


def open_sources(
    bundle: Bundle, base_source: str | None, adapter_folder: str | Path | None, adapter_sha256: str
) -> tuple[BaseModel, AdapterSpec]:
    """The base and the adapter that `bundle` was made of, found by its manifest, or given if they moved.

    Raises:
        ExportError: they are not there, or are others: another adapter than that of `adapter_sha256`.
    """
    if not (base_source or bundle.manifest.base["source"]):
        raise ExportError(f"{bundle.folder}: does not say which model its graph was made of. Give it with --base.")
    adapter = open_adapter(bundle, adapter_folder, adapter_sha256)
    base = open_base_of(bundle, base_source)
    return base, align_with_base(adapter, base.signature)


def open_base_of(bundle: Bundle, base_source: str | None) -> BaseModel:
    """The base that `bundle` was made of.

    Raises:
        ExportError: it is not there, or is another.
    """
    manifest = bundle.manifest
    base = open_base(base_source or manifest.base["source"], manifest.task)
    if weights_sha256(base.source) != manifest.base["sha256"]:
        raise ExportError(
            f"{base.name}: is not the base that {bundle.folder} was made of. Export again, or give --base."
        )
    return base


def open_attached_sources(
    bundle: Bundle, base_source: str | None, adapter_folder: str | Path | None, reporter: Reporter
) -> tuple[BaseModel | None, AdapterSpec]:
    """The adapter that was attached, and the model that the graph was made of, where it is known and fits into memory.

    Raises:
        ExportError: as `open_adapter`; or the base that is given cannot be opened.
    """
    manifest = bundle.manifest
    adapter = open_adapter(bundle, adapter_folder, manifest.adapter["sha256"])
    source = base_source or manifest.base["source"]
    if not source:
        return None, adapter
    try:
        found = find_base(source)
    except ExportError as error:
        if base_source is not None:
            raise
        # A folder that is gone, or a name that the hub does not give now.
        reporter.warn(f"{error}\nThe model as a whole is not judged. Give --base.")
        return None, adapter
    base = open_base(found, manifest.task)
    adapter = align_with_base(adapter, base.signature)
    if not fits(base, manifest.inputs):
        reporter.warn(f"{source}: does not fit into memory in float64; the experts are judged by themselves.")
        return None, adapter
    if manifest.base["sha256"] and weights_sha256(found) != manifest.base["sha256"]:
        raise ExportError(
            f"{source}: is not the base that {bundle.folder} was compared with when its adapter was attached. Attach "
            "it again, or give --base."
        )
    return base, adapter


def open_adapter(bundle: Bundle, folder: str | Path | None, sha256: str) -> AdapterSpec:
    """The adapter that `bundle` was made of, found by its manifest, or given if it moved.

    Raises:
        ExportError: it is not there, or is another than that of `sha256`.
    """
    adapter = read_adapter(folder or bundle.manifest.adapter["source"])
    if adapter.sha256 != sha256:
        raise ExportError(
            f"{adapter.source}: is not the adapter that is judged here. Give that one with --adapter, or export again."
        )
    return adapter


def torch_dtype(name: str) -> torch.dtype:
    """By the name that a manifest gives it."""
    return getattr(torch, DTYPES[name].torch)


def fits(base: BaseModel, inputs: Sequence[Port]) -> bool:
    """Whether PyTorch in float64, PyTorch in the bundle's dtype, and ONNX Runtime fit into what memory is free, each
    with the cache of the longest case as it was and as it is."""
    parameters = sum(math.prod(shape) for shape in base.signature.parameters.values())
    places = max(case.past + case.mask.size for case in make_cases(base.config, base.task))
    cached = sum(int(p.shape[1]) * int(p.shape[3]) for p in inputs if p.name.startswith("past_key_values.")) * places
    return (parameters * 1.3 + cached * 2) * (8 + 4 + 4) < psutil.virtual_memory().available


def codes_of(graph: OnnxRunner, base: BaseModel) -> HeldAsCodes:
    """What the codes of a quantised bundle mean."""
    shapes = {name: tuple(tensor.shape) for name, tensor in base.skeleton(torch.float32).state_dict().items()}
    return HeldAsCodes(graph.written, recipes_of(graph.bundle.manifest), shapes)
