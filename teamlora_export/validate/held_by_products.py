"""The adapted model in PyTorch with the weights that another tool's graph holds, whatever it quantised them to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from teamlora_export.adapter.check import LinearShape
from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.exact import DequantizeProducts
from teamlora_export.attach.insert import detach
from teamlora_export.attach.match import WEIGHTS, Found, find_modules
from teamlora_export.attach.names import is_outside
from teamlora_export.attach.numbers import weight_of
from teamlora_export.attach.stored import readers_of
from teamlora_export.attach.weigh import Weigher
from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import read_graph
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import read_extents
from teamlora_export.progress import Reporter
from teamlora_export.validate.onnx_runner import open_model, run_session
from teamlora_export.validate.torch_runner import TorchRunner

_MOST_SHOWN = 3


class NotHeldError(ExportError):
    """A graph does not show all of the base's weights."""


def weigher_of(base: BaseModel) -> Weigher | None:
    """The base's weights, to be compared with a graph's; None where they are in no safetensors."""
    return Weigher(base.source, base.aliases()) if read_extents(base.source) else None


def holding_weights(
    bundle: Bundle,
    base: BaseModel,
    adapter: AdapterSpec,
    dtypes: Sequence[torch.dtype],
    weigher: Weigher | None,
    reporter: Reporter,
) -> list[TorchRunner]:
    """The adapted model in PyTorch, in each of `dtypes`, with the weights that the graph's products and its embedding
    stand for; the rest is the base's.

    Raises:
        NotHeldError: a linear layer of the base that is in one of its blocks is not found in the graph, with the base's
            weights as far as they can be compared, or is there in a form that is not read.
    """
    model = read_graph(bundle)
    detach(model)
    DequantizeProducts()(model)
    linears = base.signature.linears
    sizes = {path: (linear.in_features, linear.out_features) for path, linear in linears.items()}
    found, problems = find_all(model.graph, sizes, weigher)
    # A pooler, or a head of another task, need not be in the graph.
    outside = {path for path in problems if is_outside(path)}
    unread = {
        path: f"its weights are in a form that is not read ({span.product.form})"
        for path, answer in found.items()
        for span in answer.spans
        if WEIGHTS not in answer.evidence and weight_of(span.product, columns=np.zeros(1, np.int64)) is None
    }
    inside = [f"{path}: {problem}" for path, problem in {**problems, **unread}.items() if path not in outside]
    if inside:
        more = f" and {len(inside) - _MOST_SHOWN} more" if len(inside) > _MOST_SHOWN else ""
        listed = "; ".join(inside[:_MOST_SHOWN])
        raise NotHeldError(f"{bundle.folder}: not all of the base's layers are found in the graph ({listed}{more}).")
    if outside:
        reporter.warn(f"{', '.join(sorted(outside))}: not found in the graph, and computed with as the base has it.")
    held = _HeldByProducts({f"{path}.weight": answer for path, answer in found.items()}, linears)
    runners = [TorchRunner(base, adapter, dtype, held=held) for dtype in dtypes]
    for table in _tables(bundle, model):
        for runner in runners:
            runner.hold_table(table)
    return runners


def find_all(
    graph: ir.Graph, sizes: Mapping[str, tuple[int, int]], weigher: Weigher | None
) -> tuple[dict[str, Found], dict[str, str]]:
    """The products of layers of the base, and what is wrong with those that are not found. A layer whose weight the
    checkpoint has by another name (transformers converts some) is found by its name and place alone."""
    found, problems = find_modules(graph, sizes, weigher)
    if weigher is None:
        return found, problems
    known = {path for path in sizes if weigher.knows(path)}
    others, otherwise = find_modules(graph, sizes)
    found |= {path: answer for path, answer in others.items() if path not in known}
    return found, {path: text for path, text in problems.items() if path in known} | {
        path: text for path, text in otherwise.items() if path not in known
    }


class _HeldByProducts:
    """Weights of the base as a graph's products have them (`torch_runner.HeldWeights`)."""

    def __init__(self, found: Mapping[str, Found], linears: Mapping[str, LinearShape]) -> None:
        self._found, self._linears = found, linears

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def read(self, name: str) -> np.ndarray:
        spans = self._found[name].spans
        parts = [(weight_of(span.product, np.float64), span) for span in spans]
        assert all(part is not None for part, _ in parts)
        weight = np.concatenate([part[:, span.start : span.end] for part, span in parts if part is not None], axis=1)
        return weight if self._linears[name.removesuffix(".weight")].transposed else weight.T


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
