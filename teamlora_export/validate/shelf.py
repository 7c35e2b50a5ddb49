"""Judges the adapters of a shelf: each by itself, as any bundle is judged, and several in one batch.

By itself, an adapter stands in the second of two slots, and the first holds no numbers at all.

A caller may leave out the adapters: the graph's own defaults must be the base alone, and are run so.

In a batch, every row must be what PyTorch computes of that row alone, with its own adapter, in float64. The slots are
filled as the deployed programs fill them, from the files, by the same code; where there are more adapters than slots,
they make room for one another, and the first come back once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.bundle import ADAPTER_NAME, Bundle, Manifest, Validation
from teamlora_export.deploy.adapter_slots import NO_ADAPTER, Adapters, read_slot
from teamlora_export.deploy.failure import ModelError
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import read_graph
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import SafetensorsWeights
from teamlora_export.progress import Reporter
from teamlora_export.shelf import NO_ADAPTER_NAME, change_manifest, require_known, require_shelf
from teamlora_export.validate.cases import Case, Feeds, make_cases
from teamlora_export.validate.judge import MULTIPLE, MULTIPLE_OF_CODES, Judge
from teamlora_export.validate.layerwise import LayerwiseOnnxRunner
from teamlora_export.validate.onnx_runner import OnnxRunner, SlotFill, open_session, run_session
from teamlora_export.validate.rows import RowsApart
from teamlora_export.validate.sources import codes_of, open_base_of, torch_dtype
from teamlora_export.validate.stored import adapted_modules
from teamlora_export.validate.summary import summary
from teamlora_export.validate.verdict import CaseResult, Departure, Verdict

# Beside those without an adapter, and the second of the first one's.
_MOST_IN_A_BATCH = 6


def open_shelf_sources(
    bundle: Bundle, base_source: str | None, moved: Mapping[str, str | Path], only: Sequence[str]
) -> tuple[BaseModel, dict[str, AdapterSpec]]:
    """The base, and the adapters that are to be judged, by name, as the base names their modules.

    Args:
        moved, only: as `validate_bundle` takes them.

    Raises:
        ExportError: a name is not on the shelf, or what it stands for is not there, or is another.
    """
    shelf = require_shelf(bundle)
    for name in (*only, *moved):
        require_known(bundle, shelf, name)
    names = list(dict.fromkeys(only)) or list(shelf["adapters"])
    if not names:
        raise ExportError(f"{bundle.folder}: its shelf is empty, so that there is nothing to judge.")
    base = open_base_of(bundle, base_source)
    adapters = {}
    for name in names:
        origin = shelf["adapters"][name]["origin"]
        adapter = read_adapter(moved.get(name) or origin["source"])
        if adapter.sha256 != origin["sha256"]:
            raise ExportError(
                f"{adapter.source}: is not the adapter {name} that is judged here. Give that one with --adapter "
                f"{name}=FOLDER, or replace it."
            )
        adapters[name] = align_with_base(adapter, base.signature)
    return base, adapters


def judge_mixed(
    bundle: Bundle,
    base: BaseModel,
    adapters: Mapping[str, AdapterSpec],
    library: Path | None,
    reporter: Reporter,
    weights: SafetensorsWeights | None = None,
) -> Verdict:
    """Batches whose rows have adapters of their own: each row as it is alone.

    Args:
        weights: of the base, which are read from there layer by layer; None: it is in memory as a whole.
    """
    manifest, slots = bundle.manifest, require_shelf(bundle)["slots"]
    shelf = open_shelf(bundle, min(slots, max(len(adapters), _MOST_IN_A_BATCH)))
    # Of few adapters in many slots, an index that is too low would not show.
    shelf.take_last_first()
    runner = MixedRunner(bundle, shelf, library, weights is not None)
    held = codes_of(runner, base) if manifest.quantisation else None
    multiple = MULTIPLE_OF_CODES if held else MULTIPLE
    [sample] = make_cases(base.config, base.task, brief=True)
    pad, vocabulary = int(sample.ids[sample.mask == 0][0]), base.config.get_text_config().vocab_size
    results: list[CaseResult] = []
    departures = list(default_departures(bundle))
    batches = list(mixed_batches(list(adapters), slots))
    # What adapters are where they are left out.
    batches.insert(0, [])
    for number, given in enumerate(batches):
        rows = given or [None, None]
        case = mixed_case(rows, vocabulary, pad, sample.steps, number)
        if not given:
            # They are the same in every call.
            case = replace(case, name="no adapter is given", steps=0)
        with reporter.step(f"Batch: {case.name}"):
            runner.seat(given)
            apart = RowsApart(base, adapters, rows, case, manifest.inputs, held, weights)
            reference, pytorch = apart.follow((torch.float64, torch_dtype(manifest.dtype)))
            judge = Judge(manifest.dtype, reference, pytorch, runner, manifest.inputs, multiple)
            judge.add_case(case)
            results += judge.results()
        if (failure := judge.first_failure()) is not None:
            _, step, judgement = failure
            departures += apart.locate(runner, step)
            reason = f"errs by {judgement.error.rms:.2e}, allowed is {judgement.allowed:.2e} ({case.name})"
            node = runner.producer_of(judgement.name)
            departures.append(Departure("rows", judgement.name, node, f"{judgement.name} {reason}"))
    return Verdict(manifest.dtype, tuple(results), tuple(departures), candidate=runner.label, multiple=multiple)


def default_departures(bundle: Bundle) -> Iterator[Departure]:
    """What is wrong with what the graph's inputs of adapters are where a caller leaves them out."""
    for value in read_graph(bundle).graph.inputs:
        if value.const_value is None:
            continue
        found, name = value.const_value.numpy(), str(value.name)
        if name == ADAPTER_NAME and not (found.size and (found == NO_ADAPTER).all()):
            reason = f"{name} is {found.tolist()!s:.40} where it is left out, which is not the base alone"
            yield Departure("graph", name, "none", reason)
        elif name != ADAPTER_NAME and np.any(found):
            yield Departure(
                "graph", name.rpartition(".")[0] or name, "none", f"{name} is not zero where it is left out"
            )


