"""Re-typed graphs, run by ONNX Runtime and judged as any bundle is: a wrong precision fails the validation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from teamlora_export.bundle import DATA_NAME, MODEL_NAME, Bundle, hash_files, read_bundle
from teamlora_export.deploy.folder import port_in
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.precision import IR_DTYPES, ChangePrecision
from teamlora_export.manifest import write_manifest
from teamlora_export.validate.cases import Case, first_step
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.run import validate_bundle

SENSITIVE = {"Softmax", "RMSNormalization", "LayerNormalization", "Cos", "Sin"}


def retyped(bundle: Bundle, dtype: str, folder: Path) -> Bundle:
    """A bundle like `bundle`, its graph re-typed."""
    model = ir.load(bundle.model)
    ChangePrecision(bundle.manifest.dtype, dtype)(model)
    ir.save(model, folder / MODEL_NAME, external_data=DATA_NAME)
    ports = {
        end: tuple(port_in(port, dtype) for port in getattr(bundle.manifest, end)) for end in ("inputs", "outputs")
    }
    write_manifest(folder, dataclasses.replace(bundle.manifest, dtype=dtype, sha256=hash_files(folder), **ports))
    return read_bundle(folder)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "roberta", "modernbert"])
def test_a_float32_bundle_in_float16_is_as_exact_as_pytorch_in_float16(name, make_bundle, tmp_path):
    verdict = validate_bundle(retyped(make_bundle(name), "fp16", tmp_path))
    assert verdict.passed, verdict.departure or verdict.worst


@pytest.mark.parametrize(("source", "target"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16"), ("fp16", "fp32")])
def test_every_dtype_becomes_every_other(source, target, make_bundle, tmp_path):
    bundle = retyped(make_bundle("llama", source), target, tmp_path)
    kinds = {value.dtype for value in ir.load(bundle.model).graph.inputs}
    assert kinds == {ir.DataType.INT64, IR_DTYPES[target]}
    if source == "fp32":
        assert validate_bundle(bundle).passed
        return
    # Its weights are those of the source, rounded once more, so it is compared with that.
    case = Case("one prompt", np.arange(1, 10)[None], np.ones((1, 9), np.int64))
    found, expected = (
        OnnxRunner(each, ()).run(first_step(each.manifest.inputs, case).feeds)["logits"].astype(np.float64)
        for each in (bundle, make_bundle("llama", source))
    )
    # Some twenty operations in a row, each of which rounds once.
    roundoff = max(DTYPES[source].roundoff, DTYPES[target].roundoff)
    assert np.abs(found - expected).max() <= 20 * roundoff * np.abs(expected).max()


def is_inverse_root(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "Reciprocal"


@pytest.mark.parametrize("form", ["function", "standard"])
def test_norms_softmax_and_routing_stay_in_float32_and_products_do_not(form, make_bundle):
    model = ir.load(make_bundle("llama", op_form=form).model)
    ChangePrecision("fp32", "fp16")(model)
    for node in model.graph:
        kind = node.outputs[0].dtype
        if node.op_type in SENSITIVE or (node.op_type == "Mul" and any(map(is_inverse_root, node.inputs))):
            assert kind == ir.DataType.FLOAT, node
        if op.is_op(node):
            kinds = {n: v.dtype for n, v in zip(op.INPUTS, node.inputs, strict=True)}  # type: ignore[union-attr]
            assert kinds.pop("mix") == ir.DataType.FLOAT
            assert set(kinds.values()) == {ir.DataType.FLOAT16}
        if node.op_type == "MatMul":
            # One type on both sides: a strongly typed builder takes nothing else.
            assert len({value.dtype for value in node.inputs}) == 1, node  # type: ignore[union-attr]
    weights = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.const_value.size > 64]
    assert not [v.name for v in weights if not v.name.endswith("mix")]


def small_graph(body: str, kind: str) -> ir.Model:
    """A model from x [2, 3] and hidden [2, 3], booleans, to y [2, 3], of nodes in ONNX's text form."""
    head = f"({kind}[2, 3] x, bool[2, 3] hidden) => ({kind}[2, 3] y)"
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {head} {{ {body} }}'))


def run_small(model: ir.Model, dtype: np.dtype | type) -> np.ndarray:
    """In ONNX's own evaluator: ONNX Runtime drops casts to float16 that it finds between two others."""
    hidden = np.array([[True, True, True], [False, True, False]])
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": np.ones((2, 3), dtype), "hidden": hidden})[0]


@pytest.mark.parametrize(
    "masked",
    [
        "h = Cast <to = 1> (hidden) m = Mul (h, low) y = Add (scores, m)",
        "m = Where (hidden, low, zero) y = Add (scores, m)",
        "y = Where (hidden, low, scores)",
    ],
)
def test_the_lowest_number_of_a_mask_becomes_float16s(masked):
    constants = "low = Constant <value_float = -3.4028234663852886e38> () zero = Constant <value_float = 0.0> ()"
    weight = "w = Constant <value = float[3, 3] {1, 0, 0, 0, 1, 0, 0, 0, 1}> ()"
    model = small_graph(f"{constants} {weight} scores = MatMul (x, w) {masked}", "float")
    ChangePrecision("fp32", "fp16")(model)
    y = run_small(model, np.float16)
    assert y.dtype == np.float16
    assert np.array_equal(y < -65000, [[True, True, True], [False, True, False]])
    assert np.isfinite(y).all(), "a row of infinities is NaN after a softmax"


def test_a_number_in_an_attribute_is_of_the_new_type_too():
    # The parser takes a half by its bits.
    half = int(np.float16(1.5).view(np.uint16))
    shape, filled = (
        "size = Constant <value_ints = [2, 3]> ()",
        f"ConstantOfShape <value = float16[1] {{{half}}}> (size)",
    )
    model = small_graph(f"{shape} c = {filled} y = Add (x, c)", "float16")
    ChangePrecision("fp16", "bf16")(model)
    y = run_small(model, ml_dtypes.bfloat16)
    assert y.dtype == ml_dtypes.bfloat16
    assert (y == 2.5).all()


def test_weights_keep_their_names(make_bundle):
    model = ir.load(make_bundle("llama").model)
    before = {name for name, value in model.graph.initializers.items() if value.const_value.size > 64}
    ChangePrecision("fp32", "bf16")(model)
    assert before <= set(model.graph.initializers)


def test_a_weight_beyond_float16_is_refused_by_name_when_it_is_written(make_bundle, tmp_path):
    model = ir.load(make_bundle("llama").model)
    name = next(name for name in model.graph.initializers if "gate_proj" in name and name.endswith("weight"))
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(np.full(value.shape.numpy(), 1e6, np.float32), name=name)
    ChangePrecision("fp32", "fp16")(model)
    with pytest.raises(ExportError, match=r"gate_proj.*weight: holds 1e\+06, beyond float16"):
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
