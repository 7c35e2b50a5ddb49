"""`teamlora-export attach`: a graph that somebody else made, and an adapter, in; a bundle out.

    open both -> find each module's product -> put the op behind it -> copy the graph's weights, write the adapter's

Nothing is written before every module is found. The graph's own nodes stay as they are, and its weights are never in
memory: a file is copied block by block, and several are put together tensor by tensor.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from teamlora_export import __version__
from teamlora_export.adapter import AdapterSpec, read_adapter
from teamlora_export.attach.insert import insert
from teamlora_export.attach.interface import read_interface, window_caches
from teamlora_export.attach.match import match
from teamlora_export.attach.read import GENAI_NAME, Foreign, external_values, open_foreign
from teamlora_export.attach.weigh import Weigher
from teamlora_export.bundle import (
    ADAPTER_DATA_NAME,
    COMPANIONS,
    DATA_NAME,
    MODEL_NAME,
    Bundle,
    copy_companions,
    hash_files,
    listed_files,
    read_bundle,
)
from teamlora_export.errors import ExportError
from teamlora_export.files import LARGEST_TEXT, copy_file, open_file, read_json, sha256_of
from teamlora_export.graph import external_data, op, weights
from teamlora_export.graph.cooked import NoBase
from teamlora_export.graph.passes.attach_functions import AttachFunctions
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.graph.read import StoredWeight, read_graph
from teamlora_export.manifest import MANIFEST_NAME, BaseOrigin, Manifest, write_manifest
from teamlora_export.model.source import BaseSource, find_base, hashing_weights
from teamlora_export.origin import (
    describe_adapter,
    describe_op,
    describe_refit,
    narrowing,
    refuse_cancelled_routing,
    warn_of_normalizers,
)
from teamlora_export.progress import Reporter
from teamlora_export.staging import real_path, refuse_foreign, require_space, staged

# What describes a model beside its graph, onnxruntime-genai's own among it.
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab")
_INLINE = 1 << 20


def attach(
    base: Path,
    adapter_folder: str | Path,
    out: str | Path,
    *,
    base_source: str | None = None,
    adapter_dtype: str | None = None,
    reporter: Reporter | None = None,
) -> Bundle:
    """Attach the adapter in `adapter_folder` to the graph `base` (a file, or a folder with one), as the bundle `out`.

    Args:
        base_source: the model that the graph was made of (a Hugging Face folder, or a hub name), whose weights then
            have to be those of the graph's products.
        adapter_dtype: fp16 or bf16: the adapter's matrices are in that type, beside a graph in fp32.

    Raises:
        ExportError: wrong input; a module has no product, or several; nothing has been written then.
    """
    reporter = reporter or Reporter()
    adapter = read_adapter(adapter_folder)
    refuse_cancelled_routing(adapter)
    if adapter.overrides:
        raise ExportError(
            f"{adapter.source}: replaces {len(adapter.overrides)} weights of the base (modules_to_save or bias), "
            "which an attached adapter cannot. Export the base with it: `teamlora-export onnx`."
        )
    foreign = open_foreign(Path(base))
    source = find_base(base_source) if base_source is not None else None
    given, out = Path(out), real_path(Path(out))
    inputs = [foreign.path, *(foreign.folder / name for name in foreign.data), Path(adapter_folder)]
    if source is not None:
        inputs.append(source.folder)
    refuse_foreign(out, listed_files, inputs)
    _refuse_old_opset(foreign)
    with reporter.step(f"Finding {len(adapter.projections)} modules in {foreign.path.name}"):
        weigher = Weigher(source) if source is not None else None
        found = match(foreign.graph, adapter, str(foreign.path), weigher)
    warn_of_normalizers(adapter, reporter)
    kinds = {span.product.dtype for answer in found.values() for span in answer.spans}
    interface = read_interface(foreign, source.folder if source is not None else None, kinds)
    if kinds != {IR_DTYPES[interface.dtype]}:
        names = ", ".join(sorted(kind.name.lower() for kind in kinds))
        reporter.warn(
            f"{foreign.path}: the adapted products are in {names}, and the model's type is {interface.dtype}: "
            "`validate` judges them by that, and may find errors of the other."
        )
    windows = len(window_caches(foreign.graph))
    if windows:
        reporter.warn(
            f"{foreign.path}: {windows} layers keep their cache in buffers of their window, which onnxruntime-genai's "
            "generator provides. What `deploy python`, `cpp` and `triton` write lets them grow; `generate` does not."
        )
    nodes = insert(foreign.model, adapter, found)
    AttachFunctions()(foreign.model)
    narrow = narrowing(adapter_dtype, interface.dtype)
    if narrow is not None:
        narrow(foreign.model)
    recipes = {
        value: recipe
        for value in foreign.graph.initializers.values()
        if (recipe := weights.recipe_of(value)) is not None
    }
    named = {value.name or "": recipe for value, recipe in recipes.items()}
    with staged(out, listed_files, inputs, lambda there: there / MODEL_NAME) as folder:
        data, origin = _place_weights(foreign, adapter, folder, reporter)
        own = _write_adapter(list(recipes), adapter, folder, reporter)
        ir.save(foreign.model, folder / MODEL_NAME)
        _copy_text(foreign, folder)
        if source is not None:
            _copy_missing(source, folder)
        manifest = Manifest(
            tool={"teamlora-export": __version__, "onnx-ir": importlib.metadata.version("onnx-ir")},
            base=_describe_base(source, folder, foreign),
            adapter=describe_adapter(adapter),
            op=describe_op(nodes, "function", adapter_dtype),
            task=interface.task,
            dtype=interface.dtype,
            inputs=interface.inputs,
            outputs=interface.outputs,
            tokens=interface.tokens,
            sha256=hash_files(folder, {DATA_NAME: data, ADAPTER_DATA_NAME: own}),
            refit=describe_refit(named, adapter, ""),
            recipes={},
            attached={
                "source": str(foreign.path.resolve()),
                "sha256": {foreign.path.name: sha256_of(foreign.path, foreign.folder), **origin},
                "projections": {path: list(answer.evidence) for path, answer in found.items()},
            },
        )
        write_manifest(folder, manifest)
        # What was foreign may hold what nobody can read once it is written.
        read_graph(Bundle(folder, manifest))
    return Bundle(given, read_bundle(out).manifest)


def _refuse_old_opset(foreign: Foreign) -> None:
    opset = foreign.graph.opset_imports.get("")
    if opset is None or opset < op.OLDEST_OPSET:
        raise ExportError(
            f"{foreign.path}: is of opset {opset}; the op's definition needs {op.OLDEST_OPSET} at least. Export it "
            "with a newer opset, or convert it with onnx.version_converter."
        )


def _place_weights(
    foreign: Foreign, adapter: AdapterSpec, folder: Path, reporter: Reporter
) -> tuple[str, dict[str, str]]:
    """The graph's weights in one file: its SHA-256, and that of each file that they came from, by name."""
    outside = list(external_values(foreign.model))
    inline = [value for value in foreign.graph.initializers.values() if _is_large(value.const_value)]
    if len(foreign.data) == 1 and not inline:
        name = foreign.data[0]
        # Not a link: onnx refuses to load a file that has two names, here and where it came from.
        with open_file(foreign.folder / name, foreign.folder) as source:
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            require_space(folder, size)
            with reporter.bytes(f"Copying {name}", size) as progress:
                digest = external_data.copy_hashed(source, folder / DATA_NAME, progress)
        for value in outside:
            value.const_value = _moved(value.const_value, folder)
        return digest, {name: digest}
    moved = [*outside, *inline]
    size = sum(value.const_value.nbytes for value in moved if value.const_value is not None)
    require_space(folder, size)
    with reporter.bytes("Writing the graph's weights", size) as progress:
        digest = external_data.write_external_data(moved, NoBase(), adapter, folder / DATA_NAME, progress)
    return digest, {name: sha256_of(foreign.folder / name, foreign.folder) for name in foreign.data}


