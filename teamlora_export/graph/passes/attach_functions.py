"""Puts the function bodies of the op into the model."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.graph import op

# The first IR version with overloads of functions.
_IR_VERSION = 10


class AttachFunctions(ir.passes.InPlacePass):
    """Points every node of the op at the overload for its form, and adds the body of each form that occurs."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        forms: dict[op.OpForm, ir.DataType] = {}
        for node in model.graph:
            if op.is_op(node):
                form = op.form_of(node)
                node.overload = form.overload
                up = node.inputs[op.INPUTS.index("up")]
                forms[form] = ir.DataType.FLOAT if form.narrow else up.dtype  # type: ignore[union-attr,assignment]
        for form in sorted(forms, key=lambda form: form.overload):
            function = op.function(form, model.graph.opset_imports[""], forms[form])
            model.functions[function.identifier()] = function
        model.ir_version = max(model.ir_version or _IR_VERSION, _IR_VERSION)
        model.graph.opset_imports[op.DOMAIN] = op.VERSION
        return ir.passes.PassResult(model, bool(forms))
