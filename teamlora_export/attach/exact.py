"""Lets the products of a graph compute what their weights mean, without what they round on the way.

A product of integers rounds what it reads to 8 bits. That is what makes it fast, and no part of what the graph says of
its weights; it hides faults that are smaller.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.attach.products import Product, find_products
from teamlora_export.attach.stored import before_quantising


class DequantizeProducts(ir.passes.InPlacePass):
    """Makes products of integers MatMuls of what their codes mean, and lets all products read x as it was before it was
    quantised."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for product in find_products(model.graph):
            x = product.node.inputs[0]
            assert x is not None
            read = before_quantising(x)
            if product.integers is not None:
                _replace(model.graph, product, read or x)
            elif read is not None:
                product.node.replace_input_with(0, read)
            modified = modified or read is not None or product.integers is not None
        if modified:
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _replace(graph: ir.Graph, product: Product, x: ir.Value) -> None:
    """DequantizeLinear -> MatMul (-> Add) in place of a product of integers."""
    integers = product.integers
    assert integers is not None
    # DequantizeLinear takes scales in 16 bits from opset 19 on.
    scale = ir.node("Cast", [integers.scale], {"to": ir.DataType.FLOAT})
    zero = [integers.zero_point] if integers.zero_point is not None else []
    weight = ir.node("DequantizeLinear", [integers.codes, scale.outputs[0], *zero], {"axis": 1})
    cast = ir.node("Cast", weight.outputs, {"to": product.dtype})
    result = ir.node("MatMul", [x, cast.outputs[0]], name=product.node.name)
    nodes = [scale, weight, cast, result]
    if integers.bias is not None:
        nodes.append(ir.node("Add", [result.outputs[0], integers.bias]))
    last = integers.result.producer()
    assert last is not None
    ir.convenience.replace_nodes_and_values(graph, last, [last], nodes, [integers.result], nodes[-1].outputs)
