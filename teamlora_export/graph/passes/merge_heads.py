"""Cuts packed queries, keys and values into heads together."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from teamlora_export.graph.passes.match import integers, is_last_axis, replace
from teamlora_export.graph.passes.module_outputs import COLUMNS_KEY, MODULES_KEY

_TRANSPOSED = [0, 2, 1, 3]


class MergeHeads(ir.passes.InPlacePass):
    """Replaces a Split of [batch, sequence, width] and a Reshape of each part to [batch, sequence, its heads, size]
    by one Reshape and a Split of the heads; and, where all parts are transposed, their Transposes by one before it.

    Parts that are modules' outputs are values no longer. What was split then says which of its columns are whose, so
    that validation still sees them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain == "" and node.op_type == "Split":
                modified |= _merge(model.graph, node)
        return ir.passes.PassResult(model, modified)


def _merge(graph: ir.Graph, split: ir.Node) -> bool:
    packed, parts = split.inputs[0], split.outputs
    reshapes = [_only_reader(part, "Reshape") for part in parts]
    if packed is None or None in reshapes or not is_last_axis(split.attributes.get_int("axis", 0), parts[0]):
        return False
    heads = [node.outputs[0] for node in reshapes if node is not None]
    if not _are_heads(parts, heads) or MODULES_KEY in packed.metadata_props:
        return False
    batch, sequence, _, size = heads[0].shape  # type: ignore[misc]
    counts = [int(str(value.shape[2])) for value in heads]  # type: ignore[index]
    _keep_modules(packed, parts)
    target = integers(graph, f"{packed.name}.heads_shape", [0, 0, sum(counts), int(str(size))])
    reshape = ir.node("Reshape", [packed, target], {"allowzero": 0})
    made = reshape.outputs[0]
    made.name, made.type = f"{packed.name}.heads", parts[0].type
    made.shape = ir.Shape([batch, sequence, sum(counts), size])
    new = [reshape]
    turned = [_only_reader(value, "Transpose") for value in heads]
    axis = 2
    if all(node is not None and list(node.attributes.get_ints("perm", [])) == _TRANSPOSED for node in turned):
        transpose = ir.node("Transpose", [made], {"perm": _TRANSPOSED})
        moved = transpose.outputs[0]
        moved.name, moved.type = f"{made.name}.transposed", made.type
        moved.shape = ir.Shape([batch, sum(counts), sequence, size])
        heads = [node.outputs[0] for node in turned if node is not None]
        new, made, axis = [*new, transpose], moved, 1
    sizes = integers(graph, f"{packed.name}.heads_splits", counts)
    cut = ir.node("Split", [made, sizes], {"axis": axis}, num_outputs=len(heads))
    graph.insert_before(split, [*new, cut])
    for old, part in zip(heads, cut.outputs, strict=True):
        replace(graph, old, part)
    return True


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node of that type that alone reads `value`."""
    readers = value.consumers()
    if len(value.uses()) != 1 or value.is_graph_output() or readers[0].domain != "" or readers[0].op_type != op_type:
        return None
    return readers[0]


def _are_heads(parts: Sequence[ir.Value], heads: Sequence[ir.Value]) -> bool:
    """Whether each of `parts` [batch, sequence, width] becomes heads of one size, batch and sequence staying."""
    for part, cut in zip(parts, heads, strict=True):
        if part.shape is None or cut.shape is None or len(part.shape) != 3 or len(cut.shape) != 4:
            return False
        if list(cut.shape)[:2] != list(part.shape)[:2] or cut.shape[3] != heads[0].shape[3]:  # type: ignore[index]
            return False
        if not all(isinstance(size, int) for size in (part.shape[2], *list(cut.shape)[2:])):
            return False
    return len(parts) > 1


def _keep_modules(packed: ir.Value, parts: Sequence[ir.Value]) -> None:
    """Write the modules of `parts`, and their columns of `packed`, to `packed`."""
    modules: list[str] = []
    columns: list[str] = []
    start = 0
    for part in parts:
        end = start + int(str(part.shape[2]))  # type: ignore[index]
        names = part.metadata_props.get(MODULES_KEY)
        for name in names.split(",") if names else ():
            modules.append(name)
            columns.append(f"{start}:{end}")
        start = end
    if modules:
        packed.metadata_props[MODULES_KEY] = ",".join(modules)
        packed.metadata_props[COLUMNS_KEY] = ",".join(columns)
