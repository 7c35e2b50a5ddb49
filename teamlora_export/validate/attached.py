"""Judges what `attach` made of another's graph, where nothing says what the whole should give.

graph     the graph's own weights are those that the adapter was attached to; each node of the op reads what the
          product behind it reads, and is all that reads what the product gives
weights   the op's are the adapter's
modules   what each node adds, on the x and the base that the graph itself computed, against float64
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.products import find_products
from teamlora_export.bundle import Bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.graph.weights import NoBase
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Feeds, cases_without_padding
from teamlora_export.validate.local import LocalJudge
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.stored import judge_weights, recipes_of
from teamlora_export.validate.taps import EXPERTS, INPUT, live_values, module_of, whole_of
from teamlora_export.validate.torch_runner import round_experts
from teamlora_export.validate.verdict import CaseResult, Departure, Judgement, LocalCheck, Verdict


def judge_attached(bundle: Bundle, adapter: AdapterSpec, library: Path | None, reporter: Reporter) -> Verdict:
    """The verdict on an attached bundle, whose files are those that its manifest lists.

    Raises:
        ExportError: the graph cannot be read or run.
    """
    manifest = bundle.manifest
    graph = OnnxRunner(bundle, adapter.projections, library)
    recipes = recipes_of(manifest)
    _compare_origin(bundle, reporter)
    departures = [*graph.departures(), *_wiring(graph.written)]
    with reporter.step(f"Comparing {len(recipes)} weights with the adapter"):
        live = live_values(graph.written)
        departures += judge_weights(graph.written, recipes, NoBase(), adapter, live, manifest.dtype)
    judge = _local_judge(bundle, graph, adapter)
    checks: list[LocalCheck] = []
    for case in cases_without_padding(manifest.tokens, manifest.task):
        with reporter.step(f"Case: {case.name}"):
            checks += judge.check(case)
    for check in checks:
        departures += [_departure(check, judgement, graph) for judgement in check.judgements if not judgement.passed]
    return Verdict(
        dtype=manifest.dtype,
        cases=tuple(CaseResult(check.case, check.judgements) for check in checks),
        departures=tuple(departures),
        local=tuple(checks),
        weights=len(recipes),
        candidate=f"{graph.label}, expert by expert",
        library=sha256_of(library) if library is not None else None,
    )


class ExpertRunner:
    """The experts of each adapted module by themselves, in `dtype`: in a `LocalJudge`, what a `TorchRunner` is.

    Args:
        stored: the type that the graph holds their weights in.
    """

    def __init__(self, adapter: AdapterSpec, dtype: torch.dtype, stored: torch.dtype) -> None:
        self._layers = {}
        for path, projection in adapter.projections.items():
            linear = nn.Linear(1, 1, bias=False)
            # Of the base's size, and none of its memory.
            base = torch.zeros(1, 1, dtype=dtype).expand(projection.out_features, projection.in_features)
            linear.weight = nn.Parameter(base, requires_grad=False)
            self._layers[path] = ExpertLinear(linear, projection)
            if stored != torch.float32:
                round_experts(self._layers[path], op.fold(projection), stored)
        self._dtype = dtype

    def run_forced(self, _feeds: Feeds, taps: Mapping[str, np.ndarray], jitter: bool = False) -> Feeds:
        """What the experts add to what the candidate read, by tap."""
        own = {}
        with torch.no_grad():
            for path, layer in self._layers.items():
                if f"{path}/{INPUT}" in taps:
                    x = torch.from_numpy(np.ascontiguousarray(taps[f"{path}/{INPUT}"])).to(self._dtype)
                    experts = sum(layer.contributions(x), start=torch.zeros((), dtype=x.dtype))
                    own[f"{path}/{EXPERTS}"] = experts.double().numpy()
        return own


def _local_judge(bundle: Bundle, graph: OnnxRunner, adapter: AdapterSpec) -> LocalJudge:
    manifest = bundle.manifest
    dtype = getattr(torch, DTYPES[manifest.dtype].torch)
    reference, pytorch = (ExpertRunner(adapter, kind, dtype) for kind in (torch.float64, dtype))
    sums = {name: whole_of(name) for name, tap in graph.taps.items() if tap.base is not None}
    return LocalJudge(manifest.dtype, reference, pytorch, graph, manifest.inputs, (), sums)  # type: ignore[arg-type]


def _compare_origin(bundle: Bundle, reporter: Reporter) -> None:
    """Say which of the files that the adapter was attached to are others by now, or gone."""
    attached = bundle.manifest.attached
    assert attached is not None
    folder = Path(attached["source"]).parent
    for name, digest in attached["sha256"].items():
        if not (folder / name).is_file():
            reporter.warn(f"{folder / name}: is not there any more, and was not compared.")
        elif sha256_of(folder / name, folder) != digest:
            reporter.warn(f"{folder / name}: is another file by now than the adapter was attached to.")


def _wiring(model: ir.Model) -> Iterator[Departure]:
    """Nodes of the op that do not sit behind a product as `attach` puts them."""
    products = {product.output: product for product in find_products(model.graph)}
    for node in model.graph:
        x, base = node.inputs[:2] if op.is_op(node) else (None, None)
        if x is None or base is None:
            continue
        name = node.name or node.op_type
        path = module_of(name)
        for value in _joined(base):
            product = products.get(value)
            if product is None:
                yield Departure("graph", path, name, f"{value.name}, its base, is no product with a stored weight")
            elif product.x is not x:
                yield Departure("graph", path, name, f"reads {x.name}, and the product behind it {product.x.name}")
            others = [each.name or each.op_type for each in value.consumers() if not _leads_to_op(each)]
            if others:
                yield Departure("graph", path, name, f"{others[0]} reads {value.name} without what the experts add")


def _joined(base: ir.Value) -> list[ir.Value]:
    """The outputs of the products that a base is put together of."""
    maker = base.producer()
    if maker is not None and maker.op_type == "Concat":
        return [value for value in maker.inputs if value is not None]
    if maker is not None and maker.op_type == "Split" and maker.inputs[0] is not None:
        return [maker.inputs[0]]
    return [base]


def _leads_to_op(node: ir.Node) -> bool:
    """The op, or what takes bases together or apart for it."""
    if op.is_op(node):
        return True
    readers = [each for value in node.outputs for each in value.consumers()]
    return node.op_type in ("Concat", "Split") and any(op.is_op(each) for each in readers)


def _departure(check: LocalCheck, judgement: Judgement, graph: OnnxRunner) -> Departure:
    reason = (
        f"{judgement.name} errs by {judgement.error.rms:.2e} in one column, allowed is {judgement.allowed:.2e} "
        f"(case: {check.case})"
    )
    return Departure("modules", module_of(judgement.name), graph.producer_of(judgement.name), reason)
