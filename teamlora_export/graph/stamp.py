"""Makes a deep model's graph of a shallow one's, by repeating its layers. What the full trace would give, in seconds.

    cut      the shallow graph into what all layers share, each layer, and the head, at the residual stream
    prove    that layers of one kind are the same computation, up to names, weights and caches
    repeat   each layer of the deep model from the shallow layer of its kind

A layer may read what all share, its own weights and cache, and the layer before it through one value; nothing else.
Where that or the proof fails, `LayersDiffer` says why, and the caller traces every layer instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from teamlora_export.graph.layers import LayerPlan
from teamlora_export.graph.passes.module_outputs import COLUMNS_KEY, MODULES_KEY
from teamlora_export.graph.passes.name_nodes import NameNodes
from teamlora_export.graph.record import layer_of
from teamlora_export.graph.weights import WeightTensor, new_weight, recipe_of, static_type

_CACHE = re.compile(r"^(past_key_values|present)\.(\d+)\.(key|value)$")


class LayersDiffer(Exception):
    """The layers of a graph cannot be cut apart, or are not alike."""


@dataclass(frozen=True)
class _Cut:
    """A shallow graph in parts. `residuals[j]` is what layer j hands on; `entry` is what layer 0 reads in its place."""

    shared: list[ir.Node]
    layers: list[list[ir.Node]]
    head: list[ir.Node]
    residuals: list[ir.Value]
    entry: ir.Value


def stamp(model: ir.Model, plan: LayerPlan) -> None:
    """Replace the graph of `model` (of `plan`'s shallow model, rewritten) by the deep model's, in place.

    Raises:
        LayersDiffer: and leaves `model` as it was.
    """
    cut = _cut(model.graph, plan)
    for left, right in plan.pairs:
        prove_alike(
            _layer_ends(model.graph, cut, left),
            _layer_ends(model.graph, cut, right),
            cut,
            plan,
            (left, right),
        )
    model.graph = _Repeater(model.graph, cut, plan).repeat()
    NameNodes()(model)


def _cut(graph: ir.Graph, plan: LayerPlan) -> _Cut:
    depth = len(plan.sample)
    entry = _value_of(graph, f"{plan.prefix}.input")
    own = _nodes_of_layers(graph, entry, plan)
    residuals = [_value_of(graph, f"{plan.prefix}.{index}") for index in range(depth)]
    layers: list[list[ir.Node]] = []
    taken: set[ir.Node] = set()
    for index in range(depth):
        ends = [residuals[index], *(v for v in graph.outputs if _cache_layer(v) == index)]
        ancestors = _ancestors(ends) - taken
        layers.append([node for node in graph if node in ancestors and node in own])
        taken |= set(layers[-1])
    shared = [node for node in graph if node not in own]
    head = [node for node in graph if node in own and node not in taken]
    cut = _Cut(shared, layers, head, residuals, entry)
    _check_reads(cut, plan)
    return cut


def _nodes_of_layers(graph: ir.Graph, entry: ir.Value, plan: LayerPlan) -> set[ir.Node]:
    """Nodes that depend on what enters the first layer, or on a layer's weights or cache. The size of these does not
    count: it is the same for all layers."""
    own: set[ir.Node] = set()
    for node in graph:
        if any(
            isinstance(a, ir.Attr) and a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for a in node.attributes.values()
        ):
            raise LayersDiffer(f"{node.name} holds a graph of its own")
        values = [value for value in node.inputs if value is not None]
        reads_layers = any(value is entry or _source_layer(value, plan) is not None for value in values)
        if any(value.producer() in own for value in values) or (reads_layers and node.op_type != "Shape"):
            own.add(node)
    return own


def _source_layer(value: ir.Value, plan: LayerPlan) -> int | None:
    """The layer that a weight or a cache input belongs to."""
    recipe = recipe_of(value)
    if recipe is not None:
        return layer_of(recipe.parts[0].key, plan.prefix)[0]
    return _cache_layer(value)


def _cache_layer(value: ir.Value) -> int | None:
    match = _CACHE.match(value.name or "")
    return int(match[2]) if match else None


def _value_of(graph: ir.Graph, path: str) -> ir.Value:
    """The value that the tracer marked with `path`."""
    for node in graph:
        for value in node.outputs:
            if path in value.metadata_props.get(MODULES_KEY, "").split(","):
                return value
    raise LayersDiffer(f"{path} is no value of the graph")


def _ancestors(values: Iterable[ir.Value]) -> set[ir.Node]:
    found: set[ir.Node] = set()
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(value.producer() for value in node.inputs if value is not None)
    return found


def _check_reads(cut: _Cut, plan: LayerPlan) -> None:
    shared = set(cut.shared)
    parts = [*enumerate(cut.layers), (len(cut.layers), cut.head)]
    for index, nodes in parts:
        own = set(nodes)
        before = cut.residuals[index - 1] if index else cut.entry
        for node in nodes:
            for value in node.inputs:
                if value is None or value is before or value.producer() in own or value.producer() in shared:
                    continue
                source = _source_layer(value, plan)
                is_constant = value.producer() is None and (source is None or source == index)
                if not is_constant:
                    raise LayersDiffer(f"{node.name} of layer {index} reads {value.name}")


def _layer_ends(graph: ir.Graph, cut: _Cut, index: int) -> dict[str, ir.Value]:
    ends = {"residual": cut.residuals[index]}
    for value in graph.outputs:
        match = _CACHE.match(value.name or "")
        if match and int(match[2]) == index:
            ends[match[3]] = value
    return ends


def prove_alike(
    left: Mapping[str, ir.Value],
    right: Mapping[str, ir.Value],
    cut: _Cut,
    plan: LayerPlan,
    pair: tuple[int, int],
) -> None:
    """Walk two layers from their results to their sources, in step; raise `LayersDiffer` where they part."""
    if left.keys() != right.keys():
        raise LayersDiffer(f"layers {pair} return different things")
    before = tuple(cut.residuals[index - 1] if index else cut.entry for index in pair)
    twin: dict[ir.Value, ir.Value] = {before[0]: before[1]}
    waiting = [(left[name], right[name]) for name in left]
    own = (set(cut.layers[pair[0]]), set(cut.layers[pair[1]]))
    if len(own[0]) != len(own[1]):
        raise LayersDiffer(f"layers {pair} have {len(own[0])} and {len(own[1])} nodes")
    while waiting:
        a, b = waiting.pop()
        if a in twin:
            if twin[a] is not b:
                raise LayersDiffer(f"{a.name} stands for both {twin[a].name} and {b.name}")
            continue
        twin[a] = b
        m, n = a.producer(), b.producer()
        if m is None or n is None or m not in own[0] or n not in own[1]:
            if not _same_source(a, b, plan, pair):
                raise LayersDiffer(f"{a.name} and {b.name} are different sources")
            continue
        if not same_operation(m, n) or a.index() != b.index() or a.dtype != b.dtype:
            raise LayersDiffer(f"{m.name} and {n.name} are different operations")
        for x, y in zip(m.inputs, n.inputs, strict=True):
            if (x is None) != (y is None):
                raise LayersDiffer(f"{m.name} and {n.name} differ in an optional input")
            if x is not None and y is not None:
                waiting.append((x, y))


def same_operation(a: ir.Node, b: ir.Node) -> bool:
    """Equal in everything but names and the values they read and make."""
    return (
        (a.domain, a.op_type, a.overload, len(a.inputs), len(a.outputs))
        == (b.domain, b.op_type, b.overload, len(b.inputs), len(b.outputs))
        and a.attributes.keys() == b.attributes.keys()
        and all(same_attribute(a.attributes[name], b.attributes[name]) for name in a.attributes)
    )


def same_attribute(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type != b.type:
        return False
    if a.type == ir.AttributeType.TENSOR:
        return np.array_equal(a.as_tensor().numpy(), b.as_tensor().numpy())
    return bool(a.value == b.value)


def same_constant(a: ir.Value, b: ir.Value) -> bool:
    """Two initializers of the same numbers (weights are not numbers yet, and never equal here)."""
    x, y = a.const_value, b.const_value
    if x is None or y is None or isinstance(x, WeightTensor) or isinstance(y, WeightTensor):
        return False
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.array_equal(x.numpy(), y.numpy(), equal_nan=x.dtype.is_floating_point())
    )


def _same_source(a: ir.Value, b: ir.Value, plan: LayerPlan, pair: tuple[int, int]) -> bool:
    """One value that both layers share, equal constants, the same weight or cache of either layer."""
    if a is b or same_constant(a, b):
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = recipe_of(a), recipe_of(b)
    if left is not None and right is not None:
        return left.renamed(lambda key: _moved(key, plan.prefix, *pair)) == right
    cache = (_CACHE.match(a.name or ""), _CACHE.match(b.name or ""))
    if cache[0] is None or cache[1] is None:
        return False
    return (int(cache[0][2]), int(cache[1][2])) == pair and cache[0][3] == cache[1][3]


def _moved(path: str, prefix: str, source: int, target: int) -> str:
    index, rest = layer_of(path, prefix)
    return f"{prefix}.{target}" + (f".{rest}" if rest else "") if index == source else path


class _Repeater:
    """Builds the deep graph. Shared nodes and the head are taken over; layers are copied."""

    def __init__(self, graph: ir.Graph, cut: _Cut, plan: LayerPlan) -> None:
        self._graph, self._cut, self._plan = graph, cut, plan
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def repeat(self) -> ir.Graph:
        common: dict[ir.Value, ir.Value] = {}
        for value in self._graph.inputs:
            if _cache_layer(value) is None:
                common[value] = self._add_input(value, value.name or "")
        self._copy_nodes(self._cut.shared, common, source=-1, target=-1)
        # Shared nodes may ask the first cache for its size; its contents belong to layer 0 alone.
        common = {old: new for old, new in common.items() if _cache_layer(old) is None}
        residual = common[self._cut.entry]
        for target, source in enumerate(self._plan.sources):
            before = self._cut.residuals[source - 1] if source else self._cut.entry
            values = {**common, before: residual}
            self._copy_nodes(self._cut.layers[source], values, source, target)
            residual = values[self._cut.residuals[source]]
        self._copy_nodes(self._cut.head, {**common, self._cut.residuals[-1]: residual}, source=-1, target=-1)
        self._add_last_residual(residual)
        self._inputs.sort(key=lambda value: _layer_order(value)[0])
        self._outputs.sort(key=_layer_order)
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=self._graph.opset_imports,
            name=self._graph.name,
        )

    def _add_last_residual(self, residual: ir.Value) -> None:
        """A model without a head returns what its last layer hands on."""
        shallow = self._cut.residuals[-1]
        if shallow.is_graph_output():
            residual.name = shallow.name
            self._outputs.append(residual)

    def _copy_nodes(self, nodes: list[ir.Node], values: dict[ir.Value, ir.Value], source: int, target: int) -> None:
        """Append copies of `nodes`; `values` maps what they read to what the copies read, and grows by what these
        make."""
        for node in nodes:
            inputs = [
                None if v is None else values.get(v) or self._source(v, values, source, target) for v in node.inputs
            ]
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                list(node.attributes.values()),
                overload=node.overload,
                num_outputs=len(node.outputs),
                metadata_props={},
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                self._describe(old, new, source, target)
                values[old] = new
                if old.is_graph_output() and old is not self._cut.residuals[-1]:
                    self._outputs.append(new)
            self._nodes.append(copy)

    def _source(self, value: ir.Value, values: dict[ir.Value, ir.Value], source: int, target: int) -> ir.Value:
        """The deep graph's counterpart of a weight, constant or input that is read for the first time."""
        recipe = recipe_of(value)
        name = self._renamed(value.name or "", source, target)
        if value.is_graph_input():
            made = next((v for v in self._inputs if v.name == name), None) or self._add_input(value, name)
        elif recipe is None:
            made = self._constant(value)
        elif name in self._initializers:
            made = self._initializers[name]
        else:
            moved = recipe.renamed(lambda key: _moved(key, self._plan.prefix, source, target))
            made = new_weight(name, *static_type(value), moved)
            self._initializers[name] = made
        values[value] = made
        return made

    def _constant(self, value: ir.Value) -> ir.Value:
        """One for all copies. A constant that has the name of a layer's buffer may be read by another layer too, which
        happened to need the same number, so its name says no layer."""
        name = value.name or ""
        if layer_of(name, self._plan.prefix)[0] is not None:
            name = f"constant/{name}"
        if name not in self._initializers:
            made = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self._initializers[name] = made
        return self._initializers[name]

    def _add_input(self, value: ir.Value, name: str) -> ir.Value:
        self._inputs.append(ir.Value(name=name, type=value.type, shape=value.shape))
        return self._inputs[-1]

    def _describe(self, old: ir.Value, new: ir.Value, source: int, target: int) -> None:
        new.type, new.shape = old.type, old.shape
        new.name = self._renamed(old.name or "", source, target)
        if COLUMNS_KEY in old.metadata_props:
            new.metadata_props[COLUMNS_KEY] = old.metadata_props[COLUMNS_KEY]
        if MODULES_KEY in old.metadata_props:
            modules = old.metadata_props[MODULES_KEY].split(",")
            new.metadata_props[MODULES_KEY] = ",".join(_moved(m, self._plan.prefix, source, target) for m in modules)

    def _renamed(self, name: str, source: int, target: int) -> str:
        """A value's name in the copy of a layer: moved where it says its layer, marked with it where it does not."""
        cache = _CACHE.match(name)
        if cache:
            # What all layers share asks the first cache of its kind for the size.
            layer = self._plan.sample[int(cache[2])] if target < 0 else target
            return f"{cache[1]}.{layer}.{cache[3]}"
        if target < 0:
            return name
        if layer_of(name, self._plan.prefix)[0] is not None:
            return _moved(name, self._plan.prefix, source, target)
        return f"{self._plan.prefix}.{target}/{name}"


def _layer_order(value: ir.Value) -> tuple[int, str]:
    """Caches layer by layer, after all else."""
    layer = _cache_layer(value)
    return (-1 if layer is None else layer, value.name or "")
