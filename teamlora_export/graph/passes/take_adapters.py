"""Makes the adapter of a graph an input: version 2 of the op, with slots for several, and one chosen for each row."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.weights import Zeros, static_type
from teamlora_export.ports import ADAPTER_NAME, BATCH

# Names of dynamic axes.
SLOTS, ROWS = "slots", "adapter_rows"


class TakeAdapters(ir.passes.InPlacePass):
    """`down`, `mix` and `up` of every node become inputs [slots, ..] that a caller may leave out. So does `adapter`,
    int32 [1] or [batch]: the slot of each row's adapter, or below 0 for the base alone, as where it is left out.

    Inputs with a default are what ONNX Runtime calls overridable initializers. They can be bound to memory that is
    written to between calls, have any number of slots, and can be set by ONNX Runtime's own files of adapters. The
    default is one slot of zeros.

    A node that reads one place of each text, [batch, in] (a pooler, a classifier's head), is given texts of one token.

    Raises:
        ExportError: a node reads neither that nor [batch, tokens, ..], so that no row is one text's.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if op.is_op(node) and not op.takes_adapters(node)]
        if not nodes:
            return ir.passes.PassResult(model, False)
        for node in nodes:
            _require_rows(node)
        for node in nodes:
            if len(node.inputs[0].shape) == 2:  # type: ignore[union-attr,arg-type]
                _give_tokens(model.graph, node)
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
    if x is None or x.shape is None or len(x.shape) not in (2, 3) or str(getattr(x.shape[0], "value", "")) != BATCH:
        raise ExportError(
            f"{node.outputs[0].name}: is not given texts row by row, but {x.shape if x is not None else 'nothing'}, so "
            "that rows cannot have adapters of their own. Export a bundle for each adapter."
        )


def _give_tokens(graph: ir.Graph, node: ir.Node) -> None:
    """Let a node that reads and gives [batch, ..] read and give [batch, 1, ..]."""
    y = node.outputs[0]
    axis = ir.Value(name=f"{y.name}.token_axis", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    axis.const_value = ir.tensor([1], dtype=ir.DataType.INT64, name=axis.name)
    graph.initializers.add(axis)
    for index in (0, 1):
        value = node.inputs[index]
        assert value is not None and value.shape is not None
        wide = ir.node("Unsqueeze", [value, axis], name=f"{node.name}/tokens_{index}")
        wide.outputs[0].name, wide.outputs[0].type = f"{y.name}.tokens_{index}", value.type
        wide.outputs[0].shape = ir.Shape([value.shape[0], 1, *list(value.shape)[1:]])
        graph.insert_before(node, wide)
        node.replace_input_with(index, wide.outputs[0])
    assert y.shape is not None
    narrow = ir.node("Squeeze", [y, axis], name=f"{node.name}/no_tokens")
    own, name = narrow.outputs[0], str(y.name)
    own.type, own.shape = y.type, y.shape
    own.metadata_props.update(y.metadata_props)
    y.metadata_props.clear()
    graph.insert_after(node, narrow)
    for use in list(y.uses()):
        if use.node is not narrow:
            use.node.replace_input_with(use.idx, own)
    for index, output in enumerate(graph.outputs):
        if output is y:
            graph.outputs[index] = own
    y.name, own.name = f"{name}.tokens", name
    y.shape = ir.Shape([y.shape[0], 1, *list(y.shape)[1:]])
