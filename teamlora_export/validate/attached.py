"""Judges what `attach` made of another's graph.

graph     the graph's own weights are those that the adapter was attached to; each node of the op reads what the
          product behind it reads, and is all that reads what the product gives
weights   the op's are the adapter's
modules   what each node adds, on the x and the base that the graph itself computed, against float64
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import nn

from teamlora_export.adapter.check import LinearShape
from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.exact import DequantizeProducts
from teamlora_export.attach.insert import detach
from teamlora_export.attach.interface import grow_window_caches
from teamlora_export.attach.match import Found, find_modules
from teamlora_export.attach.names import is_outside
from teamlora_export.attach.products import Product, find_products, has_codes, readers_of, release
from teamlora_export.bundle import Bundle
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import sha256_of
from teamlora_export.graph import op
from teamlora_export.graph.quantized import dequantised
from teamlora_export.graph.read import read_graph
from teamlora_export.graph.weights import NoBase
from teamlora_export.model.base import BaseModel
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Feeds, cases_without_padding, make_cases
from teamlora_export.validate.judge import MULTIPLE, MULTIPLE_OF_CODES, Judge
from teamlora_export.validate.local import Follower, LocalJudge
from teamlora_export.validate.onnx_runner import OnnxRunner, open_model, run_session
from teamlora_export.validate.stored import judge_weights, recipes_of
from teamlora_export.validate.taps import EXPERTS, INPUT, live_values, module_of, whole_of
from teamlora_export.validate.torch_runner import TorchRunner, round_experts
from teamlora_export.validate.verdict import CaseResult, Departure, Judgement, LocalCheck, Verdict


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
    departures = [*graph.departures(), *_wiring(graph.written)]
    with reporter.step(f"Comparing {len(recipes)} weights with the adapter"):
        live = live_values(graph.written)
        departures += judge_weights(graph.written, recipes, NoBase(), adapter, live, manifest)
    dtypes = (torch.float64, getattr(torch, DTYPES[manifest.dtype].torch))
    multiple = MULTIPLE_OF_CODES if has_codes(graph.written.graph) else MULTIPLE
    results: list[CaseResult] = []
    reference: Follower
    pytorch: Follower
    if base is None:
        reference, pytorch = (ExpertRunner(adapter, dtype, dtypes[1]) for dtype in dtypes)
    else:
        with reporter.step("Preparing PyTorch with the graph's weights"):
            exact, rounded = holding_weights(bundle, base, adapter, dtypes, reporter)
        reference, pytorch = exact, rounded
        judge = Judge(manifest.dtype, exact, rounded, graph, manifest.inputs, multiple)
        for case in [case for case in make_cases(base.config, base.task) if case.mask.all()]:
            with reporter.step(f"Case: {case.name}"):
                judge.add_case(case)
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
    if base is None:
        results += [CaseResult(check.case, check.judgements) for check in checks]
    return Verdict(
        dtype=manifest.dtype,
        cases=tuple(results),
        departures=tuple(departures),
        local=tuple(checks),
        weights=len(recipes),
        candidate=graph.label + ("" if base is not None else ", experts by themselves"),
        multiple=multiple,
    )


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


def holding_weights(
    bundle: Bundle, base: BaseModel, adapter: AdapterSpec, dtypes: Sequence[torch.dtype], reporter: Reporter
) -> list[TorchRunner]:
    """The adapted model in PyTorch, in each of `dtypes`, with the weights that the graph's products and its embedding
    stand for; the rest is the base's.

    Raises:
        ExportError: a linear layer of the base that is in one of its blocks is not found in the graph.
    """
    model = read_graph(bundle)
    detach(model)
    DequantizeProducts()(model)
    linears = base.signature.linears
    sizes = {path: (linear.in_features, linear.out_features) for path, linear in linears.items()}
    found, findings = find_modules(model.graph, sizes)
    # A pooler, or a head of another task, need not be in the graph.
    outside = {path for path in sizes.keys() - found.keys() if is_outside(path)}
    inside = [each for each in findings if each.partition(":")[0] not in outside]
    raise_findings(f"{bundle.folder}: not all of the base's layers are found in the graph", inside)
    if outside:
        reporter.warn(f"{', '.join(sorted(outside))}: not found in the graph, and computed with as the base has it.")
    held = _HeldByProducts({f"{path}.weight": answer for path, answer in found.items()}, linears)
    runners = [TorchRunner(base, adapter, dtype, held=held) for dtype in dtypes]
    for table in _tables(bundle, model):
        for runner in runners:
            runner.hold_table(table)
    return runners


class _HeldByProducts:
    """Weights of the base as a graph's products have them (`torch_runner.HeldWeights`)."""

    def __init__(self, found: Mapping[str, Found], linears: Mapping[str, LinearShape]) -> None:
        self._found, self._linears = found, linears

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def read(self, name: str) -> np.ndarray:
        spans = self._found[name].spans
        weight = np.concatenate([_weight_of(span.product)[:, span.start : span.end] for span in spans], axis=1)
        return weight if self._linears[name.removesuffix(".weight")].transposed else weight.T


def _weight_of(product: Product) -> np.ndarray:
    """The projection's weight, float64 [in, out]."""
    weight = dequantised(product.node, np.float64)
    release(product)
    if weight is None:
        name = product.node.name or product.output.name
        raise ExportError(f"{name:.120}: its weights are in a form that is not read ({product.form}).")
    return weight if product.scale is None else weight * product.scale.numpy().reshape(-1, 1)


def _tables(bundle: Bundle, model: ir.Model) -> Iterator[np.ndarray]:
    """The tables [rows, width] that the graph looks ids or places up in, as it computes them."""
    names = [str(node.name) for node in model.graph if node.op_type in ("Gather", "GatherBlockQuantized")]
    for name in names:
        cut = model.clone()
        node = cut.graph.node(name)
        table = node.inputs[0]
        shape = table.shape.numpy() if table is not None and table.shape is not None and table.shape.is_static() else ()
        axis = node.attributes.get_int("axis", node.attributes.get_int("gather_axis", 0))
        if len(shape) != 2 or axis != 0:
            continue
        value = node.outputs[0]
        while (readers := readers_of(value)) and readers[0].op_type in ("DequantizeLinear", "Cast"):
            value = readers[0].outputs[0]
        ids = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "rows"]))
        node.replace_input_with(1, ids)
        cut.graph.outputs[:] = [value]
        common.RemoveUnusedNodesPass()(cut)
        if any(each.uses() for each in cut.graph.inputs):
            # It is computed of what the graph is given.
            continue
        cut.graph.inputs[:] = [ids]
        rows = np.arange(shape[0])[None]
        yield run_session(open_model(cut, bundle), {"rows": rows})[str(value.name)][0]


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
