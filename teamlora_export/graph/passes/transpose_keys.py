"""Transposes the keys of attention in one step."""

from __future__ import annotations

import onnx_ir as ir


class TransposeKeys(ir.passes.InPlacePass):
    """Replaces Reshape to 3-D, Transpose(0, 2, 1), Reshape back by one Transpose of the last two axes.

    torchlib writes `key.transpose(-2, -1)` of unknown rank that way, with a dozen nodes of shape arithmetic, for
    each layer.
    Applies only where the value's rank is 4 and the outer reshapes do nothing but merge and split its leading axes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            source = _source_of_chain(node)
            if source is None:
                continue
            last = node.outputs[0].consumers()[0]
            swap = ir.node("Transpose", [source], {"perm": [0, 1, 3, 2]})
            out = last.outputs[0]
            swap.outputs[0].type = source.type
            b, h, s, d = source.shape  # type: ignore[misc]
            swap.outputs[0].shape = ir.Shape([b, h, d, s])
            swap.outputs[0].name = f"{source.name}_transposed"
            model.graph.insert_before(last, swap)
            ir.convenience.replace_all_uses_with(out, swap.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)


def _source_of_chain(transpose: ir.Node) -> ir.Value | None:
    """The rank-4 value that `transpose` exchanges the last axes of, when it is the middle of such a chain."""
    if transpose.op_type != "Transpose" or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    middle = transpose.inputs[0]
    merge = middle.producer() if middle is not None else None
    consumers = transpose.outputs[0].consumers()
    if merge is None or merge.op_type != "Reshape" or [c.op_type for c in consumers] != ["Reshape"]:
        return None
    source = merge.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 4:
        return None
    into, back = merge.inputs[1], consumers[0].inputs[1]
    if not (_sizes_of(into, source) == ["-1", 2, 3] and _sizes_of(back, source) == [0, 1, 3, 2]):
        return None
    return source


def _sizes_of(target: ir.Value | None, source: ir.Value) -> list[int | str] | None:
    """A reshape's target as axes of `source` ("-1" for a free size), when it is a Concat of slices of its Shape."""
    concat = target.producer() if target is not None else None
    if concat is None or concat.op_type != "Concat":
        return None
    sizes: list[int | str] = []
    for part in concat.inputs:
        constant = ir.convenience.get_const_tensor(part) if part is not None else None
        if constant is not None:
            sizes.extend(str(int(size)) for size in constant.numpy().reshape(-1))
            continue
        axes = _sliced_axes(part, source)
        if axes is None:
            return None
        sizes.extend(axes)
    return sizes


def _sliced_axes(part: ir.Value | None, source: ir.Value) -> list[int] | None:
    """The axes of `source` whose sizes `part` holds, when it is Slice(Shape(source), start, end)."""
    node = part.producer() if part is not None else None
    if node is None or node.op_type != "Slice" or len(node.inputs) > 3:
        return None
    shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is not source:
        return None
    bounds = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:3] if value is not None]
    if any(bound is None for bound in bounds):
        return None
    start, end = (int(bound.numpy().reshape(-1)[0]) for bound in bounds)  # type: ignore[union-attr]
    return list(range(4))[start:end]
