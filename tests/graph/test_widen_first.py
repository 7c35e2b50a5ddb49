"""What a model asks for in float32 is computed in float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.function_libs.torch_lib.ops.core import aten_softmax

from teamlora_export.graph.passes.widen_first import WidenFirst

_FP16, _FP32 = int(ir.DataType.FLOAT16), int(ir.DataType.FLOAT)


def model(body: str, outputs: str = "float[2, 64] y") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": 20]> graph (float16[2, 64] x) => ({outputs}) '
        f"<float16[2, 64] p, int64[1] axes = {{-1}}> {{ {body} }}"
    )


@pytest.mark.parametrize("node", ["Softmax <axis = -1> (x)", "ReduceMean (x, axes)"])
def test_what_is_widened_afterwards_is_widened_before(node):
    graph_model = model(f"p = {node} y = Cast <to = {_FP32}> (p)")
    WidenFirst()(graph_model)
    first, second = graph_model.graph
    assert (first.op_type, second.op_type) == ("Cast", node.split()[0])
    assert first.outputs[0] is second.inputs[0]
    assert second.outputs[0] is graph_model.graph.outputs[0]
    assert (second.outputs[0].name, second.outputs[0].dtype) == ("y", ir.DataType.FLOAT)


@pytest.mark.parametrize(
    "body",
    [
        f"p = Softmax (x) y = Cast <to = {_FP16}> (p)",
        f"p = Relu (x) y = Cast <to = {_FP32}> (p)",
        f"p = Softmax (x) y = Cast <to = {_FP32}> (p) z = Relu (p)",
    ],
)
def test_what_is_not_only_asked_for_in_float32_stays(body):
    graph_model = model(body, "float[2, 64] y, float16[2, 64] z" if "z =" in body else "float[2, 64] y")
    before = [node.op_type for node in graph_model.graph]
    WidenFirst()(graph_model)
    assert [node.op_type for node in graph_model.graph] == before


def test_onnxscript_still_rounds_a_softmax_that_is_asked_for_in_float32():
    """When this fails, `WidenFirst` can go."""
    x = np.linspace(-3, 3, 64, dtype=np.float16)
    share = aten_softmax(x, 0, dtype=_FP32).value
    assert np.array_equal(share, share.astype(np.float16))
