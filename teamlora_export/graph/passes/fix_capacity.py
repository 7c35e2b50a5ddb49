"""Makes the capacity of a cache in place a number, for runtimes whose buffers have one size."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.ports import is_capacity


class FixCapacity(ir.passes.InPlacePass):
    """Every axis that is a capacity has `capacity` places. What computes with it reads it from the shapes.

    Rings are then as long as the text, which never wraps, so they become buffers like the others: runtimes whose
    buffers have one size may know no circular update.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
        open_ones = [
            value for value in values if value.shape is not None and any(map(is_capacity, _names(value.shape)))
        ]
        for value in open_ones:
            assert value.shape is not None
            names = _names(value.shape)
            value.shape = ir.Shape(
                [self._capacity if is_capacity(name) else size for name, size in zip(names, value.shape, strict=True)]
            )
        for node in model.graph:
            if node.op_type == "TensorScatter":
                node.attributes["mode"] = ir.AttrString("mode", "linear")
        return ir.passes.PassResult(model, bool(open_ones))


def _names(shape: ir.Shape) -> list[str | None]:
    """The name of each axis; None for a number."""
    return [size.value if isinstance(size, ir.SymbolicDim) else None for size in shape]
