"""Rewrites of the traced graph, one a file, in the order in which they run.

To add one: write an `onnx_ir.passes.InPlacePass` in a file of its own, and put it into `STEPS` where it belongs.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.passes.attend_with_past import AttendWithPast
from teamlora_export.graph.passes.fold_transposes import FoldTransposes
from teamlora_export.graph.passes.lift_gelu import LiftGelu
from teamlora_export.graph.passes.lift_layer_norms import LiftLayerNorms
from teamlora_export.graph.passes.lift_rms_norms import LiftRMSNorms
from teamlora_export.graph.passes.lift_rotary import LiftRotary
from teamlora_export.graph.passes.merge_heads import MergeHeads
from teamlora_export.graph.passes.module_outputs import MODULES_KEY, NameModuleOutputs
from teamlora_export.graph.passes.name_nodes import NameNodes
from teamlora_export.graph.passes.pack_siblings import PackSiblings
from teamlora_export.graph.passes.share_dimensions import ShareDimensions
from teamlora_export.graph.passes.simplify_shapes import SimplifyShapes
from teamlora_export.graph.passes.transpose_keys import TransposeKeys
from teamlora_export.graph.passes.widen_first import WidenFirst

STEPS: tuple[type[ir.passes.InPlacePass], ...] = (
    WidenFirst,
    NameModuleOutputs,
    ShareDimensions,
    SimplifyShapes,
    FoldTransposes,
    TransposeKeys,
    LiftRMSNorms,
    LiftLayerNorms,
    LiftRotary,
    LiftGelu,
    PackSiblings,
    MergeHeads,
    AttendWithPast,
    common.CommonSubexpressionEliminationPass,
    common.RemoveUnusedNodesPass,
    AttachFunctions,
    NameNodes,
)


def rewrite(model: ir.Model) -> None:
    """Run every step on `model`, in place."""
    for step in STEPS:
        step()(model)


def inline_bodies(model: ir.Model) -> None:
    """Replace every op of ours by its body (`--op standard`), in place. Values keep the names of their modules."""
    modules = {
        value.name: dict(value.metadata_props)
        for node in model.graph
        for value in node.outputs
        if MODULES_KEY in value.metadata_props
    }
    common.InlinePass()(model)
    for node in model.graph:
        for value in node.outputs:
            if value.name in modules:
                value.metadata_props.update(modules[value.name])
    common.RemoveUnusedNodesPass()(model)
    NameNodes()(model)
