"""The pass that makes a graph's adapter an input, on graphs of one node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from formula import by_formula, make_projection
from graph.test_op import feeds_of, one_node_model, run

from teamlora_export.errors import ExportError
from teamlora_export.graph.passes.module_outputs import MODULES_KEY
from teamlora_export.graph.passes.take_adapters import TakeAdapters
from teamlora_export.ports import ADAPTER_NAME, BATCH


def model_of(sizes: list[str | int], width: int, weights: dict[str, np.ndarray]) -> ir.Model:
    """A node on x of `sizes` and seven columns, its output marked as a module's."""
    model = one_node_model([width], 4, False, ir.DataType.FLOAT)
    node = next(iter(model.graph))
    for value, last in ((node.inputs[0], 7), (node.inputs[1], width), (node.outputs[0], width)):
        value.shape = ir.Shape([*sizes, last])
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(weights[value.name], name=value.name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weights[value.name].shape)
        model.graph.initializers.add(value)
    node.outputs[0].metadata_props[MODULES_KEY] = "head"
    return model


@pytest.mark.parametrize("sizes", [[BATCH, "tokens"], [BATCH]], ids=str)
def test_every_row_takes_its_slot_whether_it_has_tokens_or_is_one_place(sizes, rng):
    """Of the output, name, shape and mark stay."""
    projections = [make_projection(rng, 4, 2, False, 7, 6) for _ in range(2)]
    shape = (3, 5) if len(sizes) == 2 else (3,)
    x, base = (rng.normal(size=(*shape, n)).astype(np.float32) for n in (7, 6))
    weights = [feeds_of([p], x, base, ir.DataType.FLOAT) for p in projections]
    model = model_of(sizes, 6, weights[0])
    assert TakeAdapters()(model).modified
    defaults = slots_of_zeros(model)
    for value in model.graph.inputs:
        value.const_value = defaults.get(value.name, value.const_value)
    [y] = model.graph.outputs
    assert (y.name, len(y.shape), y.metadata_props) == ("y", len(shape) + 1, {MODULES_KEY: "head"})
    assert sum(MODULES_KEY in value.metadata_props for node in model.graph for value in node.outputs) == 1
    slots = {name: np.stack([w[name] for w in weights]) for name in ("down", "mix", "up")}
    found = run(model, {"x": x, "base": base, **slots, ADAPTER_NAME: np.int32([1, -1, 0])})
    expected = base.astype(np.float64)
    for row, slot in ((0, 1), (2, 0)):
        expected[row] = by_formula(projections[slot], x[row].astype(np.float64), base[row].astype(np.float64))
    assert found.shape == base.shape
    assert np.abs(found - expected).max() <= 64 * 2.0**-24 * np.abs(expected).max()
    assert (found[1] == base[1]).all()
    assert (run(model, {"x": x, "base": base}) == base).all(), "who leaves the adapters out runs the base"
    assert not TakeAdapters()(model).modified


def slots_of_zeros(model: ir.Model) -> dict[str | None, ir.TensorProtocol]:
    """The defaults of the slots, which the pass leaves to who writes the weights."""
    found = {value.name: value.const_value for value in model.graph.inputs if value.name != ADAPTER_NAME}
    return {n: ir.tensor(np.zeros(t.shape, np.float32), name=n) for n, t in found.items() if t is not None}


@pytest.mark.parametrize("sizes", [["rows_of_all_texts"], [4], [BATCH, "choices", "tokens"]], ids=str)
def test_what_is_no_row_of_a_text_is_refused(sizes, rng):
    projection = make_projection(rng, 4, 2, False, 7, 6)
    weights = feeds_of([projection], np.zeros((1, 7)), np.zeros((1, 6)), ir.DataType.FLOAT)
    with pytest.raises(ExportError, match="y: is not given texts row by row"):
        TakeAdapters()(model_of(sizes, 6, weights))
