"""Holds the adapter in 16 bits beside a graph in float32 (`--adapter-dtype`)."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.weights import bind, recipe_of


class NarrowAdapter(ir.passes.InPlacePass):
    """Gives `down` and `up` of nodes whose T is float32 another type, and the nodes the body for it.

    Args:
        dtype: float16 or bfloat16. Numbers are rounded once, when they are written.

    Raises:
        ExportError: the T of a node is another type: a bundle's adapter has one type, or that of its graph.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        super().__init__()
        self.dtype = dtype

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if not op.is_op(node):
                continue
            if node.outputs[0].dtype != ir.DataType.FLOAT:
                kind = node.outputs[0].dtype
                held = kind.name.lower() if kind is not None else "an unknown type"
                raise ExportError(f"--adapter-dtype: is for graphs in fp32; {node.name} is in {held}. Leave it out.")
            for name in op.NARROW_INPUTS:
                value = node.inputs[op.INPUTS.index(name)]
                recipe = recipe_of(value)
                if value is not None and recipe is not None and value.dtype == ir.DataType.FLOAT:
                    value.type = ir.TensorType(self.dtype)
                    bind(value, recipe)
                    modified = True
        if modified:
            for key in [key for key in model.functions if key[:2] == (op.DOMAIN, op.NAME)]:
                del model.functions[key]
            AttachFunctions()(model)
        return ir.passes.PassResult(model, modified)
