"""Products with codes mean the same in ONNX's own operators, or are refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from teamlora_export.errors import ExportError
from teamlora_export.graph.passes.expand_quantised import ExpandQuantised
from teamlora_export.graph.quantized import DOMAIN, OP_TYPE, Codes, Scheme, dequantised, quantised

ROWS, COLUMNS = 64, 24


def _product(codes: Codes, bits: int) -> ir.Model:
    held = {"codes": codes.codes, "scales": codes.scales} | ({} if codes.zeros is None else {"zeros": codes.zeros})
    weights = [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
            const_value=ir.tensor(array, name=name),
        )
        for name, array in held.items()
    ]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["tokens", ROWS]))
    attributes = {"K": ROWS, "N": COLUMNS, "bits": bits, "block_size": 32}
    node = ir.node(OP_TYPE, [x, *weights], attributes, domain=DOMAIN, name="product")
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 21, DOMAIN: 1})
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def matrix(rng) -> np.ndarray:
    return rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_is_the_same_to_the_last_bit(matrix, bits):
    codes = quantised(matrix, Scheme(bits))
    if bits == 8:
        codes = Codes(codes.codes, np.abs(codes.scales), None)
    model = _product(codes, bits)
    meant = dequantised(model.graph[0], np.float64)
    ExpandQuantised()(model)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul"]
    np.testing.assert_array_equal(dequantised(model.graph[1], np.float64), meant)
    assert set(model.graph.initializers) == {"codes.signed", "scales.turned"}


@pytest.mark.parametrize(
    ("bits", "zero_points", "message"),
    [
        (4, True, "product: has zero points.* --zero-points"),
        (8, False, "product: has negative scales.* --weights int4"),
    ],
)
def test_what_tensorrt_has_not_is_refused(matrix, bits, zero_points, message):
    with pytest.raises(ExportError, match=message):
        ExpandQuantised()(_product(quantised(matrix, Scheme(bits, zero_points)), bits))
