"""Which layers are written in ONNX's own operators is told by the graph."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from teamlora_export.graph.lifted import Lifted, find_lifted
from teamlora_export.graph.passes.module_outputs import MODULES_KEY


def test_operators_are_counted_by_layer():
    text = """<ir_version: 10, opset_import: ["" : 24]> g (float[n, 4] x) => (float[n, 4] y)
        <float[4] w = {1, 1, 1, 1}> {
        e = Neg(x) a = RMSNormalization(e, w) b = RMSNormalization(a, w) c = Gelu(b)
        d = RMSNormalization(c, w) f = Add(c, d) y = RMSNormalization(f, w) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    modules = {"e": "m.input", "c": "m.0.act,m.0", "f": "m.1", "y": "norm"}
    for node in model.graph:
        if node.outputs[0].name in modules:
            node.outputs[0].metadata_props[MODULES_KEY] = modules[node.outputs[0].name]
    lifted = find_lifted(model)
    assert lifted == Lifted(7, 2, {"RMSNormalization": 4, "Gelu": 1}, {"RMSNormalization": 2, "Gelu": 1})
    told = "RMSNormalization 4 (in 2 of 2 layers), Gelu 1 (in 1 of 2 layers); 7 nodes in all"
    assert str(lifted) == told
