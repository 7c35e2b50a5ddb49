"""Puts the op behind products of a foreign graph.

`y = MixedExpertProjection(x, base, down, mix, up)`, where base is what the product gave. y takes over the name of that,
so that no node that reads it changes; the product's own output is renamed. Modules that read the same x share a node:

    packed in one product      op with `out_splits`                       q, k, v of one MatMul
    three products and more    Concat -> op -> Split                      q, k and v of a MatMul each
    two products               op for each                                gate and up
    packed, adapted in part    Split -> op for each that is -> Concat     q and v alone, or ranks that differ
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.adapter.spec import AdapterSpec, ExpertProjection
from teamlora_export.attach.match import Found
from teamlora_export.attach.products import Product
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.passes.module_outputs import COLUMNS_KEY, MODULES_KEY
from teamlora_export.graph.passes.pack_siblings import MOST_SIBLINGS, joint_name
from teamlora_export.graph.weights import Part, Recipe, new_weight

# Of a few products by themselves, Concat and Split cost more than another node of the op, native or not.
_FEWEST_JOINED = 3


@dataclass(frozen=True)
class _Columns:
    """Columns of a site that a module adapts."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class _Site:
    """Products that read the same x, seen as one: their outputs side by side."""

    products: tuple[Product, ...]
    adapted: tuple[_Columns, ...]

    @property
    def width(self) -> int:
        return sum(product.out_features for product in self.products)


def insert(model: ir.Model, adapter: AdapterSpec, found: Mapping[str, Found]) -> int:
    """Put nodes of the op, without their bodies, behind the products in `found`; return how many. Their weights are
    recipes."""
    order = {node: index for index, node in enumerate(model.graph)}
    sites = _sites(found, adapter, order)
    replaced: dict[ir.Value, ir.Value] = {}
    names = _Names(model.graph)
    for site in sites:
        _Inserter(model.graph, site, adapter, order, replaced, names).insert()
    if any(len(site.products) > 1 for site in sites):
        model.graph.sort()
    return sum(op.is_op(node) for node in model.graph)


def detach(model: ir.Model) -> None:
    """Take the nodes of the op out again, in place, and what `insert` put beside them: what reads them reads the
    products behind them, by the names that these had."""
    nodes = [node for node in model.graph if op.is_op(node)]
    joins = {node: maker for node in nodes if (maker := _maker(node, "Concat")) is not None}
    pieces = dict.fromkeys(maker for node in nodes if (maker := _maker(node, "Split")) is not None)
    for node, join in joins.items():
        for split in [reader for reader in node.outputs[0].consumers() if reader.op_type == "Split"]:
            if _axis(split) == _axis(join) and len(split.outputs) == len(join.inputs):
                for made, source in zip(split.outputs, join.inputs, strict=True):
                    _give_back(made, source)
    wholes = {
        piece: whole
        for piece in pieces
        for whole in {reader for value in piece.outputs for part in _with_op(value) for reader in part.consumers()}
        if whole.op_type == "Concat"
        and _axis(whole) == _axis(piece)
        and [_without_op(value) for value in whole.inputs] == list(piece.outputs)
    }
    for piece, whole in wholes.items():
        _give_back(whole.outputs[0], piece.inputs[0])
    for node in nodes:
        _give_back(node.outputs[0], node.inputs[1])
    model.functions.clear()
    common.RemoveUnusedNodesPass()(model)


def _give_back(made: ir.Value, source: ir.Value | None) -> None:
    """Let what reads `made` read `source`, which takes over its name."""
    assert source is not None
    ir.convenience.replace_all_uses_with(made, source, replace_graph_outputs=True)
    name, made.name = made.name, f"{made.name}/detached"
    source.name = name


def _maker(node: ir.Node, op_type: str) -> ir.Node | None:
    """The node of that type that makes a base."""
    maker = node.inputs[1].producer() if node.inputs[1] is not None else None
    return maker if maker is not None and maker.op_type == op_type else None


def _with_op(value: ir.Value) -> list[ir.Value]:
    return [value, *(node.outputs[0] for node in value.consumers() if op.is_op(node))]


def _without_op(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    return node.inputs[1] if node is not None and op.is_op(node) else value


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0)


