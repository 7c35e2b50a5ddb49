"""Gives every node a name of its own."""

from __future__ import annotations

import onnx_ir as ir


class NameNodes(ir.passes.InPlacePass):
    """Names each node after its first output and its type, so that a runtime's message about it can be understood."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            node.name = f"{node.outputs[0].name}/{node.op_type}"
        return ir.passes.PassResult(model, True)
