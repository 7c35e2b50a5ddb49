"""Takes shape arithmetic out that says nothing new."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.graph.passes.match import integers, numbers, replace
from teamlora_export.graph.passes.module_outputs import MODULES_KEY


class SimplifyShapes(ir.passes.InPlacePass):
    """Removes an `Expand` to the shape that its input has, and gives a `Reshape` a constant for its target where every
    size is a number or that of the input at the same place (0, to the operator).

    Sizes are equal where the trace has one name for both.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            # What was computed for a node that went before it may be gone.
            if node.graph is not model.graph or node.domain != "":
                continue
            if node.op_type == "Expand":
                modified |= _drop(model.graph, node)
            elif node.op_type == "Reshape" and numbers(node.inputs[1]) is None:
                modified |= _give_constant(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _drop(graph: ir.Graph, expand: ir.Node) -> bool:
    value, result = expand.inputs[0], expand.outputs[0]
    if value is None or value.producer() is None or result.is_graph_output():
        return False
    # It keeps its own name.
    if value.is_graph_output() or MODULES_KEY in value.metadata_props:
        return False
    before, after = _sizes(value), _sizes(result)
    if before is None or before != after:
        return False
    replace(graph, result, value)
    return True


def _give_constant(graph: ir.Graph, reshape: ir.Node) -> bool:
    before, after = _sizes(reshape.inputs[0]), _sizes(reshape.outputs[0])
    if before is None or after is None or 0 in after:
        return False
    named = {axis for axis, size in enumerate(after) if not isinstance(size, int)}
    if any(before[axis : axis + 1] != [after[axis]] for axis in named):
        return False
    target = [0 if axis in named else int(size) for axis, size in enumerate(after)]
    made = ir.node("Reshape", [reshape.inputs[0], integers(graph, f"{reshape.outputs[0].name}.shape", target)])
    graph.insert_before(reshape, made)
    replace(graph, reshape.outputs[0], made.outputs[0])
    return True


def _sizes(value: ir.Value | None) -> list[int | str] | None:
    """A number or a name for each axis; None where one is unknown."""
    if value is None or value.shape is None:
        return None
    sizes = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
    return None if None in sizes else sizes  # type: ignore[return-value]