def _sites(found: Mapping[str, Found], adapter: AdapterSpec, order: Mapping[ir.Node, int]) -> list[_Site]:
    """Modules of one product, modules of several products, and modules of a product each that are alike."""
    by_product: dict[Product, list[_Columns]] = defaultdict(list)
    sites = []
    for path, answer in found.items():
        if len(answer.spans) > 1:
            products = tuple(span.product for span in answer.spans)
            sites.append(_Site(products, (_Columns(path, 0, sum(p.out_features for p in products)),)))
        else:
            span = answer.spans[0]
            by_product[span.product].append(_Columns(path, span.start, span.end))
    alone: dict[tuple[object, ...], list[tuple[Product, _Columns]]] = defaultdict(list)
    for product, columns in by_product.items():
        columns.sort(key=lambda each: each.start)
        if len(columns) == 1 and columns[0].end - columns[0].start == product.out_features:
            likeness = (product.x, product.dtype, *_sizes(adapter.projections[columns[0].path]))
            alone[likeness].append((product, columns[0]))
        else:
            sites.append(_Site((product,), tuple(columns)))
    for pairs in alone.values():
        pairs.sort(key=lambda pair: order[pair[0].node])
        together = MOST_SIBLINGS if len(pairs) >= _FEWEST_JOINED else 1
        for start in range(0, len(pairs), together):
            sites.append(_joined(pairs[start : start + together]))
    return sites


def _joined(pairs: Sequence[tuple[Product, _Columns]]) -> _Site:
    adapted, start = [], 0
    for product, columns in pairs:
        adapted.append(_Columns(columns.path, start, start + product.out_features))
        start += product.out_features
    return _Site(tuple(product for product, _ in pairs), tuple(adapted))


def _sizes(projection: ExpertProjection) -> tuple[int, int, bool]:
    """Modules that agree in this may share a node."""
    return projection.num_experts, projection.down_rank, projection.shared_down


class _Names:
    """The names of a graph's nodes and values; what is added gets others."""

    def __init__(self, graph: ir.Graph) -> None:
        nodes = list(graph.all_nodes())
        values = [value.name for node in nodes for value in node.outputs]
        ends = [
            value.name
            for inner in (graph, *graph.subgraphs())
            for value in (*inner.inputs, *inner.initializers.values())
        ]
        self._taken = {*values, *ends, *(node.name for node in nodes)}

    def new(self, wanted: str) -> str:
        """The name itself, or with a number behind it where it is taken."""
        name, number = wanted, 0
        while name in self._taken:
            number += 1
            name = f"{wanted}.{number}"
        self._taken.add(name)
        return name


