"""Stores a weight the way it is multiplied, instead of transposing it on every load."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.graph.weights import recipe_of, transposed


class FoldTransposes(ir.passes.InPlacePass):
    """Replaces Transpose(weight) by a weight whose recipe is transposed.

    A weight that is read as it is elsewhere too (an embedding tied to the head) keeps its Transpose, so that it is
    stored once.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        modified = False
        for node in list(graph):
            weight = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
            if weight is None or recipe_of(weight) is None or any(not _is_transpose(use.node) for use in weight.uses()):
                continue
            flipped = transposed(weight)
            if flipped is None:
                continue
            existing = graph.initializers.get(flipped.name or "")
            if existing is None:
                graph.initializers.add(flipped)
            ir.convenience.replace_all_uses_with(node.outputs[0], existing or flipped)
            graph.remove(node, safe=True)
            if not weight.uses():
                del graph.initializers[weight.name or ""]
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_transpose(node: ir.Node) -> bool:
    return (
        node.op_type == "Transpose" and node.domain == "" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]
    )
