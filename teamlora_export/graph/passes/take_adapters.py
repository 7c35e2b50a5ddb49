"""Makes the adapter of a graph an input: version 2 of the op, with slots for several, and one chosen for each row."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.bundle import ADAPTER_NAME, BATCH
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.weights import Zeros, static_type

# Names of dynamic axes.
SLOTS, ROWS = "slots", "adapter_rows"


class TakeAdapters(ir.passes.InPlacePass):
    """`down`, `mix` and `up` of every node become inputs [slots, ..] that a caller may leave out. So does `adapter`,
    int32 [1] or [batch]: the slot of each row's adapter, or below 0 for the base alone, as where it is left out.

    Inputs with a default are what ONNX Runtime calls overridable initializers. They can be bound to memory that is
    written to between calls, have any number of slots, and can be set by ONNX Runtime's own files of adapters. The
    default is one slot of zeros.

    Raises:
        ExportError: a node does not read [batch, tokens, ..], so that no row is one text's.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if op.is_op(node) and not op.takes_adapters(node)]
        if not nodes:
            return ir.passes.PassResult(model, False)
        for node in nodes:
            _require_rows(node)
        chosen = ir.Value(name=ADAPTER_NAME, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([ROWS]))
        chosen.const_value = ir.tensor([-1], dtype=ir.DataType.INT32, name=ADAPTER_NAME)
        for value in dict.fromkeys(weight for node in nodes for weight in _weights(node)):
            dtype, shape = static_type(value)
            value.const_value = Zeros(str(value.name), dtype, (1, *shape))
            value.shape = ir.Shape([SLOTS, *shape])
            model.graph.inputs.append(value)
        for node in nodes:
            node.resize_inputs(len(op.INPUTS) + 1)
            node.replace_input_with(len(op.INPUTS), chosen)
        model.graph.inputs.append(chosen)
        model.graph.initializers.add(chosen)
        for identifier in [name for name in model.functions if name[:2] == (op.DOMAIN, op.NAME)]:
            del model.functions[identifier]
        AttachFunctions()(model)
        return ir.passes.PassResult(model, True)


def _weights(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs[2:] if value is not None]


def _require_rows(node: ir.Node) -> None:
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 3 or str(getattr(x.shape[0], "value", "")) != BATCH:
        raise ExportError(
            f"{node.outputs[0].name}: is not given texts row by row, but {x.shape if x is not None else 'nothing'}, so "
            "that rows cannot have adapters of their own. Export a bundle for each adapter."
        )