def keep_shelf(found: Mapping[str, Verdict], bundle: Bundle) -> Verdict:
    """All verdicts as one, each written beside what it judged.

    Args:
        found: by the adapter's name; under "" that of batches of several.
    """
    first = next(iter(found.values()))
    parts = [(f"{name}: " if name else "", verdict) for name, verdict in found.items()]
    whole = dataclasses.replace(
        first,
        cases=tuple(dataclasses.replace(c, name=f"{of}{c.name}") for of, verdict in parts for c in verdict.cases),
        departures=tuple(
            dataclasses.replace(d, reason=f"{of}{d.reason}") for of, verdict in parts for d in verdict.departures
        ),
        local=tuple(dataclasses.replace(c, case=f"{of}{c.case}") for of, verdict in parts for c in verdict.local),
        weights=sum(verdict.weights for verdict in found.values()),
        expert_use={f"{of}{path}": shares for of, verdict in parts for path, shares in verdict.expert_use.items()},
        quality=None,
        qualities={name: verdict.quality for name, verdict in found.items() if verdict.quality is not None},
    )

    def with_verdicts(now: Manifest) -> Manifest:
        shelf = now.shelf
        assert shelf is not None
        adapters, ours = dict(shelf["adapters"]), require_shelf(bundle)["adapters"]
        judged = {name for name in adapters.keys() & found.keys() if adapters[name]["sha256"] == ours[name]["sha256"]}
        for name in judged:
            adapters[name] = {**adapters[name], "validation": summary(found[name])}
        return dataclasses.replace(
            now,
            validation=_of_bundle(whole, now.validation, are_all=judged == adapters.keys()),
            shelf={"slots": shelf["slots"], "adapters": adapters},
        )

    try:
        change_manifest(bundle, with_verdicts)
    except ExportError as error:
        return dataclasses.replace(whole, not_kept=str(error))
    return whole


def _of_bundle(whole: Verdict, before: Validation | None, are_all: bool) -> Validation | None:
    """What is known of all that is on a shelf as it is.

    Args:
        whole: of those that were judged. before: of all; an edit of the shelf takes it back. are_all: they are.
    """
    # Some that pass say nothing of the others; some that fail do.
    return summary(whole) if are_all or not whole.passed else before


def slot_fill(bundle: Bundle, name: str) -> SlotFill:
    """A graph's slots with the adapter `name` in the second.

    Raises:
        ExportError: its file is damaged, or does not fit the graph.
    """
    shelf = open_shelf(bundle, 2)
    try:
        tensors = read_slot(shelf.find(name), shelf.memory)
    except ModelError as error:
        raise ExportError(str(error)) from None
    arrays = {}
    for key, array in tensors.items():
        own = _numbers(array)
        arrays[key] = np.stack([np.full_like(own, np.nan), own])
    return SlotFill(arrays, np.array([1], np.int32))


def open_shelf(bundle: Bundle, slots: int) -> Adapters:
    """The shelf of a bundle in memory, as the deployed programs have it."""
    inputs = {}
    for value in read_graph(bundle).graph.inputs:
        if value.const_value is not None and value.name != ADAPTER_NAME:
            assert value.dtype is not None and value.shape is not None
            # bfloat16 by its bits.
            kind = np.uint16 if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy().type
            inputs[str(value.name)] = (tuple(int(size) for size in value.shape[1:]), kind)  # type: ignore[arg-type]
    adapters = require_shelf(bundle)["adapters"]
    listed = {name: (adapter["file"], adapter["sha256"]) for name, adapter in adapters.items()}
    return Adapters(bundle.folder, inputs, slots, lambda: listed, lambda: 0)


