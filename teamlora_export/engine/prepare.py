"""The graph as a parser of TensorRT takes it: in the wanted dtype, the op's bodies inlined or left to the plugin."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from teamlora_export.bundle import DATA_NAME, MODEL_NAME, Bundle, check_files
from teamlora_export.engine.profiles import choose_capacity
from teamlora_export.errors import ExportError
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.passes.fix_capacity import FixCapacity
from teamlora_export.graph.precision import ChangePrecision
from teamlora_export.graph.read import read_graph
from teamlora_export.interrupt import held, note_written
from teamlora_export.progress import Reporter
from teamlora_export.staging import require_space, scratch_folder


def write_graph(
    bundle: Bundle, dtype: str, out: Path, *, for_plugin: bool, reporter: Reporter, capacity: int | None = None
) -> Path:
    """Write the graph for a builder of one's own (trtexec, polygraphy) into the folder `out`; returns the model's path.

    Args:
        capacity: see `choose_capacity`.

    Raises:
        ExportError: as `prepared_model`; or `out` exists.
    """
    capacity = choose_capacity(bundle, capacity)
    if os.path.lexists(out):
        raise ExportError(f"{out}: exists. Choose another -o.")
    check_files(bundle)
    with prepared_model(bundle, dtype, out, for_plugin=for_plugin, reporter=reporter, capacity=capacity) as path:
        data = path.with_name(DATA_NAME)
        if data.stat().st_nlink > 1:
            # A change to this folder must not reach the bundle, and onnx refuses a file with a second name.
            data.unlink()
            require_space(path.parent, bundle.data.stat().st_size)
            shutil.copyfile(bundle.data, data)
        with held():
            os.rename(path.parent, out)
            note_written(out)
    return out / MODEL_NAME


@contextmanager
def prepared_model(
    bundle: Bundle, dtype: str, place: Path, *, for_plugin: bool, reporter: Reporter, capacity: int | None = None
) -> Iterator[Path]:
    """Write the graph of `bundle` in `dtype` into a folder beside `place`; yields its path, and removes it afterwards.

    Weights are cast one at a time where the dtype changes; where it does not, the bundle's own file is linked.

    Args:
        for_plugin: leave the op's nodes to the plugin, instead of inlining their bodies.
        capacity: of an in-place cache, which TensorRT wants to be a number.

    Raises:
        ExportError: the plugin is wanted but the bundle has no nodes of the op, or a weight does not fit into float16.
    """
    model = read_graph(bundle)
    if for_plugin and bundle.manifest.op["form"] != "function":
        raise ExportError(
            f"{bundle.folder}: was exported with --op standard, so there is no op for the plugin to take."
        )
    if capacity is not None:
        FixCapacity(capacity)(model)
    ChangePrecision(bundle.manifest.dtype, dtype)(model)
    if for_plugin:
        # A parser prefers a function to a plugin of the same name.
        model.functions.clear()
        for node in model.graph:
            node.overload = ""
    else:
        inline_bodies(model)
    with scratch_folder(place) as folder:
        if dtype == bundle.manifest.dtype:
            _link(bundle.data, folder / DATA_NAME)
            ir.save(model, folder / MODEL_NAME)
        else:
            size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
            require_space(folder, size)
            with reporter.bytes(f"Re-typing {bundle.manifest.dtype} to {dtype}", size) as advance:
                ir.save(
                    model,
                    folder / MODEL_NAME,
                    external_data=DATA_NAME,
                    max_workers=1,
                    callback=lambda tensor, _info: advance(tensor.nbytes),
                )
        yield folder / MODEL_NAME


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Another file system, or one without links.
        shutil.copyfile(source, target)
