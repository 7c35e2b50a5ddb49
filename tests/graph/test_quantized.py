"""What quantised weights mean, against ONNX Runtime: a product of the unit matrix with one gives its numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from teamlora_export.graph.quantized import DOMAIN, OP_TYPE, Scheme, dequantised, quantised

# Neither fills its last block, and an odd number of blocks leaves half a byte of zero points unused.
INPUTS, OUTPUTS = 76, 40


def graph_of(nodes: Sequence[onnx.NodeProto], weights: dict[str, np.ndarray | onnx.TensorProto]) -> ir.Model:
    """A model of x [rows, INPUTS] -> y [rows, OUTPUTS]."""
    tensors = [w if isinstance(w, onnx.TensorProto) else onnx.numpy_helper.from_array(w, n) for n, w in weights.items()]
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["rows", None]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(DOMAIN, 1)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def meant_by_runtime(model: ir.Model) -> np.ndarray:
    options = ort.SessionOptions()
    # No fusion may take the weights' numbers for others.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(INPUTS, dtype=np.float32)})[0]


def product_of_blocks(scheme: Scheme, matrix: np.ndarray, dtype: type = np.float32) -> ir.Model:
    codes = quantised(matrix, scheme)
    weights = {"codes": codes.codes, "scales": codes.scales.astype(dtype)}
    if codes.zeros is not None:
        weights["zeros"] = codes.zeros
    attributes = {"K": INPUTS, "N": OUTPUTS, "bits": scheme.bits, "block_size": scheme.block, "accuracy_level": 1}
    return graph_of([onnx.helper.make_node(OP_TYPE, ["x", *weights], ["y"], domain=DOMAIN, **attributes)], weights)


@pytest.fixture
def matrix(rng) -> np.ndarray:
    return rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32) + 0.5


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_mean_what_the_runtime_multiplies_by(matrix, bits, zero_points) -> None:
    model = product_of_blocks(Scheme(bits, zero_points), matrix)
    meant = dequantised(model.graph[0])
    # The same two operations in float32.
    np.testing.assert_allclose(meant, meant_by_runtime(model), rtol=1e-6)
    step = np.ptp(matrix) / (1 << bits)
    assert np.abs(meant - matrix).max() < 2 * step


def test_a_matrix_is_quantised_alike_in_strips_and_whole(rng) -> None:
    matrix = rng.standard_normal((64, 600)).astype(np.float32)
    whole = quantised(matrix, Scheme(4, zero_points=True))
    for start in range(0, 600, 200):
        part = quantised(matrix[:, start : start + 200], Scheme(4, zero_points=True))
        np.testing.assert_array_equal(part.codes, whole.codes[start : start + 200])
        np.testing.assert_array_equal(part.zeros, whole.zeros[start : start + 200])


def _int4(array: np.ndarray, name: str) -> onnx.TensorProto:
    return ir.to_proto(ir.tensor(array, dtype=ir.DataType.INT4, name=name))


def _products(rng: np.random.Generator) -> dict[str, ir.Model]:
    node = onnx.helper.make_node
    plain = rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
    codes = rng.integers(-8, 8, (INPUTS, OUTPUTS)).astype(np.int8)
    scales = rng.uniform(0.5, 1.0, (4, OUTPUTS)).astype(np.float32)
    blocks = {"codes": _int4(codes, "codes"), "scales": scales, "zeros": _int4(codes[:4], "zeros")}
    inner = node("DequantizeLinear", ["codes", "scales", "zeros"], ["w"], axis=0, block_size=19)
    product = node("MatMul", ["x", "w"], ["y"])
    by_column = {"codes": codes.T.copy(), "scales": scales[0], "zeros": codes[0]}
    columns = node("DequantizeLinear", ["codes", "scales", "zeros"], ["w.T"], axis=0)
    turned = node("Transpose", ["w.T"], ["w"], perm=[1, 0])
    whole = {"codes": codes, "scales": scales[0, 0], "zeros": codes[0, 0]}
    return {
        "MatMul": graph_of([product], {"w": plain}),
        "MatMul of a transposed weight": graph_of(
            [node("Transpose", ["w.T"], ["w"]), product], {"w.T": plain.T.copy()}
        ),
        "Gemm": graph_of([node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)], {"w": plain.T.copy()}),
        "FusedMatMul": graph_of([node("FusedMatMul", ["x", "w"], ["y"], domain=DOMAIN)], {"w": plain}),
        "for a tensor": graph_of([node("DequantizeLinear", [*whole], ["w"]), product], whole),
        "for each column": graph_of([columns, turned, product], by_column),
        "in blocks": graph_of([inner, product], blocks),
    }


def test_every_form_of_a_stored_weight_is_read(rng) -> None:
    for form, model in _products(rng).items():
        meant = dequantised(model.graph[-1])
        assert meant is not None, form
        np.testing.assert_allclose(meant, meant_by_runtime(model), rtol=1e-6, err_msg=form)
        chosen = np.array([0, 7, OUTPUTS - 1])
        np.testing.assert_array_equal(dequantised(model.graph[-1], columns=chosen), meant[:, chosen], err_msg=form)


def test_rows_may_have_the_scales_of_any_block(matrix) -> None:
    """GPTQ's order of activations. Without zero points, which ONNX Runtime's CPU (1.32) passes over beside it."""
    model = product_of_blocks(Scheme(4), matrix)
    node = model.graph[0]
    groups = np.random.default_rng(3).permutation(INPUTS).astype(np.int32) // 32
    tensor = ir.tensor(groups, name="g_idx")
    value = ir.Value(name="g_idx", type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.initializers.add(value)
    node.resize_inputs(5)
    node.replace_input_with(4, value)
    meant = dequantised(node)
    np.testing.assert_allclose(meant, meant_by_runtime(model), rtol=1e-6)
    in_order = dequantised(product_of_blocks(Scheme(4), matrix).graph[0])
    assert np.abs(meant - in_order).max() > 0.1
    np.testing.assert_array_equal(dequantised(node, columns=np.array([5, 6])), meant[:, 5:7])


def test_what_is_not_known_is_none(rng) -> None:
    node = onnx.helper.make_node
    weight = {"w": rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)}
    assert dequantised(graph_of([node("Add", ["x", "w"], ["y"])], weight).graph[0]) is None
    assert dequantised(graph_of([node("MatMul", ["w", "x"], ["y"])], weight).graph[0]) is None
    assert dequantised(graph_of([node("Gemm", ["x", "w"], ["y"], transA=1)], weight).graph[0]) is None
    sorted_rows = product_of_blocks(Scheme(4), weight["w"])
    sorted_rows.graph[0].resize_inputs(5)
    sorted_rows.graph[0].replace_input_with(4, ir.Value(name="g_idx"))
    assert dequantised(sorted_rows.graph[0]) is None
