"""Adapters of 16 bits beside a graph in float32: judged on what they hold, with what rounding cost told by itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from faults import Fault, assert_located, judged, plant, weight
from typer.testing import CliRunner

from teamlora_export.cli import app
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.graph import op
from teamlora_export.graph.read import read_graph
from teamlora_export.validate.verdict import Thresholds

LENIENT = Thresholds(perplexity=10.0, agreement=0.0)
UP = "model.layers.2.mlp.down_proj.teamlora_up"


@pytest.mark.parametrize(
    ("options", "native"),
    [
        ({"adapter_dtype": "fp16"}, False),
        ({"adapter_dtype": "fp16"}, True),
        ({"adapter_dtype": "bf16", "weights_form": "int4"}, True),
        ({"adapter_dtype": "bf16", "op_form": "standard"}, False),
    ],
)
def test_the_bundle_is_right_and_says_what_rounding_cost(make_bundle, options, native) -> None:
    bundle = make_bundle("llama", **options)
    verdict = judged(bundle, thresholds=LENIENT, library=build_library().path if native else None)
    assert verdict.exact, verdict.departures
    assert verdict.quality is not None
    assert 0 < verdict.quality.quantised.kl < verdict.quality.base.kl


def test_the_matrices_and_nothing_else_are_in_16_bits(make_bundle) -> None:
    model = read_graph(make_bundle("llama", adapter_dtype="bf16"))
    kinds = {name: value.dtype for name, value in model.graph.initializers.items()}
    narrow = {name for name, kind in kinds.items() if kind == ir.DataType.BFLOAT16}
    nodes = [node for node in model.graph if op.is_op(node)]
    assert narrow == {node.inputs[op.INPUTS.index(name)].name for node in nodes for name in op.NARROW_INPUTS}
    assert set(kinds.values()) <= {ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL}
    # The bodies are those of these nodes alone.
    assert {key[2] for key in model.functions} == {node.overload for node in nodes}


def test_a_number_that_is_off_by_one_step_is_found(make_bundle, tmp_path) -> None:
    def next_number(up: np.ndarray) -> np.ndarray:
        moved = up.copy()
        moved[3, 5] = np.nextafter(np.float16(moved[3, 5]), np.float16(np.inf))
        return moved

    faults = {"one step": Fault(weight(UP, next_number), r"model\.layers\.2\.mlp\.down_proj")}
    bundle = plant(make_bundle("llama", adapter_dtype="fp16"), tmp_path / "faulty", faults)
    assert_located(judged(bundle, quality=False), faults)


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_a_matrix_in_another_type_than_the_manifest_says_is_found(make_bundle, tmp_path, kind) -> None:
    def retype(model: ir.Model) -> None:
        value = model.graph.initializers[UP]
        value.const_value = ir.tensor(value.const_value.numpy().astype(kind), name=UP)
        value.type = ir.TensorType(value.const_value.dtype)

    faults = {"another type": Fault(retype, r"model\.layers\.2\.mlp\.down_proj")}
    bundle = plant(make_bundle("llama", adapter_dtype="fp16"), tmp_path / "faulty", faults)
    verdict = judged(bundle, quality=False)
    assert_located(verdict, faults)
    assert "no type of a bundle" in verdict.departures[0].reason


def test_engines_are_not_built_of_it(make_bundle) -> None:
    result = CliRunner().invoke(app, ["trt", str(make_bundle("llama", adapter_dtype="fp16").folder), "--fp16"])
    assert isinstance(result.exception, ExportError)
    assert "Export without --adapter-dtype" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adapter_dtype": "int8"}, "--adapter-dtype int8: unknown. Use fp16 or bf16"),
        ({"adapter_dtype": "fp16", "dtype": "bf16"}, "is for graphs in fp32, this one is in bf16"),
    ],
)
def test_what_does_not_go_together_is_refused(make_base, make_adapter, tmp_path, options, said) -> None:
    with pytest.raises(ExportError, match=said):
        export_onnx(make_base("llama").name, make_adapter("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