def mixed_batches(names: Sequence[str], slots: int) -> Iterator[list[str | None]]:
    """The adapter of each row of each batch: all of `names`, so many of them at a time as there are slots for."""
    size = min(slots, _MOST_IN_A_BATCH)
    groups = [list(names[start : start + size]) for start in range(0, len(names), size)]
    if len(groups) > 1:
        # What is left of others in their slots would show.
        groups.append(groups[0])
    for group in groups:
        yield [*group[:1], None, *group[1:], group[0]]


def mixed_case(rows: Sequence[str | None], vocabulary: int, pad: int, steps: int, seed: int) -> Case:
    """Rows of unlike lengths, padded left."""
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(3, 15, len(rows))]
    mask = np.zeros((len(rows), max(lengths)), np.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[-length:] = 1
    ids = rng.integers(0, vocabulary, mask.shape)
    ids[ids == pad] = (pad + 1) % vocabulary
    named = ", ".join(name or NO_ADAPTER_NAME for name in rows)
    return Case(f"rows of {named}", np.where(mask > 0, ids, pad), mask, steps)


class MixedRunner(OnnxRunner):
    """A bundle's model with an adapter for each row, as the deployed programs run it.

    Args:
        layer_by_layer: hold one layer in memory at a time; the slots are constants then.
    """

    def __init__(self, bundle: Bundle, adapters: Adapters, library: Path | None, layer_by_layer: bool = False) -> None:
        super().__init__(bundle, adapted_modules(bundle.manifest), library)
        self._adapters = adapters
        self._layer_by_layer = layer_by_layer
        self._layers: LayerwiseOnnxRunner | None = None
        # Nothing: the graph's own defaults.
        self._rows: np.ndarray | None = None

    def seat(self, rows: Sequence[str | None]) -> None:
        """From now on, the rows of a batch have these adapters; of no rows, adapters are left out.

        Raises:
            ExportError: an adapter's file is damaged.
        """
        if not rows:
            self._rows = None
            self._take(_defaults(self.written))
            return
        taken: dict[str, int] = {}
        try:
            for name in dict.fromkeys(name for name in rows if name is not None):
                slot = self._adapters.take(self._adapters.find(name))
                assert slot is not None
                taken[name] = slot
        except ModelError as error:
            raise ExportError(str(error)) from None
        for slot in taken.values():
            # For the batch after this one.
            self._adapters.give(slot)
        self._rows = np.array([NO_ADAPTER if name is None else taken[name] for name in rows], np.int32)
        memory = {name: _numbers(array) for name, array in self._adapters.memory.items()}
        self._take(SlotFill(memory, self._rows))

    def _take(self, fill: SlotFill) -> None:
        """Where slots are constants, they are these."""
        if self._layer_by_layer or self._is_rewritten:
            fill = replace(fill, arrays={name: array.copy() for name, array in fill.arrays.items()})
            if self._layer_by_layer:
                self._layers = LayerwiseOnnxRunner(self.bundle, self._adapted, self.library, fill)
            else:
                self.refill(fill)

    @property
    def _is_rewritten(self) -> bool:
        """The graph is not run as it is in the file, but in another arithmetic, and with slots that are constants."""
        return self.bundle.manifest.dtype == "bf16" or self.bundle.manifest.quantisation is not None

    def run(self, feeds: Feeds) -> Feeds:
        return super().run(feeds) if self._layers is None else self._layers.run(feeds)

    def run_with_taps(self, feeds: Feeds, wide: bool = False) -> Feeds:
        return super().run_with_taps(feeds, wide) if self._layers is None else self._layers.run_with_taps(feeds, wide)

    def _run(self, feeds: Feeds) -> Feeds:
        if self._is_rewritten:
            return super()._run(feeds)
        if self._session is None:
            # Of a library's nodes no bodies are left, so that nothing else can run them.
            self._session = self._open(()) if self.library is not None else open_session(self.bundle.model)
        return run_session(self._session, feeds, self._given)

    @property
    def _given(self) -> Mapping[str, np.ndarray]:
        if self._rows is None or self._is_rewritten:
            return {}
        return {**self._adapters.memory, ADAPTER_NAME: self._rows}


def _defaults(model: ir.Model) -> SlotFill:
    """What a graph's inputs of adapters are where a caller leaves them out."""
    values = {str(v.name): v.const_value.numpy() for v in model.graph.inputs if v.const_value is not None}
    indices = values.pop(ADAPTER_NAME)
    return SlotFill(values, indices)


def _numbers(array: np.ndarray) -> np.ndarray:
    """bfloat16 that is held by its bits, as what it is."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array
