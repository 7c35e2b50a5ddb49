"""Judges what `attach` made of another's graph.

graph     the graph's own weights are those that the adapter was attached to; each node of the op reads what the
          product behind it reads, and is all that reads what the product gives
weights   the op's are the adapter's
modules   what each node adds, on the x and the base that the graph itself computed, against float64
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.exact import DequantizeProducts
from teamlora_export.attach.interface import grow_window_caches
from teamlora_export.attach.products import find_products, has_codes
from teamlora_export.attach.weigh import Weigher
from teamlora_export.bundle import Bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.graph.cooked import NoBase
from teamlora_export.model.base import BaseModel
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Feeds, cases_without_padding, make_cases
from teamlora_export.validate.held_by_products import NotHeldError, holding_weights, weigher_of
from teamlora_export.validate.judge import MULTIPLE, MULTIPLE_OF_CODES, Judge
from teamlora_export.validate.local import Follower, LocalJudge
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.stored import judge_weights, recipes_of
from teamlora_export.validate.taps import EXPERTS, INPUT, live_values, module_of, whole_of
from teamlora_export.validate.torch_runner import TorchRunner, round_experts
from teamlora_export.validate.verdict import CaseResult, Departure, Judgement, LocalCheck, Verdict
from teamlora_export.validate.wiring import judge_wiring


def judge_attached(
    bundle: Bundle, adapter: AdapterSpec, base: BaseModel | None, library: Path | None, reporter: Reporter
) -> Verdict:
    """The verdict on an attached bundle, whose files are those that its manifest lists.

    Args:
        base: the model that the graph was made of: it then computes with the graph's own weights, whatever they were
            quantised to, and says what the whole should give.

    Raises:
        ExportError: the graph cannot be read or run.
    """
    manifest = bundle.manifest
    _compare_origin(bundle, reporter)
    graph = AttachedRunner(bundle, adapter.projections, library)
    recipes = recipes_of(manifest)
    weigher = weigher_of(base) if base is not None else None
    assert manifest.attached is not None
    evidence = manifest.attached["projections"]
    departures = [*graph.departures(), *judge_wiring(graph.written, adapter, evidence, weigher, reporter)]
    with reporter.step(f"Comparing {len(recipes)} weights with the adapter"):
        live = live_values(graph.written)
        departures += judge_weights(graph.written, recipes, NoBase(), adapter, live, manifest)
    dtypes = (torch.float64, getattr(torch, DTYPES[manifest.dtype].torch))
    multiple = MULTIPLE_OF_CODES if has_codes(graph.written.graph) else MULTIPLE
    results: list[CaseResult] = []
    reference: Follower
    pytorch: Follower
    runners = _holding(bundle, base, adapter, dtypes, weigher, reporter) if base is not None else None
    if base is None or runners is None:
        reference, pytorch = (ExpertRunner(adapter, dtype, dtypes[1]) for dtype in dtypes)
    else:
        exact, rounded = runners
        reference, pytorch = exact, rounded
        judge = Judge(manifest.dtype, exact, rounded, graph, manifest.inputs, multiple)
        for case in [case for case in make_cases(base.config, base.task) if case.mask.all()]:
            with reporter.step(f"Case: {case.name}"):
                judge.add_case(case)
        if not departures:
            judge.draw_again()
        results += judge.results()
        graph.forget()
        # Its norms and the experts are of the graph's type; what it holds as codes stays.
        exact.round_weights(dtypes[1], ())
    sums = {name: whole_of(name) for name, tap in graph.taps.items() if tap.base is not None}
    # Of its other constants (rotary tables, a norm's weight with what was folded into it) the reference has none.
    known = {*recipes, *(name for product in find_products(graph.model.graph) for name in product.names)}
    inexact = graph.inexact(known)
    local = LocalJudge(manifest.dtype, reference, pytorch, graph, manifest.inputs, inexact, sums)
    checks: list[LocalCheck] = []
    for case in cases_without_padding(manifest.tokens, manifest.task):
        with reporter.step(f"Module by module: {case.name}"):
            checks += local.check(case)
    for check in checks:
        departures += [_departure(check, judgement, graph) for judgement in check.judgements if not judgement.passed]
    if runners is None:
        results += [CaseResult(check.case, check.judgements) for check in checks]
    return Verdict(
        dtype=manifest.dtype,
        cases=tuple(results),
        departures=tuple(departures),
        local=tuple(checks),
        weights=len(recipes),
        candidate=graph.label + ("" if runners is not None else ", experts by themselves"),
        multiple=multiple,
    )


def _holding(
    bundle: Bundle,
    base: BaseModel,
    adapter: AdapterSpec,
    dtypes: Sequence[torch.dtype],
    weigher: Weigher | None,
    reporter: Reporter,
) -> list[TorchRunner] | None:
    """PyTorch with the graph's weights; None, with a warning, where these are not all found, so that the base cannot
    say what the whole should give."""
    with reporter.step("Preparing PyTorch with the graph's weights"):
        try:
            return holding_weights(bundle, base, adapter, dtypes, weigher, reporter)
        except NotHeldError as error:
            reporter.warn(f"{error}\nThe model as a whole is not judged, but the experts are, by themselves.")
            return None


class AttachedRunner(OnnxRunner):
    """An attached bundle's model. What another tool's graph saves is taken out as well: products of integers, and
    Sigmoid, which errs seven times as much as PyTorch's in float32, and is written out."""

    def prepare(self, model: ir.Model) -> bool:
        grown = grow_window_caches(model)
        changed = super().prepare(model) or grown
        if self._as_deployed:
            return changed
        changed = bool(DequantizeProducts()(model).modified) or changed
        for node in list(model.graph):
            if node.op_type == "Sigmoid" and node.outputs[0].dtype == ir.DataType.FLOAT:
                _write_out_sigmoid(model.graph, node)
                changed = True
        return changed


def _write_out_sigmoid(graph: ir.Graph, node: ir.Node) -> None:
    """1 / (1 + exp(-x))"""
    one = ir.node("Constant", [], {"value_float": 1.0})
    minus = ir.node("Neg", [node.inputs[0]])
    power = ir.node("Exp", minus.outputs)
    total = ir.node("Add", [one.outputs[0], power.outputs[0]])
    result = ir.node("Div", [one.outputs[0], total.outputs[0]], name=node.name)
    nodes = [one, minus, power, total, result]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, result.outputs)


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

    def run_forced(self, feeds: Feeds, taps: Mapping[str, np.ndarray], jitter: bool = False) -> Feeds:
        """What the experts add to what the candidate read, by tap."""
        own = {}
        with torch.no_grad():
            for path, layer in self._layers.items():
                if f"{path}/{INPUT}" in taps:
                    x = torch.from_numpy(np.ascontiguousarray(taps[f"{path}/{INPUT}"])).to(self._dtype)
                    experts = sum(layer.contributions(x), start=torch.zeros((), dtype=x.dtype))
                    own[f"{path}/{EXPERTS}"] = experts.double().numpy()
        return own


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


def _departure(check: LocalCheck, judgement: Judgement, graph: OnnxRunner) -> Departure:
    reason = (
        f"{judgement.name} errs by {judgement.error.rms:.2e} in one column, allowed is {judgement.allowed:.2e} "
        f"(case: {check.case})"
    )
    return Departure("modules", module_of(judgement.name), graph.producer_of(judgement.name), reason)
