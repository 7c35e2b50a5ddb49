"""Opens a graph that somebody else made; its weights stay where they are, and none is outside of its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import onnx_ir as ir

from teamlora_export.attach.stored import name_of
from teamlora_export.bundle import MODEL_NAME
from teamlora_export.errors import ExportError, first_line
from teamlora_export.files import open_file, read_json
from teamlora_export.graph import op
from teamlora_export.graph.read import stored_in
from teamlora_export.manifest import MANIFEST_NAME

GENAI_NAME = "genai_config.json"
_ADVICE = "Build the model again."
# Bytes: what protobuf can hold.
_LARGEST = 1 << 31


@dataclass(frozen=True)
class Foreign:
    """A foreign graph.

    Attributes:
        path: of the graph. folder: where it and all of its weights are.
        data: names of the files with its weights, relative to `folder`.
        genai: what onnxruntime-genai's configuration beside it says; None where there is none that names this graph.
    """

    path: Path
    folder: Path
    model: ir.Model
    data: tuple[str, ...]
    genai: dict[str, Any] | None

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph


def open_foreign(given: Path) -> Foreign:
    """The graph in the file `given`, or in the folder of that name.

    Raises:
        ExportError: there is none, or several; it cannot be read; an adapter is attached to it already; or its weights
            are outside of its folder, or beyond the end of their files.
    """
    genai = _read_genai(given if given.is_dir() else given.parent)
    path = _graph_in(given, genai) if given.is_dir() else given
    folder = path.parent
    if _decoder_name(genai) != path.name:
        genai = None
    try:
        open_file(path, folder, _LARGEST).close()
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file. Give an ONNX graph, or a folder with one.") from None
    try:
        model = ir.load(path)
        ir.to_proto(model)
    except Exception as error:  # protobuf's and onnx_ir's own, of many kinds
        reason = _wrong_place(path) or first_line(error)
        raise ExportError(f"{path}: is no ONNX graph that can be read ({reason}). {_ADVICE}") from None
    if any(op.is_op(node) for node in model.graph):
        raise ExportError(f"{path}: has an adapter already. Give the graph that it was attached to.")
    _refuse_held_outside(model, path)
    _refuse_circles(model.graph, path)
    return Foreign(path, folder, model, _open_data(model, path), genai)


def _wrong_place(path: Path) -> str | None:
    """What is wrong with the places of a graph's weights in their files: onnx_ir (1.1) fails in saying it."""
    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
    except Exception:  # protobuf's own
        return None
    for tensor in tensors:
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                return f"the {entry.key} of {tensor.name!r:.80} is {entry.value!r:.40}"
    return None


def _open_data(model: ir.Model, path: Path) -> tuple[str, ...]:
    """The names of the files with a model's weights, which then are of them as they were looked at.

    Raises:
        ExportError: a weight is outside of its file, or has no numbers.
    """
    sizes: dict[str, int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                _refuse_hollow(value, path)
                continue
            name = str(tensor.location)
            if name not in sizes:
                sizes[name] = _size_of(name, path)
            try:
                value.const_value = stored_in(tensor, path.parent / name, sizes[name], _ADVICE)
            except (TypeError, ValueError) as error:
                raise ExportError(
                    f"{path}: says of {value.name!r:.80} in {name} what is no place ({first_line(error)}). {_ADVICE}"
                ) from None
    return tuple(sizes)


def _refuse_hollow(value: ir.Value, path: Path) -> None:
    """Every weight inside of the graph has as many numbers as its shape says."""
    tensor = value.const_value
    problem = "has no numbers" if tensor is None else None
    if tensor is not None and tensor.dtype != ir.DataType.STRING:
        try:
            problem = None if len(tensor.tobytes()) == tensor.nbytes else "has not as many numbers as its shape says"
        except Exception as error:  # onnx_ir's and NumPy's own
            problem = f"has numbers that cannot be read ({first_line(error)})"
    if problem is not None:
        raise ExportError(f"{path}: its weight {value.name!r:.80} {problem}. {_ADVICE}")


def _refuse_circles(graph: ir.Graph, path: Path) -> None:
    """No node reads what is computed of what it gives."""
    waiting = {node: len(set(node.predecessors())) for node in graph}
    ready = [node for node, count in waiting.items() if not count]
    for node in ready:
        for reader in dict.fromkeys(node.successors()):
            if reader in waiting:
                waiting[reader] -= 1
                if not waiting[reader]:
                    ready.append(reader)
    if len(ready) < len(waiting):
        node = next(node for node, count in waiting.items() if count)
        raise ExportError(f"{path}: {name_of(node)} reads what is computed of its own result. {_ADVICE}")


def external_values(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer, of the graph and of those inside of it, whose numbers are in a file beside it."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value


def _refuse_held_outside(model: ir.Model, path: Path) -> None:
    """Constants belong into the graph: no exporter puts them elsewhere."""
    nodes = [*model.graph.all_nodes(), *(node for each in model.functions.values() for node in each.all_nodes())]
    for node in nodes:
        for attribute in node.attributes.values():
            held = attribute.value if attribute.type == ir.AttributeType.TENSORS else [attribute.value]
            if any(isinstance(each, ir.ExternalTensor) for each in held or ()):
                raise ExportError(
                    f"{path}: {node.name or node.op_type:.80} holds a constant in another file. {_ADVICE}"
                )


def _size_of(name: str, path: Path) -> int:
    """Bytes of a file of weights, which is in the graph's folder.

    Raises:
        ExportError: it is elsewhere, or is not there.
    """
    place = PurePosixPath(name)
    if not name or place.is_absolute() or ".." in place.parts or "\\" in name:
        raise ExportError(f"{path}: has weights in {name!r:.80}, which is not in its folder. {_ADVICE}")
    try:
        with open_file(path.parent / place, path.parent) as file:
            return file.seek(0, 2)
    except FileNotFoundError:
        raise ExportError(f"{path.parent / place}: is missing, and {path.name} has weights in it.") from None


def _read_genai(folder: Path) -> dict[str, Any] | None:
    try:
        fields: dict[str, Any] = read_json(folder / GENAI_NAME, _ADVICE, folder)
        return fields
    except FileNotFoundError:
        return None


def _decoder_name(genai: dict[str, Any] | None) -> str | None:
    """The file of onnxruntime-genai's one decoder."""
    model = genai.get("model") if genai is not None else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    name = decoder.get("filename") if isinstance(decoder, dict) else None
    return name if isinstance(name, str) else None


def _graph_in(folder: Path, genai: dict[str, Any] | None) -> Path:
    if (folder / MANIFEST_NAME).exists():
        raise ExportError(f"{folder}: is a bundle of teamlora-export. Export it again with the other adapter.")
    if genai is not None:
        name = _decoder_name(genai)
        if name is None or PurePosixPath(name).name != name:
            raise ExportError(
                f"{folder / GENAI_NAME}: names no file of one decoder (model.decoder.filename). An adapter is attached "
                "to models of one graph; give the .onnx file of the decoder itself."
            )
        return folder / name
    found = sorted(folder.glob("*.onnx"))
    if (folder / MODEL_NAME).exists() or len(found) == 1:
        return folder / MODEL_NAME if (folder / MODEL_NAME).exists() else found[0]
    what = f"holds {len(found)} graphs" if found else "holds no ONNX graph"
    raise ExportError(f"{folder}: {what} and no {MODEL_NAME}. Name the file.")