def _write_adapter(own: list[ir.Value], adapter: AdapterSpec, folder: Path, reporter: Reporter) -> str:
    """The adapter's weights in a file of their own; its SHA-256."""
    size = weights.total_bytes(own)
    require_space(folder, size)
    with reporter.bytes("Writing the adapter's weights", size) as progress:
        return external_data.write_external_data(own, NoBase(), adapter, folder / ADAPTER_DATA_NAME, progress)


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    """Whether numbers that the graph itself holds are so many that they go into a file beside it."""
    inside = not isinstance(tensor, (ir.ExternalTensor, weights.WeightTensor))
    return tensor is not None and inside and tensor.nbytes >= _INLINE


def _moved(tensor: Any, folder: Path) -> StoredWeight:
    """The same bytes, in the bundle's file."""
    return StoredWeight(
        DATA_NAME, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=folder
    )


def _copy_text(foreign: Foreign, folder: Path) -> None:
    """What describes the model beside its graph; onnxruntime-genai is told the graph's new name where it has one."""
    copy_companions(foreign.folder, folder)
    if foreign.genai is None:
        return
    for path in sorted(foreign.folder.iterdir()):
        if path.suffix in _TEXT_SUFFIXES and path.name not in (*foreign.data, MANIFEST_NAME) and path.is_file():
            copy_file(path, folder / path.name, foreign.folder, LARGEST_TEXT)
    if foreign.path.name != MODEL_NAME:
        model = foreign.genai["model"]
        fields = {**foreign.genai, "model": {**model, "decoder": {**model["decoder"], "filename": MODEL_NAME}}}
        (folder / GENAI_NAME).write_text(json.dumps(fields, indent=4) + "\n", encoding="utf-8")


def _copy_missing(source: BaseSource, folder: Path) -> None:
    """Configuration and tokenizer of the base, as far as they are not beside the graph."""
    for name in COMPANIONS:
        if (source.folder / name).exists() and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(source.folder / name, folder / name, source.folder, LARGEST_TEXT)


def _describe_base(source: BaseSource | None, folder: Path, foreign: Foreign) -> BaseOrigin:
    """The model that the graph was made of, as far as that is known."""
    try:
        kind = read_json(folder / "config.json", "Download the model again.", folder).get("model_type")
    except FileNotFoundError:
        kind = None
    kind = kind or (foreign.genai or {}).get("model", {}).get("type")
    if source is None:
        return {"source": "", "model_type": str(kind or "unknown"), "sha256": {}}
    with hashing_weights(source) as finish:
        return {"source": source.origin, "model_type": str(kind or "unknown"), "sha256": finish()}
