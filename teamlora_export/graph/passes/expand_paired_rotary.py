"""Takes `RotaryEmbedding` of pairs apart again, for builders of engines that cannot do it.

TensorRT-RTX 1.7.1 parses `interleaved=1` into its own layer, and builds a graph of that node alone; in the graph of a
whole model (GPT-J, GLM, Cohere) its compiler ends in an internal error (ssa.cpp). Rotations of halves are not touched.
This can go when `tests/engine/test_build.py` builds GLM without it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import onnx_ir as ir

from teamlora_export.graph.passes.match import integers, replace


class ExpandPairedRotary(ir.passes.InPlacePass):
    """Replaces each by the operator's definition, written in products and sums, exactly."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [
            node
            for node in model.graph
            if node.op_type == "RotaryEmbedding"
            and node.domain == ""
            and node.attributes.get_int("interleaved", 0) == 1
        ]
        for node in nodes:
            _Expansion(model.graph, node).run()
        return ir.passes.PassResult(model, bool(nodes))


class _Expansion:
    """Of one node, which turns x [batch, heads, sequence, size] by tables [batch, sequence, turned / 2]."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self._name = node.outputs[0].name

    def run(self) -> None:
        x, cos, sin = self._node.inputs[:3]
        assert x is not None
        turned = self._node.attributes.get_int("rotary_embedding_dim", 0)
        first = self._slice(x, 0, turned) if turned else x
        pairs = self._add("Reshape", [first, self._integers("pairs", 0, 0, 0, -1, 2)])
        halves = self._integers("halves", 1, 1)
        node = ir.node("Split", [pairs, halves], {"axis": -1}, num_outputs=2)
        even, odd = (self._place(node, value) for value in node.outputs)
        axes = self._integers("axes", 1, 4)
        cos, sin = (self._add("Unsqueeze", [table, axes]) for table in (cos, sin))
        real = self._add("Sub", [self._add("Mul", [even, cos]), self._add("Mul", [odd, sin])])
        imaginary = self._add("Add", [self._add("Mul", [odd, cos]), self._add("Mul", [even, sin])])
        stacked = self._add("Concat", [real, imaginary], axis=-1)
        result = self._add("Reshape", [stacked, self._integers("flat", 0, 0, 0, -1)])
        if turned:
            result = self._add("Concat", [result, self._slice(x, turned, sys.maxsize)], axis=-1)
        replace(self._graph, self._node.outputs[0], result)

    def _slice(self, x: ir.Value, start: int, end: int) -> ir.Value:
        bounds = [self._integers(f"{name}.{start}", number) for name, number in (("start", start), ("end", end))]
        return self._add("Slice", [x, *bounds, self._integers(f"axis.{start}", 3)])

    def _integers(self, name: str, *numbers: int) -> ir.Value:
        return integers(self._graph, f"{self._name}.{name}", numbers)

    def _add(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        return self._place(node, node.outputs[0])

    def _place(self, node: ir.Node, value: ir.Value) -> ir.Value:
        if node.graph is None:
            self._graph.insert_before(self._node, node)
            node.name = f"{self._name}/{node.op_type}.{len(self._graph)}"
        value.type, value.name = self._node.outputs[0].type, f"{node.name}.{value.index()}"
        return value
