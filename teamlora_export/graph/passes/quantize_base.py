"""Quantises the base's linear weights on their way to the disk (`--weights int4`, `int8`)."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.graph import op
from teamlora_export.graph.passes.last_logits import LOGITS
from teamlora_export.graph.passes.name_nodes import NameNodes
from teamlora_export.graph.quantized import DOMAIN, OP_TYPE, Scheme
from teamlora_export.graph.weights import OP_SOURCES, Quantised, Recipe, new_weight, recipe_of, static_type, transposed

# On a CPU, activations are rounded to 8 bits for these products, block by block: what makes codes fast there, and what
# onnxruntime-genai's builder asks for. Runtimes on a GPU pass it over.
ACCURACY_LEVEL = 4


class QuantizeBase(ir.passes.InPlacePass):
    """Replaces products with stored 2-D weights of the base by `com.microsoft.MatMulNBits`, whose inputs are recipes of
    the same parts.

    Routers of a mixture of experts stay as they are: little differences decide which experts they take. So does what no
    product reads (embeddings, norms, biases), and all that is the adapter's.

    Args:
        weights: of all products but the last.
        head: of the last ahead of `logits`; None leaves it as it is.

    Attributes:
        heads: how many products were quantised by `head`, in the last call.
    """

    def __init__(self, weights: Scheme, head: Scheme | None) -> None:
        super().__init__()
        self.weights, self.head = weights, head
        self.heads = 0

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        heads = _last_products(value for value in graph.outputs if value.name == LOGITS)
        routers = _last_products(node.inputs[0] for node in graph if node.op_type == "TopK")
        modified = False
        self.heads = 0
        for node in graph:
            scheme = self.head if node in heads else self.weights
            weight = _weight_of(node)
            if scheme is not None and weight is not None and node not in routers:
                _quantise(graph, node, weight, scheme)
                modified = True
                self.heads += node in heads
        if modified:
            model.opset_imports[DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
            NameNodes()(model)
        return ir.passes.PassResult(model, modified)


def _last_products(values: Iterable[ir.Value | None]) -> set[ir.Node]:
    """The products with weights that come last ahead of `values`."""
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    waiting = [value.producer() for value in values if value is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if _weight_of(node) is not None:
            found.add(node)
            continue
        # What experts are added to, not what they read.
        inputs = node.inputs[1:2] if op.is_op(node) else node.inputs
        waiting += [value.producer() for value in inputs if value is not None]
    return found


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The base's weight [in, out] of a product, where its recipe says what each of its columns is."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    if node.op_type == "Gemm" and not _is_plain(node):
        return None
    weight = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        # Stored once for the embedding and the head.
        weight = transposed(producer.inputs[0])
    elif weight is not None and node.attributes.get_int("transB", 0) == 1:
        weight = transposed(weight)
    recipe = recipe_of(weight)
    if weight is None or recipe is None or weight.shape is None or len(weight.shape) != 2:
        return None
    is_of_base = all(part.source not in OP_SOURCES for part in recipe.parts)
    return weight if is_of_base and (len(recipe.parts) == 1 or recipe.axis == 1) else None


def _is_plain(node: ir.Node) -> bool:
    """x W + c, c a number for each column."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    attributes = node.attributes
    return (
        attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
        and attributes.get_int("transA", 0) == 0
        and (bias is None or (bias.shape is not None and len(bias.shape) == 1))
    )


def _quantise(graph: ir.Graph, node: ir.Node, weight: ir.Value, scheme: Scheme) -> None:
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    inputs: list[ir.Value | None] = [node.inputs[0], *_stored(graph, weight, scheme)]
    if bias is not None:
        inputs += [None] * (5 - len(inputs)) + [bias]
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.domain, node.op_type = DOMAIN, OP_TYPE
    rows, columns = static_type(weight)[1]
    attributes = {"K": rows, "N": columns, "bits": scheme.bits, "block_size": scheme.block}
    attributes["accuracy_level"] = ACCURACY_LEVEL
    node.attributes.clear()
    node.attributes.update({name: ir.AttrInt64(name, number) for name, number in attributes.items()})


def _stored(graph: ir.Graph, weight: ir.Value, scheme: Scheme) -> list[ir.Value]:
    """Codes, scales and, where the scheme has some, zero points; one copy for all products with a weight."""
    dtype, (rows, columns) = static_type(weight)
    recipe = recipe_of(weight)
    assert recipe is not None
    kinds = {
        "codes": (ir.DataType.UINT8, scheme.codes_shape(rows, columns)),
        "scales": (dtype, scheme.scales_shape(rows, columns)),
        **({"zeros": (ir.DataType.UINT8, scheme.zeros_shape(rows, columns))} if scheme.zero_points else {}),
    }
    values = []
    for role, (kind, shape) in kinds.items():
        name = f"{weight.name}.{role}"
        if name not in graph.initializers:
            made = Recipe(recipe.parts, quantised=Quantised(role, scheme))
            graph.initializers.add(new_weight(name, kind, shape, made))
        values.append(graph.initializers[name])
    return values
