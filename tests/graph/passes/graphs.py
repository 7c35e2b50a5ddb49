"""Graphs of a few lines, in ONNX's text form, and what they compute before and after a pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort


def graph_of(signature: str, body: str, constants: str = "") -> ir.Model:
    """A model of opset 24, all types and shapes inferred. `signature`: `(inputs) => (outputs)`."""
    text = f'<ir_version: 10, opset_import: ["" : 24]> g {signature} <{constants}> {{ {body} }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    common.ShapeInferencePass()(model)
    return model


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Every output, computed as the graph says, with nothing fused."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_unchanged(model: ir.Model, step: type[ir.passes.InPlacePass]) -> None:
    before = ir.to_proto(model).SerializeToString()
    assert not step()(model).modified
    assert ir.to_proto(model).SerializeToString() == before
