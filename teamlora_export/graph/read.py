"""Reads the graph of a bundle; its weights stay where they are."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError, first_line
from teamlora_export.files import open_file, refuse_escape
from teamlora_export.ports import Port

# Bytes. A graph without its weights has a few million, whatever the model.
_LARGEST = 1 << 29
_ADVICE = "Export the model again."


class StoredWeight(ir.ExternalTensor):
    """A weight in a file whose path was looked at.

    Backups, snapshots and `trt` give that file more than one name; onnx_ir would take this for an attack.
    """

    def _check_path_containment(self) -> None:
        """`stored_in` has looked at the path."""

    def tobytes(self) -> bytes:
        """Its bytes, read and not mapped: they are no longer memory in use when they have been written."""
        with open(self.path, "rb") as file:
            file.seek(self.offset or 0)
            return file.read(self.nbytes)


def read_graph(bundle: Bundle) -> ir.Model:
    """The graph as it is in the file.

    Raises:
        ExportError: the file holds none, or one with other inputs and outputs than the manifest says, or its weights
            are elsewhere than in the bundle's own file, or beyond its end; or it is larger than any graph.
    """
    open_file(bundle.model, bundle.folder, _LARGEST).close()
    try:
        model = ir.load(bundle.model)
        # What was read may be nothing that can be written: a change in the right place is no error of the format.
        ir.to_proto(model)
    except Exception as error:  # protobuf's and onnx_ir's own, of many kinds
        raise ExportError(
            f"{bundle.model}: is no graph that can be read ({first_line(error)}). Export the model again."
        ) from None
    opset = model.graph.opset_imports.get("")
    if any(function.opset_imports.get("", opset) != opset for function in model.functions.values()):
        raise ExportError(f"{bundle.model}: has functions of another opset than its own. Export the model again.")
    listed = (*bundle.manifest.inputs, *bundle.manifest.outputs)
    if listed != tuple(map(port_of, (*required_inputs(model.graph), *model.graph.outputs))):
        raise ExportError(
            f"{bundle.model}: has not the inputs and outputs that its manifest lists. Export the model again."
        )
    sizes = {}
    for name in bundle.data_names:
        refuse_escape(bundle.folder / name, bundle.folder)
        sizes[name] = (bundle.folder / name).stat().st_size
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            if tensor.location not in sizes:
                raise ExportError(
                    f"{bundle.model}: has a weight in {tensor.location!r:.80}, expected {' or '.join(sizes)}. {_ADVICE}"
                )
            name = str(tensor.location)
            value.const_value = stored_in(tensor, bundle.folder / name, sizes[name], _ADVICE)
    return model


def required_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that have no default."""
    return [value for value in graph.inputs if value.const_value is None]


def port_of(value: ir.Value) -> Port:
    """An input or output of a graph, as a manifest describes it."""
    dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
    sizes = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    return Port(value.name or "", dtype, sizes)


def stored_in(tensor: ir.ExternalTensor, path: Path, held: int, advice: str) -> StoredWeight:
    """A weight in the file `path` of `held` bytes, which was looked at.

    Raises:
        ExportError: it goes beyond the file's end.
    """
    start, size = tensor.offset or 0, tensor.nbytes
    if start < 0 or tensor.length not in (None, size) or start + size > held:
        raise ExportError(
            f"{path}: has {held:,} bytes, which do not hold {tensor.name!r:.80} of {size:,} from {start:,} on. {advice}"
        )
    return StoredWeight(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        base_dir=tensor.base_dir,
    )
