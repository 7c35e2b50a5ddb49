"""Lifts layer norms that are written out to ONNX's `LayerNormalization` (opset 17)."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.graph.passes.match import is_inner, is_mean, made_by, replace


class LiftLayerNorms(ir.passes.InPlacePass):
    """Replaces the root-mean-square norm (`lift_rms_norms.py`, which runs before) of `x - mean(x)` by one node.

    `nn.LayerNorm` is one as it is traced; this is for models that compute their own (Cohere), in float32. ONNX
    Runtime's kernel errs less than the difference does, where the mean is large.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain == "" and node.op_type == "RMSNormalization":
                modified |= _lift(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _lift(graph: ir.Graph, node: ir.Node) -> bool:
    centered, weight = node.inputs
    difference = made_by(centered, "Sub")
    if difference is None or centered is None or centered.dtype != ir.DataType.FLOAT or not is_inner(centered):
        return False
    x, mean = difference.inputs
    if x is None or not is_mean(mean, x, x):
        return False
    layer_norm = ir.node("LayerNormalization", [x, weight], node.attributes)
    replace(graph, node.outputs[0], layer_norm.outputs[0])
    return True
