"""The op of version 2 as a runtime runs it: rows with adapters of their own in slots, beside each adapter alone and
against float64, and what a swap needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from gpu_check.adapters import Batch, swapped
from gpu_check.machine import Machine
from gpu_check.shapes import Projection
from teamlora_export.graph import op

PROJECTION = Projection("one node", "q/k/v", 576, (576, 192, 192), 32)
# Rows, and tokens of each: by the kernels for few tokens and by those for many.
SHAPES = ((3, 1), (3, 40))
SLOTS = 3
DTYPE = "fp16"
# Between rows of several adapters and of one, whose sums are cut in other ways: of the largest output.
_TOLERANCE = 2.0**-8


@dataclass(frozen=True)
class Node:
    """A node of the op in a runtime, as a function that runs it on a batch's own memory, and as the same, captured in a
    CUDA graph; None: this machine has none."""

    run: Callable[[], None]
    captured: Callable[[], None] | None


def judge(
    torch: Any,
    machine: Machine,
    open_slots: Callable[[Batch, Any], Node],
    open_alone: Callable[[Batch, int], Callable[[], None]],
    projection: Projection = PROJECTION,
) -> str:
    """What is to be said.

    Args:
        open_slots: of a batch and its indices, int32 [rows].
        open_alone: of a batch and one slot, whose weights version 1 of the op holds.

    Raises:
        RuntimeError: a result is wrong, by its name.
    """
    worst = apart = 0.0
    for rows, each in SHAPES:
        where = f"{rows} rows of {each} tokens"
        batch = Batch(torch, machine, None, projection, DTYPE, rows, SLOTS, each)
        adapter = batch.indices([0, -1, 1])
        node = open_slots(batch, adapter)
        batch.forget()
        node.run()
        worst = _checked(f"{where}, [0, -1, 1]", batch.difference([0, -1, 1]), worst)
        together = batch.y.clone()
        for row, slot in ((0, 0), (2, 1)):
            batch.forget()
            open_alone(batch, slot)()
            worst = _checked(f"{where}, adapter {slot} alone", batch.difference([slot] * rows), worst)
            own = slice(row * each, (row + 1) * each)
            between = (together[own].float() - batch.y[own].float()).abs().max() / together.float().abs().max()
            # Written so that NaN fails.
            if not float(between) <= _TOLERANCE:
                raise RuntimeError(f"{where}: row {row} is not what adapter {slot} gives alone ({float(between):.4f})")
            apart = max(apart, float(between))
        for name, run, scale in (("a swap", node.run, -0.5), ("a swap in a graph", node.captured, 0.75)):
            if run is not None:
                _begin_again(batch, adapter, scale)
                worst = _checked(f"{where}, {name}", swapped(batch, adapter, run), worst)
    graph = "" if node.captured is not None else "; no graph"
    return f"right ({worst:.2f}), alone the same to {apart:.5f} of the largest, swaps are seen{graph}"


def _begin_again(batch: Batch, adapter: Any, scale: float) -> None:
    """As `swapped` wants it: its indices, and another adapter in slot 2 than in slot 0."""
    batch.copy(1, 2)
    batch.up[2].mul_(scale)
    adapter.copy_(batch.indices([0, 1, 2]))


def _checked(what: str, difference: float, worst: float) -> float:
    # Written so that NaN fails.
    if not difference <= 1:
        raise RuntimeError(f"{what}: wrong ({difference:.2f})")
    return max(worst, difference)


def model(batch: Batch, slot: int | None = None) -> bytes:
    """A model of one node, in ONNX: of slots, which are inputs, or of one slot's weights, which are constants. Rows and
    tokens are unknown."""
    sizes = batch.sizes
    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}[DTYPE]
    inputs = [
        helper.make_tensor_value_info("x", kind, ["rows", "tokens", sizes.inputs]),
        helper.make_tensor_value_info("base", kind, ["rows", "tokens", sizes.out]),
    ]
    constants = []
    for name in ("down", "mix", "up"):
        weights = getattr(batch, name)
        if slot is None:
            of = TensorProto.FLOAT if name == "mix" else kind
            inputs.append(helper.make_tensor_value_info(name, of, list(weights.shape)))
        else:
            constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weights[slot].cpu().numpy()), name))
    names = list(op.INPUTS)
    if slot is None:
        names += op.OPTIONAL_INPUTS
        inputs.append(helper.make_tensor_value_info("adapter", TensorProto.INT32, ["rows"]))
    node = helper.make_node(
        op.NAME,
        names,
        ["y"],
        domain=op.DOMAIN,
        num_experts=sizes.experts,
        shared_down=int(sizes.shared_down),
        out_splits=list(sizes.outs),
    )
    outputs = [helper.make_tensor_value_info("y", kind, ["rows", "tokens", sizes.out])]
    version = op.ADAPTERS_VERSION if slot is None else op.VERSION
    opsets = [helper.make_opsetid("", op.BODY_OPSET), helper.make_opsetid(op.DOMAIN, version)]
    graph = helper.make_graph([node], "one", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def shape_of(batch: Batch, name: str, rows: int) -> tuple[int, ...]:
    """Of an input or output of the model, in this batch."""
    if name == "adapter":
        return (rows,)
    tensor = getattr(batch, name)
    return (rows, len(tensor) // rows, tensor.shape[1]) if name in ("x", "base", "y") else tuple(tensor.shape)
