"""The graph as a parser of TensorRT takes it: in the wanted dtype, the op's bodies inlined or left to the plugin."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from teamlora_export import __version__
from teamlora_export.bundle import DATA_NAME, MODEL_NAME, Bundle, check_files
from teamlora_export.engine.profiles import choose_capacity
from teamlora_export.errors import ExportError
from teamlora_export.files import link_or_copy, read_record, sha256_of
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.passes.attend_with_past import ExpandPast
from teamlora_export.graph.passes.expand_paired_rotary import ExpandPairedRotary
from teamlora_export.graph.passes.expand_quantised import ExpandQuantised
from teamlora_export.graph.passes.fix_capacity import FixCapacity
from teamlora_export.graph.passes.fix_slots import FixSlots
from teamlora_export.graph.precision import ChangePrecision
from teamlora_export.graph.read import port_of, read_graph
from teamlora_export.manifest import Dtype, Sha256
from teamlora_export.ports import Port
from teamlora_export.progress import Reporter
from teamlora_export.staging import real_path, refuse_inside, require_space, scratch_folder, staged

GRAPH_NAME = "graph.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GraphFacts:
    """`graph.json`: what a graph alone is.

    Attributes:
        plugin: its op is left to the plugin.
        model_sha256: of the bundle's files that it was made of.
        files: the SHA-256 of its own.
    """

    tool: str
    dtype: Dtype
    plugin: bool
    model_sha256: Mapping[str, Sha256]
    files: Mapping[str, Sha256]
    format_version: int = FORMAT_VERSION


def write_graph(
    bundle: Bundle, dtype: str, out: Path, *, for_plugin: bool, reporter: Reporter, capacity: int | None = None
) -> Path:
    """Write the graph for a builder of one's own (trtexec, polygraphy) into the folder `out`; returns the model's path.

    An earlier one there is replaced.

    Args:
        capacity: see `choose_capacity`.

    Raises:
        ExportError: as `prepared_model`; or `out` is something else, or is not as it was written.
    """
    capacity = choose_capacity(bundle, capacity)
    check_files(bundle)
    place = real_path(out)
    refuse_inside(place, bundle.folder)
    with staged(place, _our_files, [bundle.folder]) as folder:
        # Weights of its own: a change to this folder must not reach the bundle, and onnx refuses a file of two names.
        _write_model(bundle, dtype, folder, for_plugin, shutil.copyfile, reporter, capacity)
        files = {name: sha256_of(folder / name) for name in (MODEL_NAME, DATA_NAME)}
        facts = GraphFacts(f"teamlora-export {__version__}", dtype, for_plugin, bundle.manifest.sha256, files)
        (folder / GRAPH_NAME).write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8")
    return out / MODEL_NAME


@contextmanager
def prepared_model(
    bundle: Bundle, dtype: str, place: Path, *, for_plugin: bool, reporter: Reporter, capacity: int | None = None
) -> Iterator[Path]:
    """Write the graph of `bundle` in `dtype` into a folder beside `place`; yields its path, and removes it afterwards.

    Weights are cast one at a time where the dtype changes; where it does not, the bundle's own file is linked. Codes
    are laid out anew in any case.

    Args:
        for_plugin: leave the op's nodes to the plugin, instead of inlining their bodies.
        capacity: of an in-place cache, which TensorRT wants to be a number.

    Raises:
        ExportError: the plugin is wanted but the bundle has no nodes of the op, or a weight does not fit into float16.
    """
    with scratch_folder(place) as folder:
        _write_model(bundle, dtype, folder, for_plugin, link_or_copy, reporter, capacity)
        yield folder / MODEL_NAME


def _write_model(
    bundle: Bundle,
    dtype: str,
    folder: Path,
    for_plugin: bool,
    share: Callable[[Path, Path], object],
    reporter: Reporter,
    capacity: int | None,
) -> None:
    """Write model and weights into `folder`; weights in the dtype that the bundle has come there by `share`."""
    if bundle.manifest.attached is not None:
        raise ExportError(
            f"{bundle.folder}: its graph is another tool's, for ONNX Runtime; engines are built of bundles that "
            "`teamlora-export onnx` wrote."
        )
    if "adapter_dtype" in bundle.manifest.op:
        raise ExportError(
            f"{bundle.folder}: its adapter is in {bundle.manifest.op['adapter_dtype']} beside fp32, for ONNX Runtime; "
            "an engine has one type for both. Export without --adapter-dtype."
        )
    refuse_other_dtype_of_slots(bundle, dtype)
    model = read_graph(bundle)
    if bundle.manifest.shelf is not None:
        FixSlots(bundle.manifest.shelf["slots"])(model)
    if for_plugin and bundle.manifest.op["form"] != "function":
        raise ExportError(
            f"{bundle.folder}: was exported with --op standard, so there is no op for the plugin to take."
        )
    if capacity is not None:
        FixCapacity(capacity)(model)
    ExpandPast()(model)
    ExpandQuantised()(model)
    ChangePrecision(bundle.manifest.dtype, dtype)(model)
    ExpandPairedRotary()(model)
    if for_plugin:
        # A parser prefers a function to a plugin of the same name.
        model.functions.clear()
        for node in model.graph:
            node.overload = ""
    else:
        inline_bodies(model)
    if dtype == bundle.manifest.dtype and bundle.manifest.quantisation is None:
        require_space(folder, bundle.data.stat().st_size if share is not link_or_copy else 0)
        share(bundle.data, folder / DATA_NAME)
        ir.save(model, folder / MODEL_NAME)
        return
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


def refuse_other_dtype_of_slots(bundle: Bundle, dtype: str) -> None:
    """What is copied into a slot is an adapter's file as it is."""
    if bundle.manifest.shelf is not None and dtype != bundle.manifest.dtype:
        raise ExportError(
            f"{bundle.folder}: the adapters of its shelf are in {bundle.manifest.dtype}, and slots in {dtype} would "
            f"not take them. Export it with --dtype {dtype}."
        )


def slot_inputs(bundle: Bundle) -> tuple[Port, ...]:
    """What an engine of a bundle with a shelf takes beside the model's own inputs: the slots of each weight, and the
    index of each row; nothing where there is no shelf."""
    if bundle.manifest.shelf is None:
        return ()
    model = read_graph(bundle)
    own = {port.name for port in bundle.manifest.inputs}
    FixSlots(bundle.manifest.shelf["slots"])(model)
    return tuple(port for port in map(port_of, model.graph.inputs) if port.name not in own)


def _our_files(out: Path) -> set[str]:
    """What the folder of a graph alone holds that we wrote and nobody has changed since."""
    refusal = f"{out}: exists and is not a graph that `trt graph` wrote; it is left as it is. Choose another -o."
    try:
        facts = read_record(out / GRAPH_NAME, GraphFacts, "Choose another -o.", out, newest=FORMAT_VERSION)
    except FileNotFoundError:
        raise ExportError(refusal) from None
    except ExportError as reason:
        raise ExportError(f"{refusal} ({reason})") from None
    for name, digest in facts.files.items():
        if (out / name).is_file() and sha256_of(out / name, out) != digest:
            raise ExportError(f"{out / name}: is not as it was written, and would be lost. Choose another -o.")
    return {GRAPH_NAME, *facts.files}