class _Inserter:
    """Inserts one site.

    Args:
        replaced: outputs of products -> what the nodes behind them read; grows. names: of the graph; grows.
    """

    def __init__(
        self,
        graph: ir.Graph,
        site: _Site,
        adapter: AdapterSpec,
        order: Mapping[ir.Node, int],
        replaced: dict[ir.Value, ir.Value],
        names: _Names,
    ) -> None:
        self._graph, self._site, self._adapter, self._replaced, self._names = graph, site, adapter, replaced, names
        self._dtype = site.products[0].dtype
        self._name = joint_name([columns.path for columns in site.adapted])
        makers = [product.output.producer() for product in site.products]
        self._last: ir.Node = max((node for node in makers if node is not None), key=lambda node: order[node])

    def insert(self) -> None:
        outputs = [product.output for product in self._site.products]
        readers = [list(output.uses()) for output in outputs]
        names = [output.name or "" for output in outputs]
        for output, name in zip(outputs, names, strict=True):
            output.name = self._names.new(f"{name}/base")
        base = outputs[0] if len(outputs) == 1 else self._node("Concat", outputs, f"{self._name}.base")[0]
        whole = self._whole(base)
        results = [whole] if len(outputs) == 1 else self._split(whole, [p.out_features for p in self._site.products])
        for output, result, uses, name in zip(outputs, results, readers, names, strict=True):
            result.name, result.shape = name, output.shape
            self._replaced[output] = result
            for node, index in uses:
                node.replace_input_with(index, result)
            for index, value in enumerate(self._graph.outputs):
                if value is output:
                    self._graph.outputs[index] = result
        if len(outputs) > 1 and len(self._site.adapted) == len(outputs):
            for columns, result in zip(self._site.adapted, results, strict=True):
                result.metadata_props[MODULES_KEY] = columns.path

    def _whole(self, base: ir.Value) -> ir.Value:
        """The site's columns with what the experts add."""
        adapted, width = self._site.adapted, self._site.width
        borders = [0, *(columns.end for columns in adapted)]
        alike = len({_sizes(self._adapter.projections[columns.path]) for columns in adapted}) == 1
        if (
            alike
            and [c.start for c in adapted] == borders[:-1]
            and borders[-1] == width
            and len(adapted) <= MOST_SIBLINGS
        ):
            return self._op(base, adapted)
        pieces = sorted({0, width, *(c.start for c in adapted), *(c.end for c in adapted)})
        by_start = {columns.start: columns for columns in adapted}
        # `match` finds no two modules in the same columns.
        assert len(by_start) == len(adapted)
        assert all(before.end <= after.start for before, after in pairwise(adapted))
        parts = self._split(base, [end - start for start, end in pairwise(pieces)])
        for index, part in enumerate(parts):
            part.name = self._names.new(f"{self._name}.base.{index}")
            if pieces[index] in by_start:
                parts[index] = self._op(part, [by_start[pieces[index]]])
        return self._node("Concat", parts, f"{self._name}.whole")[0]

    def _op(self, base: ir.Value, adapted: Sequence[_Columns]) -> ir.Value:
        """A node of the op for modules side by side."""
        paths = [columns.path for columns in adapted]
        first = self._adapter.projections[paths[0]]
        name = joint_name(paths)
        attributes: dict[str, int | list[int]] = {
            "num_experts": first.num_experts,
            "shared_down": int(first.shared_down),
            "out_splits": [columns.end - columns.start for columns in adapted],
        }
        x = self._site.products[0].x
        inputs = [self._replaced.get(x, x), base, *self._weights(name, paths)]
        node = ir.node(op.NAME, inputs, attributes, domain=op.DOMAIN, name=self._names.new(f"{name}/{op.NAME}"))
        y = node.outputs[0]
        self._add(node, name)
        y.metadata_props[MODULES_KEY] = ",".join(paths)
        if len(paths) > 1:
            start = adapted[0].start
            y.metadata_props[COLUMNS_KEY] = ",".join(f"{c.start - start}:{c.end - start}" for c in adapted)
        return y

    def _weights(self, name: str, paths: Sequence[str]) -> list[ir.Value]:
        """down, mix and up of all, joined as the op takes them."""
        shapes = [op.weight_shapes(self._adapter.projections[path]) for path in paths]
        made = []
        for kind, axis in (("down", 0), ("mix", 0), ("up", 1)):
            first = shapes[0][kind]
            shape = (*first[:axis], sum(each[kind][axis] for each in shapes), *first[axis + 1 :])
            dtype = ir.DataType.FLOAT if kind == "mix" else self._dtype
            value = new_weight(
                f"{name}.teamlora_{kind}", dtype, shape, Recipe(tuple(Part(kind, path) for path in paths), axis)
            )
            if value.name in self._graph.initializers:
                raise ExportError(f"{value.name}: the graph has a weight of that name already.")
            self._graph.initializers.add(value)
            made.append(value)
        return made

    def _split(self, value: ir.Value, widths: Sequence[int]) -> list[ir.Value]:
        sizes = ir.Value(
            name=self._names.new(f"{value.name}.sizes"),
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(widths)]),
        )
        sizes.const_value = ir.tensor(list(widths), dtype=ir.DataType.INT64, name=sizes.name)
        self._graph.initializers.add(sizes)
        return self._node("Split", [value, sizes], f"{value.name}.part", outputs=len(widths))

    def _node(self, op_type: str, inputs: Sequence[ir.Value], name: str, outputs: int = 1) -> list[ir.Value]:
        node = ir.node(op_type, inputs, {"axis": -1}, num_outputs=outputs, name=self._names.new(f"{name}/{op_type}"))
        self._add(node, name)
        return list(node.outputs)

    def _add(self, node: ir.Node, name: str) -> None:
        for index, value in enumerate(node.outputs):
            value.name = self._names.new(name if len(node.outputs) == 1 else f"{name}.{index}")
            value.type = ir.TensorType(self._dtype)
        self._graph.insert_after(self._last, node)
        self._last = node
