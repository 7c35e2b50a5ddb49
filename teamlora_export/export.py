"""`teamlora-export onnx`: base and adapter in, bundle out.

    read and check the adapter -> the graph (kept from before, or traced now) -> weights, past PyTorch -> manifest

Everything that can be wrong with the input is found first, before anything slow starts or is written. With a kept
graph and safetensors weights, torch is never imported.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from teamlora_export import __version__
from teamlora_export.adapter import AdapterSpec, BaseSignature, align_with_base, read_adapter
from teamlora_export.adapter.padding import MOST_ROOM, Room, Slot, as_adapter, slots_for, slots_like
from teamlora_export.bundle import (
    DATA_NAME,
    ENGINES_NAME,
    MODEL_NAME,
    Bundle,
    copy_companions,
    hash_files,
    listed_files,
    names_on_shelf,
    read_bundle,
)
from teamlora_export.dtypes import DTYPES
from teamlora_export.engine.facts import listed_engines
from teamlora_export.errors import ExportError
from teamlora_export.graph import external_data, op, weights
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.passes.quantize_base import QuantizeBase
from teamlora_export.graph.passes.take_adapters import TakeAdapters
from teamlora_export.graph.quantized import Scheme
from teamlora_export.graph.read import port_of, required_inputs
from teamlora_export.graph.traced import LIBRARIES, TracedGraph, graph_key, keep_graph, load_graph
from teamlora_export.manifest import (
    FORMAT_VERSION,
    MOST_SLOTS,
    SHELF_FORMAT_VERSION,
    BaseOrigin,
    Manifest,
    Quantisation,
    ShelvedAdapter,
    write_manifest,
)
from teamlora_export.model.checkpoint import open_safetensors_weights
from teamlora_export.model.source import BaseSource, find_base, hashing_weights
from teamlora_export.origin import (
    MOST_WARNINGS,
    describe_adapter,
    describe_op,
    describe_refit,
    narrowing,
    refuse_cancelled_routing,
    require_one_base,
    warn_of_kernels,
    warn_of_normalizers,
)
from teamlora_export.ports import refuse_unknown_task
from teamlora_export.progress import Reporter
from teamlora_export.shelf import fit_adapter, refuse_overrides, require_name, shelve, slot_file, some_names
from teamlora_export.staging import real_path, refuse_foreign, require_space, staged
from teamlora_export.tokens import read_tokens

OP_FORMS = ("function", "standard")
CACHE_FORMS = ("growing", "in-place")
# Of the options of a shelf.
MOST_OF_SLOTS = {"--slots": MOST_SLOTS, "--slot-rank": MOST_ROOM.rank, "--slot-experts": MOST_ROOM.experts}
# Bits of a code.
WEIGHT_FORMS = {"int4": 4, "int8": 8}


def export_onnx(
    base_name: str,
    adapter_folder: str | Path | Mapping[str, str | Path],
    out: str | Path,
    *,
    slots: int | None = None,
    slot_rank: int | None = None,
    slot_experts: int | None = None,
    slot_targets: Sequence[str] = (),
    dtype: str = "fp32",
    task: str = "auto",
    op_form: str = "function",
    cache: str = "growing",
    weights_form: str | None = None,
    head_form: str | None = None,
    zero_points: bool = False,
    adapter_dtype: str | None = None,
    retrace: bool = False,
    any_base: bool = False,
    reporter: Reporter | None = None,
) -> Bundle:
    """Export `base_name` (a folder or a hub name) with the adapter in `adapter_folder` to the bundle `out`.

    Args:
        adapter_folder: where several are named, they become a shelf that the bundle takes one from for each row.
        slots: how many adapters of a shelf our programs hold in memory; None: as many as it begins with, 8 at least.
        slot_rank, slot_experts: what each slot has room for at least, beside the adapters of the export (`Room`).
        slot_targets: endings of names of modules that have slots as well, as large as those of others.
        dtype: fp32, fp16 or bf16: the type of weights and activations.
        task: auto, or one of `ports.TASKS`.
        op_form: "function" keeps the op, with its body in the model; "standard" inlines the body.
        cache: how a text generator keeps keys and values: "growing" gives back a longer cache on every call, "in-place"
            writes into one buffer for each layer.
        weights_form: "int4" or "int8": the base's linear weights become codes, in blocks of 32 that share a scale; the
            adapter, norms, embeddings and the head stay in `dtype`. None: all weights do.
        head_form: the same for the head, with `weights_form` only.
        zero_points: each block of codes has a zero point.
        adapter_dtype: fp16 or bf16: the adapters' matrices are in that type, beside a graph in fp32.
        retrace: trace the graph even where one is kept from before, and keep none.
        any_base: take adapters that were trained on a base of another name.

    Raises:
        ExportError: wrong input or environment; nothing has been written then.
    """
    reporter = reporter or Reporter()
    if dtype not in DTYPES:
        raise ExportError(f"--dtype {dtype}: unknown. Use {', '.join(DTYPES)}.")
    if op_form not in OP_FORMS:
        raise ExportError(f"--op {op_form}: unknown. Use {' or '.join(OP_FORMS)}.")
    if cache not in CACHE_FORMS:
        raise ExportError(f"--cache {cache}: unknown. Use {' or '.join(CACHE_FORMS)}.")
    refuse_unknown_task(task)
    quantise = _quantiser(weights_form, head_form, zero_points)
    narrow = narrowing(adapter_dtype, dtype)
    room = Room(slot_rank or 0, slot_experts or 0)
    shelved = _read_shelved(
        adapter_folder,
        {"--slots": slots, "--slot-rank": slot_rank, "--slot-experts": slot_experts},
        slot_targets,
    )
    if isinstance(adapter_folder, Mapping):
        folders = list(map(Path, adapter_folder.values()))
    else:
        folders = [Path(adapter_folder)]
    given_adapters = [read_adapter(folders[0])] if shelved is None else list(shelved.values())
    source = find_base(base_name)
    base_names = require_one_base(given_adapters, source.origin, any_base, reporter)
    for each in given_adapters:
        refuse_cancelled_routing(each)
    adapter = given_adapters[0] if shelved is None else _slots_of_all(shelved, room, slot_targets, source, task)
    # Once: the folder that a relative path starts from may be the one that is replaced.
    given, out, inputs = Path(out), real_path(Path(out)), (source.folder, *folders)
    refuse_foreign(out, _our_files, inputs)
    if (out / ENGINES_NAME).is_dir():
        reporter.warn(f"{out}: its engines are of the model that is replaced, and are removed with it.")
    if left_out := sorted(names_on_shelf(out) - (shelved or {}).keys()):
        reporter.warn(
            f"{out}: {', '.join(left_out)[:200]} on the shelf that is replaced: not given here, and removed with it."
        )
    with hashing_weights(source) as finish_hashing:
        traced = _find_graph(source, adapter, given_adapters, task, dtype, cache == "in-place", retrace, reporter)
        adapter = _align_all(adapter, given_adapters, traced.signature)
        model = traced.model
        for each in (shelved or {"": adapter}).values():
            warn_of_normalizers(each, reporter)
        warn_of_kernels(adapter, reporter)
        _warn_of_unused(model, adapter, reporter)
        if quantise is not None and not quantise(model).modified:
            raise ExportError(f"--weights {weights_form}: {source.name} has no linear weights of its own to quantise.")
        if quantise is not None and quantise.head is not None and not quantise.heads:
            raise ExportError(f"--head {head_form}: a model for {traced.task} has no head to quantise. Leave it out.")
        if narrow is not None:
            narrow(model)
        nodes = sum(op.is_op(node) for node in model.graph)
        recipes = {
            value.name or "": recipe
            for value in model.graph.initializers.values()
            if (recipe := weights.recipe_of(value))
        }
        refit = describe_refit(recipes, adapter, traced.signature.body_prefix)
        # Before anything is written: an adapter may not fit.
        fitting = {name: fit_adapter(each, refit, source.name) for name, each in (shelved or {}).items()}
        if shelved is not None:
            TakeAdapters()(model)
        version = op.VERSION if shelved is None else op.ADAPTERS_VERSION
        if op_form == "standard":
            inline_bodies(model)
        model.producer_name, model.producer_version = "teamlora-export", __version__
        with staged(out, _our_files, inputs, lambda there: there / MODEL_NAME) as folder:
            data_sha256 = _write_weights(model, source, traced, adapter, folder, reporter)
            ir.save(model, folder / MODEL_NAME)
            copy_companions(source.folder, folder)
            if source.gguf_file is not None:
                _open_base(source, traced.task).save_companions(folder)
            adapters: dict[str, ShelvedAdapter] = {}
            for name, each in (shelved or {}).items():
                with reporter.step(f"Writing the adapter {name}"):
                    content, sha256 = slot_file(fitting[name], refit["weights"], adapter_dtype or dtype, each.sha256)
                    adapters[name] = shelve(folder, name, content, sha256, each)
            manifest = Manifest(
                tool={"teamlora-export": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}},
                base=_describe_base(source, traced, finish_hashing(), None if shelved is None else base_names),
                adapter=describe_adapter(adapter if shelved is None else dataclasses.replace(adapter, source="")),
                op=describe_op(nodes, op_form, adapter_dtype, version),
                task=traced.task,
                dtype=dtype,
                inputs=tuple(port_of(value) for value in required_inputs(model.graph)),
                outputs=tuple(port_of(value) for value in model.graph.outputs),
                tokens=read_tokens(folder, traced.task),
                sha256=hash_files(folder, {DATA_NAME: data_sha256}),
                refit=refit,
                quantisation=_describe_quantisation(quantise) if quantise is not None else None,
                recipes={name: recipe.to_json() for name, recipe in recipes.items() if name not in refit["weights"]},
                format_version=FORMAT_VERSION if shelved is None else SHELF_FORMAT_VERSION,
                shelf=None if shelved is None else {"slots": slots or max(8, len(shelved)), "adapters": adapters},
            )
            write_manifest(folder, manifest)
    return Bundle(given, read_bundle(out).manifest)


def _read_shelved(
    given: str | Path | Mapping[str, str | Path], numbers: Mapping[str, int | None], targets: Sequence[str]
) -> dict[str, AdapterSpec] | None:
    """The adapters of a shelf, by name; None where there is one adapter and no shelf.

    Args:
        numbers, targets: what its options say, by option; None, or none: nothing.
    """
    said = {option: number for option, number in numbers.items() if number is not None}
    if not isinstance(given, Mapping):
        if said or targets:
            option = next(iter(said), "--slot-targets")
            raise ExportError(f"{option}: is for adapters that have names. Give --adapter NAME=FOLDER.")
        return None
    for option, number in said.items():
        if not 1 <= number <= MOST_OF_SLOTS[option]:
            raise ExportError(f"{option} {number}: give 1 to {MOST_OF_SLOTS[option]}.")
    if not given:
        raise ExportError("There is no adapter. Give --adapter NAME=FOLDER.")
    found = {require_name(name): read_adapter(folder) for name, folder in given.items()}
    for adapter in found.values():
        refuse_overrides(adapter)
    return found


def _slots_of_all(
    shelved: Mapping[str, AdapterSpec], room: Room, targets: Sequence[str], source: BaseSource, task: str
) -> AdapterSpec:
    """What the graph of a shelf is traced with; see `as_adapter`.

    Raises:
        ExportError: one of several does not fit the base, or one of `targets` names nothing in it.
    """
    adapters, base = list(shelved.values()), None
    # Trained with the head or on the body, they name the same module in two ways, which the base alone tells.
    named = {frozenset(path.partition(".")[0] for path in each.projections) for each in adapters}
    if targets or len(named) > 1:
        base = _open_base(source, task).signature
        adapters = [align_with_base(each, base) for each in adapters]
    slots = as_adapter(slots_for(adapters, room), f"(one of {some_names(shelved)})")
    return slots if base is None else _with_more_slots(slots, targets, base)


def _align_all(adapter: AdapterSpec, given: Sequence[AdapterSpec], base: BaseSignature) -> AdapterSpec:
    """`align_with_base`, which names that of the given adapters that does not fit."""
    for each in given:
        if each is not adapter:
            align_with_base(each, base)
    return align_with_base(adapter, base)


def _with_more_slots(adapter: AdapterSpec, targets: Sequence[str], base: BaseSignature) -> AdapterSpec:
    """The slots of `adapter`, and those of further modules, under the base's names.

    Raises:
        ExportError: one of `targets` ends no name of a linear layer of the base.
    """
    aligned = align_with_base(adapter, base)
    slots = {path: Slot.around(projection) for path, projection in aligned.projections.items()}
    more: dict[str, tuple[int, int]] = {}
    for target in targets:
        found = {path: linear for path, linear in base.linears.items() if f".{path}".endswith(f".{target}")}
        if not target or not found:
            kinds = ", ".join(sorted({path.rpartition(".")[2] for path in base.linears}))
            raise ExportError(
                f"--slot-targets {target!r:.80}: ends no linear layer of {base.name}. It has {kinds:.300}."
            )
        more |= {p: (linear.in_features, linear.out_features) for p, linear in found.items() if p not in slots}
    return as_adapter(slots | slots_like(slots, more), aligned.source)


def _quantiser(weights_form: str | None, head_form: str | None, zero_points: bool) -> QuantizeBase | None:
    for option, form in (("--weights", weights_form), ("--head", head_form)):
        if form not in (None, *WEIGHT_FORMS):
            raise ExportError(f"{option} {form}: unknown. Use {' or '.join(WEIGHT_FORMS)}.")
    if weights_form is None:
        if head_form is not None or zero_points:
            raise ExportError("--head and --zero-points: are for quantised weights. Give --weights as well.")
        return None
    weights, head = (
        Scheme(WEIGHT_FORMS[form], zero_points) if form is not None else None for form in (weights_form, head_form)
    )
    assert weights is not None
    return QuantizeBase(weights, head)


def _describe_base(
    source: BaseSource, traced: TracedGraph, sha256: dict[str, str], names: list[str] | None
) -> BaseOrigin:
    described: BaseOrigin = {"source": source.origin, "model_type": traced.model_type, "sha256": sha256}
    if names is not None:
        described["names"] = names
    return described


def _describe_quantisation(quantise: QuantizeBase) -> Quantisation:
    import onnxruntime

    weights, head = quantise.weights, quantise.head
    return {
        "bits": weights.bits,
        "head": head.bits if head is not None else 0,
        "zero_points": weights.zero_points,
        "block": weights.block,
        "onnxruntime": onnxruntime.__version__,
    }


def _our_files(out: Path) -> set[str]:
    """The files of an existing bundle that an export replaces."""
    return {*listed_files(out), *listed_engines(out)}


def _find_graph(
    source: BaseSource,
    adapter: AdapterSpec,
    given: Sequence[AdapterSpec],
    task: str,
    dtype: str,
    in_place: bool,
    retrace: bool,
    reporter: Reporter,
) -> TracedGraph:
    """
    Args:
        adapter: what the graph takes. given: the adapters that have to fit the base.
    """
    key = graph_key(source, adapter, task, dtype, in_place)
    kept = None if retrace else load_graph(key)
    if kept is not None:
        reporter.say("Graph: kept from an earlier export (--retrace traces it again)")
        return kept

    with _rare_collections():
        # Heavy imports wait until there is something to trace.
        import torch

        from teamlora_export.graph.build import build_graph

        base = _open_base(source, task)
        aligned = _align_all(adapter, given, base.signature)
        model = build_graph(base, aligned, getattr(torch, DTYPES[dtype].torch), reporter, in_place=in_place)
    traced = TracedGraph(model, base.signature, base.aliases(), base.task, base.config.model_type)
    if not retrace:
        keep_graph(key, traced)
    return traced


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python looks for garbage rarely inside of the block.

    Imports and tracing make millions of objects that stay; looking through them again and again took a tenth of the
    time.
    """
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _write_weights(
    model: ir.Model, source: BaseSource, traced: TracedGraph, adapter: AdapterSpec, folder: Path, reporter: Reporter
) -> str:
    """Write the external data; return its SHA-256."""
    needed = weights.base_names(model, adapter)
    base_weights: weights.BaseWeights | None = open_safetensors_weights(
        source, traced.aliases, traced.signature, needed
    )
    if base_weights is None:
        from teamlora_export.model.base import LoadedWeights

        with reporter.step("Loading the base's weights through transformers"):
            base_weights = LoadedWeights(_open_base(source, traced.task), needed)
    size = weights.total_bytes(model.graph.initializers.values())
    require_space(folder, size)
    with reporter.bytes("Writing weights", size) as progress:
        return external_data.write_external_data(
            model.graph.initializers.values(), base_weights, adapter, folder / DATA_NAME, progress
        )


def _open_base(source: BaseSource, task: str):  # type: ignore[no-untyped-def]
    """The base in PyTorch; imported late, because most exports do not need it."""
    from teamlora_export.model.base import open_base

    return open_base(source, task)


def _warn_of_unused(model: ir.Model, adapter: AdapterSpec, reporter: Reporter) -> None:
    """Adapted modules that this task's graph never runs (a pooler, another head)."""
    recipes = [weights.recipe_of(value) for value in model.graph.initializers.values()]
    used = {part.key for recipe in recipes if recipe for part in recipe.parts if part.source in weights.OP_SOURCES}
    unused = sorted(set(adapter.projections) - used)
    if not used:
        raise ExportError("None of the adapted modules is part of this task's graph. Choose another --task.")
    if unused:
        count = "1 adapted module is" if len(unused) == 1 else f"{len(unused)} adapted modules are"
        reporter.warn(f"{count} not part of this task's graph: {', '.join(unused[:MOST_WARNINGS])}.")
