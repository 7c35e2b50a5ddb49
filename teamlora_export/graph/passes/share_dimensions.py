"""Reads each dynamic dimension from one input, whichever inputs the exporter asked."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir


class ShareDimensions(ir.passes.InPlacePass):
    """Redirects `Shape(input)[axis]` to the first graph input that has a dimension of the same name.

    The exporter asks whichever of the inputs it likes: the batch of layer 4's keys, the past length of layer 3's
    values. From one source, equal arithmetic becomes equal nodes, and no layer reads another layer's cache.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        first = _first_holders(model.graph.inputs)
        modified = False
        for node in model.graph:
            source = node.inputs[0] if node.op_type == "Shape" and node.domain == "" else None
            if source is None or not source.is_graph_input() or source.shape is None:
                continue
            start = node.attributes.get_int("start", 0)
            end = node.attributes.get_int("end", len(source.shape))
            if end - start != 1 or not isinstance(source.shape[start], ir.SymbolicDim):
                continue
            holder, axis = first[str(source.shape[start].value)]  # type: ignore[union-attr]
            if holder is not source or axis != start:
                node.replace_input_with(0, holder)
                node.attributes["start"] = ir.AttrInt64("start", axis)
                node.attributes["end"] = ir.AttrInt64("end", axis + 1)
                modified = True
        return ir.passes.PassResult(model, modified)


def _first_holders(inputs: Iterable[ir.Value]) -> dict[str, tuple[ir.Value, int]]:
    first: dict[str, tuple[ir.Value, int]] = {}
    for value in inputs:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                first.setdefault(str(size.value), (value, axis))
    return first
