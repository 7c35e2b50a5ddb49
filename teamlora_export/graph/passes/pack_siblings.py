"""Packs adapted projections that read the same input (q/k/v, gate/up) into one node, and their bases into one
product."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.graph import op
from teamlora_export.graph.weights import joined, recipe_of

# What the CUDA kernels take in one launch.
MOST_SIBLINGS = 4


class PackSiblings(ir.passes.InPlacePass):
    """Replaces nodes of the op that read the same x, with equal ranks and number of experts, by one node and a Split.

    Each column of a product depends on its own column of weights only, so packing changes no value beyond the order in
    which a runtime may add. Base projections are packed where each is a plain product with a stored weight (and all or
    none have a bias); otherwise their outputs are concatenated.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        groups: dict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if op.is_op(node):
                groups[_compatibility(node)].append(node)
        modified = False
        for nodes in groups.values():
            for start in range(0, len(nodes), MOST_SIBLINGS):
                siblings = nodes[start : start + MOST_SIBLINGS]
                if len(siblings) > 1:
                    _pack(model.graph, siblings)
                    modified = True
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)


def _compatibility(node: ir.Node) -> tuple[object, ...]:
    """Nodes that agree in this may become one."""
    x, _base, down, _mix, up = node.inputs
    assert down is not None
    assert up is not None
    assert down.shape is not None
    assert up.shape is not None
    return (
        x,
        node.attributes["num_experts"].as_int(),
        node.attributes["shared_down"].as_int(),
        down.shape[0],
        up.shape[0],
        down.dtype,
    )


def _pack(graph: ir.Graph, siblings: Sequence[ir.Node]) -> None:
    first = siblings[0]
    name = joint_name([node.outputs[0].name or "" for node in siblings])
    weights = [_join_inputs(graph, siblings, index, f"{name}.{op.INPUTS[index]}", axis) for index, axis in _JOIN_AXES]
    base = _pack_bases(graph, siblings, name) or _concat_bases(graph, siblings, name)
    out_splits = [width for node in siblings for width in node.attributes["out_splits"].as_ints()]
    attributes: dict[str, int | list[int]] = {
        "num_experts": first.attributes["num_experts"].as_int(),
        "shared_down": first.attributes["shared_down"].as_int(),
        "out_splits": out_splits,
    }
    packed = ir.node(op.NAME, [first.inputs[0], base, *weights], attributes, domain=op.DOMAIN)
    _describe(packed.outputs[0], name, base)
    sizes = _sizes(graph, f"{name}.out_splits", out_splits)
    split = ir.node("Split", [packed.outputs[0], sizes], {"axis": -1}, num_outputs=len(siblings))
    graph.insert_before(first, [packed, split])
    for node, part in zip(siblings, split.outputs, strict=True):
        old = node.outputs[0]
        part.type, part.shape = old.type, old.shape
        part.metadata_props.update(old.metadata_props)
        ir.convenience.replace_all_uses_with(old, part, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        part.name = old.name


def _sizes(graph: ir.Graph, name: str, widths: Sequence[int]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(widths)]))
    value.const_value = ir.tensor(list(widths), dtype=ir.DataType.INT64, name=name)
    graph.initializers.add(value)
    return value


# Input index -> axis along which siblings are joined: down, mix, up.
_JOIN_AXES = ((2, 0), (3, 0), (4, 1))


def _join_inputs(graph: ir.Graph, siblings: Sequence[ir.Node], index: int, name: str, axis: int) -> ir.Value:
    value = joined(name, [node.inputs[index] for node in siblings], axis)  # type: ignore[misc]
    assert value is not None, f"{name}: an input of the op is not a stored weight"
    graph.initializers.add(value)
    return value


@dataclass(frozen=True)
class _Product:
    """A base projection: x times a stored weight [in, out], plus a stored bias [out] or None."""

    weight: ir.Value
    bias: ir.Value | None


def _pack_bases(graph: ir.Graph, siblings: Sequence[ir.Node], name: str) -> ir.Value | None:
    """One product for all base projections, or None where they are not all plain ones."""
    products = [_as_product(node) for node in siblings]
    if any(product is None for product in products):
        return None
    biases = [product.bias for product in products if product is not None]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return None
    weight = joined(f"{name}.weight", [product.weight for product in products if product is not None], axis=1)
    if weight is None:
        return None
    graph.initializers.add(weight)
    node = ir.node("MatMul", [siblings[0].inputs[0], weight])
    _describe(node.outputs[0], f"{name}.matmul" if biases[0] is not None else f"{name}.base", siblings[0].inputs[1])
    graph.insert_before(siblings[0], node)
    if biases[0] is not None:
        bias = joined(f"{name}.bias", [bias for bias in biases if bias is not None], axis=0)
        assert bias is not None
        graph.initializers.add(bias)
        node = ir.node("Add", [node.outputs[0], bias])
        _describe(node.outputs[0], f"{name}.base", siblings[0].inputs[1])
        graph.insert_before(siblings[0], node)
    return node.outputs[0]


def _concat_bases(graph: ir.Graph, siblings: Sequence[ir.Node], name: str) -> ir.Value:
    node = ir.node("Concat", [sibling.inputs[1] for sibling in siblings], {"axis": -1})
    _describe(node.outputs[0], f"{name}.base", siblings[0].inputs[1])
    graph.insert_before(siblings[0], node)
    return node.outputs[0]


def _as_product(node: ir.Node) -> _Product | None:
    x, base = node.inputs[0], node.inputs[1]
    producer = base.producer() if base is not None else None
    bias = None
    if producer is not None and producer.op_type == "Add":
        bias = next((v for v in producer.inputs if recipe_of(v) is not None), None)
        product = next((v for v in producer.inputs if v is not bias), None)
        if bias is None or bias.shape is None or len(bias.shape) != 1:
            return None
        producer = product.producer() if product is not None else None
    if producer is None or producer.op_type != "MatMul" or producer.inputs[0] is not x:
        return None
    weight = producer.inputs[1]
    return _Product(weight, bias) if weight is not None and recipe_of(weight) is not None else None


def _describe(value: ir.Value, name: str, like: ir.Value | None) -> None:
    """Name and type of a packed value: `like` it in all but its last dimension."""
    assert like is not None
    value.name = name
    value.type = like.type


def joint_name(paths: Sequence[str]) -> str:
    """`a.b.q_proj`, `a.b.k_proj` -> `a.b.q_proj+k_proj`."""
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return "+".join(paths)
    return paths[0].rpartition(".")[0] + "." + "+".join(path.rpartition(".")[2] for path in paths)
