"""Makes the slots of a graph's adapters, and the index of each row, inputs that a caller must give, for runtimes that
know no input with a default."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.ports import ADAPTER_NAME, BATCH


class FixSlots(ir.passes.InPlacePass):
    """What `TakeAdapters` gave a default has none any more: `slots` slots of each weight, and `adapter` int32 [batch].

    A runtime whose inputs are bound to addresses then finds an adapter where it was copied to; nothing of it is part
    of an engine.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self._slots = slots

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        optional = [value for value in model.graph.inputs if value.const_value is not None]
        for value in optional:
            del model.graph.initializers[str(value.name)]
            value.const_value = None
            assert value.shape is not None
            own = list(value.shape)[1:]
            value.shape = ir.Shape([BATCH]) if value.name == ADAPTER_NAME else ir.Shape([self._slots, *own])
        return ir.passes.PassResult(model, bool(optional))
