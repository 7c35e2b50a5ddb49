"""A graph in 16 bits in float32 arithmetic, its branches and loops included."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from teamlora_export.errors import ExportError
from teamlora_export.validate.widen import widen

MODEL = """<ir_version: 10, opset_import: ["" : 20]>
agraph (float16[n] x, bool long) => (float16[n] y)
<float16[1] third = {13653}, int64 three = {3}, bool yes = {1}> {
    scaled = Mul(x, third)
    chosen = If (long) <
        then_branch = then_graph () => (float16[n] a) <float16[1] tenth = {11878}> { a = Mul(scaled, tenth) },
        else_branch = else_graph () => (float16[n] b) { b = Div(scaled, third) }
    >
    y = Loop (three, yes, chosen) <
        body = body_graph (int64 i, bool go, float16[n] state) => (bool again, float16[n] more) {
            again = Identity(go)
            more = Mul(state, third)
        }
    >
}"""


def run(model: ir.Model, x: np.ndarray, long: bool) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "long": np.array(long)})[0]


@pytest.mark.parametrize("long", [True, False])
def test_branches_and_loops_are_widened_too(long):
    x = np.linspace(-3, 3, 50).astype(np.float16)
    third, tenth = (np.array([bits], np.uint16).view(np.float16).astype(np.float64) for bits in (13653, 11878))
    exact = x * third * (tenth if long else 1 / third) * third**3
    narrow = run(ir.from_onnx_text(MODEL), x, long)
    found = {}
    for rounded in (False, True):
        model = ir.from_onnx_text(MODEL)
        widen(model, ir.DataType.FLOAT16, rounded)
        found[rounded] = run(model, x.astype(np.float32), long)
    np.testing.assert_allclose(found[False], exact, rtol=1e-6)
    # As each step rounds: what a kernel in float16 gives, which rounds in the same places.
    assert np.array_equal(found[True], narrow.astype(np.float32))
    assert not np.array_equal(found[True], found[False])


def test_a_function_whose_types_nobody_states_is_refused():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]>
        agraph (float16[n] x) => (float16[n] y) { y = mine.Half(x) }
        <domain: "mine", opset_import: ["" : 20]> Half (x) => (y) { y = Identity(x) }"""
    )
    with pytest.raises(ExportError, match="has a function 'Half'"):
        widen(model, ir.DataType.FLOAT16, rounded=True)
