"""Takes the tracer's markers out, and names the values that they marked after the modules that made them."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from teamlora_export.graph import op

MODULES_KEY = "teamlora.modules"
# Where a value holds what several modules returned beside each other: `start:end` of each one's columns.
COLUMNS_KEY = "teamlora.columns"


class NameModuleOutputs(ir.passes.InPlacePass):
    """Replaces each `teamlora::ModuleOutput(x, path)` by x, named `path`.

    Where several modules return the same value (a block and its last layer), it takes the first name, the innermost
    module's. Of several calls of one module, the last has its name, as a forward hook would see it last. All of
    them are kept, comma-separated, in the value's metadata, which validation reads to compare module by module.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        markers = [node for node in model.graph if node.domain == op.DOMAIN and node.op_type == op.MARKER]
        names: dict[ir.Value, list[str]] = {}
        calls = Counter(_path(node) for node in markers)
        for node in markers:
            calls[_path(node)] -= 1
            earlier = calls[_path(node)]
            source = node.inputs[0]
            assert source is not None
            marked = node.outputs[0]
            source.type = source.type or marked.type
            source.shape = source.shape or marked.shape
            if marked.is_graph_output():
                marked.name, source.name = f"{marked.name}.marked", marked.name
            ir.convenience.replace_all_uses_with(marked, source, replace_graph_outputs=True)
            names.setdefault(source, []).append(_path(node) + (f"#{earlier}" if earlier else ""))
            model.graph.remove(node, safe=True)
        outputs = set(model.graph.outputs)
        for value, modules in names.items():
            value.metadata_props[MODULES_KEY] = ",".join(modules)
            if value not in outputs and not value.is_graph_input():
                value.name = modules[0]
        return ir.passes.PassResult(model, bool(markers))


def _path(marker: ir.Node) -> str:
    return marker.attributes["path"].as_string()
