"""A bundle's graph as its deployments run it, and the same graph with its experts bypassed, on the same weights."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.attach.interface import grow_window_caches
from teamlora_export.bench.floor import Work, work_of
from teamlora_export.bundle import MODEL_NAME, Bundle
from teamlora_export.errors import ExportError
from teamlora_export.files import link_or_copy
from teamlora_export.graph import op
from teamlora_export.graph.passes.last_logits import LastLogits
from teamlora_export.graph.read import read_graph
from teamlora_export.manifest import write_manifest
from teamlora_export.staging import real_path, scratch_folder
from teamlora_export.validate.taps import marked_values


@dataclass(frozen=True)
class Graphs:
    """Folders that `deploy.runner` opens, and the work of the graphs in them."""

    adapted: Path
    bypassed: Path
    adapted_work: Work
    bypassed_work: Work


@contextmanager
def written_graphs(bundle: Bundle) -> Iterator[Graphs]:
    """Both graphs in a folder beside the bundle (where nothing can be written there, among temporary files), which is
    gone when the block ends. The weights are linked, or copied where that is not possible.

    Raises:
        ExportError: as `read_graph`; or nothing can be written there; or the graph shows no experts.
    """
    place = real_path(bundle.folder)
    if not os.access(place.parent, os.W_OK | os.X_OK):
        place = Path(tempfile.gettempdir()) / place.name
    with scratch_folder(place) as folder:
        model = read_graph(bundle)
        LastLogits()(model)
        grow_window_caches(model)
        adapted_work = _write(model, bundle, folder / "adapted")
        bypass_experts(model, bundle)
        without = dataclasses.replace(bundle.manifest, shelf=None)
        bypassed_work = _write(model, Bundle(bundle.folder, without), folder / "bypassed")
        yield Graphs(folder / "adapted", folder / "bypassed", adapted_work, bypassed_work)


def bypass_experts(model: ir.Model, bundle: Bundle) -> None:
    """Let every adapted projection of `model`, the graph of `bundle`, give what its base does, in place.

    Raises:
        ExportError: there is none.
    """
    nodes = list(_expert_nodes(model, bundle))
    # A graph that somebody changed may have nodes of any form.
    if not nodes or any(len(node.inputs) < 2 or len(node.outputs) != 1 or None in node.inputs for node in nodes):
        raise ExportError(f"{bundle.folder}: its graph does not show where experts are added. Export the model again.")
    for node in nodes:
        base = node.inputs[1] if op.is_op(node) else node.inputs[0]
        identity = ir.node("Identity", [base], name=node.name)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [identity], node.outputs, identity.outputs)
    model.functions.clear()
    common.RemoveUnusedNodesPass()(model)
    # The slots, and each row's: inputs that have a default.
    for value in [value for value in model.graph.inputs if value.const_value is not None]:
        model.graph.inputs.remove(value)
        model.graph.initializers.pop(str(value.name), None)


def _expert_nodes(model: ir.Model, bundle: Bundle) -> Iterator[ir.Node]:
    """What adds experts to a base: nodes of the op, or, where its body is inlined, the sum at the body's end."""
    if bundle.manifest.op["form"] == "function":
        yield from (node for node in model.graph if op.is_op(node))
        return
    adapted = bundle.manifest.refit["projections"]
    sums: dict[ir.Node, None] = {}
    for value, modules in marked_values(model):
        if any(module.partition("#")[0] in adapted for module in modules):
            node = value.producer()
            if node is not None and node.op_type in ("Split", "Squeeze") and node.inputs[0] is not None:
                node = node.inputs[0].producer()
            if node is not None and node.op_type == "Add":
                sums[node] = None
    yield from sums


def _write(model: ir.Model, bundle: Bundle, folder: Path) -> Work:
    folder.mkdir()
    shelf = bundle.manifest.shelf
    shelved = [adapter["file"] for adapter in shelf["adapters"].values()] if shelf is not None else []
    for name in (*bundle.data_names, *shelved):
        (folder / name).parent.mkdir(exist_ok=True)
        link_or_copy(bundle.folder / name, folder / name)
    write_manifest(folder, bundle.manifest)
    (folder / MODEL_NAME).write_bytes(ir.to_proto(model).SerializeToString())
    return work_of(model)
