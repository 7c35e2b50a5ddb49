"""Judges the adapters of a shelf: each by itself, as any bundle is judged, and several in one batch.

By itself, an adapter stands in the second of two slots, and the first holds no numbers at all.

A caller may leave out the adapters: the graph's own defaults must be the base alone, and are run so.

In a batch, every row must be what PyTorch computes of that row alone, with its own adapter, in float64. The slots are
filled as the deployed programs fill them, from the files, by the same code; where there are more adapters than slots,
they make room for one another, and the first come back once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from teamlora_export.adapter import AdapterSpec, align_with_base, read_adapter
from teamlora_export.bundle import Bundle
from teamlora_export.deploy.adapter_slots import NO_ADAPTER, Adapters, read_slot
from teamlora_export.deploy.failure import ModelError
from teamlora_export.engine.facts import EngineFacts, JudgedAdapter
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import read_graph
from teamlora_export.manifest import Manifest, Validation
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import SafetensorsWeights
from teamlora_export.ports import ADAPTER_NAME
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
# The adapter of each row, none where adapters are left out; and what is asked.
MixedBatch = tuple[list[str | None], Case]


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
    engine: tuple[MixedEngine, Sequence[MixedBatch]] | None = None,
) -> Verdict:
    """Batches whose rows have adapters of their own: each row as it is alone.

    Args:
        weights: of the base, which are read from there layer by layer; None: it is in memory as a whole.
        engine: what is judged, and the batches that it takes; None: the graph.

    Raises:
        ExportError: an adapter's file is damaged.
    """
    manifest, slots = bundle.manifest, require_shelf(bundle)["slots"]
    graph: OnnxRunner
    runner: MixedRunner | MixedEngine
    if engine is None:
        shelf = open_shelf(bundle, min(slots, max(len(adapters), _MOST_IN_A_BATCH)))
        # Of few adapters in many slots, an index that is too low would not show.
        shelf.take_last_first()
        runner = graph = MixedRunner(bundle, shelf, library, weights is not None)
        batches: Sequence[MixedBatch] = batches_of(bundle, base, list(adapters), runner, reporter)
    else:
        (runner, batches), graph = engine, OnnxRunner(bundle, ())
    held = codes_of(graph, base) if manifest.quantisation else None
    multiple = MULTIPLE_OF_CODES if held else MULTIPLE
    results: list[CaseResult] = []
    departures = list(default_departures(bundle))
    for given, case in batches:
        rows = given or [None, None]
        with reporter.step(f"Batch: {case.name}"):
            runner.seat(given)
            apart = RowsApart(base, adapters, rows, case, manifest.inputs, held, weights)
            reference, pytorch = apart.follow(torch_dtype(manifest.dtype))
            judge = Judge(manifest.dtype, reference, pytorch, runner, manifest.inputs, multiple)
            judge.add_case(case)
            failure = judge.first_failure()
            # An engine shows nothing of its inside.
            located = list(apart.locate(graph, failure[1])) if failure is not None and engine is None else []
            if not located:
                judge.draw_again()
            results += judge.results()
        if (failure := judge.first_failure()) is not None:
            judgement = failure[2]
            departures += located
            reason = f"errs by {judgement.error.rms:.2e}, allowed is {judgement.allowed:.2e} ({case.name})"
            node = graph.producer_of(judgement.name)
            departures.append(Departure("rows", judgement.name, node, f"{judgement.name} {reason}"))
    return Verdict(manifest.dtype, tuple(results), tuple(departures), candidate=runner.label, multiple=multiple)


def batches_of(
    bundle: Bundle, base: BaseModel, names: Sequence[str], runner: MixedRunner | MixedEngine, reporter: Reporter
) -> list[MixedBatch]:
    """The batches that a runner of a bundle takes, of several of the adapters `names`.

    Raises:
        ExportError: an engine takes none.
    """
    [sample] = make_cases(base.config, base.task, brief=True)
    pad, vocabulary = int(sample.ids[sample.mask == 0][0]), base.config.get_text_config().vocab_size
    # What adapters are where they are left out.
    batches: list[list[str | None]] = [[]] if runner.runs_defaults else []
    batches += mixed_batches(list(names), require_shelf(bundle)["slots"], *runner.batch_sizes)
    cases = []
    for number, given in enumerate(batches):
        case = mixed_case(given or [None, None], vocabulary, pad, sample.steps, number)
        # Without any, they are the same in every call.
        cases.append(case if given else replace(case, name="no adapter is given", steps=0))
    taken = [id(case) for case in runner.choose(cases, reporter)]
    return [(given, case) for given, case in zip(batches, cases, strict=True) if id(case) in taken]


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
    whole = joined(found)

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


def with_adapters(facts: EngineFacts, found: Mapping[str, Verdict], bundle: Bundle) -> EngineFacts:
    """The facts of an engine that takes adapters, with the verdicts on it, `found` as `keep_shelf` takes them."""
    shelf = require_shelf(bundle)["adapters"]
    known = {
        name: judged
        for name, judged in (facts.adapter_validations or {}).items()
        if name in shelf and shelf[name]["sha256"] == judged["sha256"]
    }
    judged: dict[str, JudgedAdapter] = {
        name: {"sha256": shelf[name]["sha256"], "validation": summary(verdict)}
        for name, verdict in found.items()
        if name
    }
    before = facts.validation if known.keys() == shelf.keys() else None
    return dataclasses.replace(
        facts,
        validation=_of_bundle(joined(found), before, are_all=judged.keys() == shelf.keys()),
        adapter_validations={**known, **judged},
    )


def joined(found: Mapping[str, Verdict]) -> Verdict:
    """All verdicts as one; `found` as `keep_shelf` takes them."""
    first = next(iter(found.values()))
    parts = [(f"{name}: " if name else "", verdict) for name, verdict in found.items()]
    return dataclasses.replace(
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


def open_shelf(bundle: Bundle, slots: int, make: Callable[[tuple[int, ...], type], Any] = np.zeros) -> Adapters:
    """The shelf of a bundle in memory, as the deployed programs have it.

    Args:
        make: see `Adapters`.
    """
    inputs = {}
    for value in read_graph(bundle).graph.inputs:
        if value.const_value is not None and value.name != ADAPTER_NAME:
            assert value.dtype is not None and value.shape is not None
            # bfloat16 by its bits.
            kind = np.uint16 if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy().type
            inputs[str(value.name)] = (tuple(int(size) for size in value.shape[1:]), kind)  # type: ignore[arg-type]
    adapters = require_shelf(bundle)["adapters"]
    listed = {name: (adapter["file"], adapter["sha256"]) for name, adapter in adapters.items()}
    return Adapters(bundle.folder, inputs, slots, lambda: listed, lambda: 0, make=make)


def seated(adapters: Adapters, rows: Sequence[str | None]) -> np.ndarray:
    """The slots of the rows' adapters, int32, which are there then, until others are seated.

    Raises:
        ExportError: an adapter's file is damaged.
    """
    taken: dict[str, int] = {}
    try:
        for name in dict.fromkeys(name for name in rows if name is not None):
            slot = adapters.take(adapters.find(name))
            assert slot is not None
            taken[name] = slot
    except ModelError as error:
        raise ExportError(str(error)) from None
    for slot in taken.values():
        # For the batch after this one.
        adapters.give(slot)
    return np.array([NO_ADAPTER if name is None else taken[name] for name in rows], np.int32)


def mixed_batches(
    names: Sequence[str], slots: int, least: int = 1, most: int | None = None
) -> Iterator[list[str | None]]:
    """The adapter of each row of each batch: all of `names`, so many of them at a time as there are slots for.

    Args:
        least, most: rows of a batch.
    """
    size = min(slots, _MOST_IN_A_BATCH)
    groups = [list(names[start : start + size]) for start in range(0, len(names), size)]
    if len(groups) > 1:
        # What is left of others in their slots would show.
        groups.append(groups[0])
    for group in groups:
        rows = [*group[:1], None, *group[1:], group[0]]
        for start in range(0, len(rows), most or len(rows)):
            part = rows[start : start + (most or len(rows))]
            # What is too few begins again.
            yield [*part, *((rows * least)[: max(0, least - len(part))])]


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


class MixedEngine(Protocol):
    """What judges batches of an engine; see `MixedRunner` for each."""

    @property
    def label(self) -> str: ...

    @property
    def runs_defaults(self) -> bool: ...

    @property
    def batch_sizes(self) -> tuple[int, int | None]: ...

    def choose(self, cases: list[Case], reporter: Reporter) -> list[Case]: ...

    def seat(self, rows: Sequence[str | None]) -> None: ...

    def run(self, feeds: Feeds) -> Feeds: ...


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

    @property
    def runs_defaults(self) -> bool:
        """Whether it can be run with what adapters are where they are left out."""
        return True

    @property
    def batch_sizes(self) -> tuple[int, int | None]:
        """Rows of a batch, at least and at most; None: any number."""
        return 1, None

    def choose(self, cases: list[Case], _reporter: Reporter) -> list[Case]:
        """Those that it takes."""
        return cases

    def seat(self, rows: Sequence[str | None]) -> None:
        """From now on, the rows of a batch have these adapters; of no rows, adapters are left out.

        Raises:
            ExportError: an adapter's file is damaged.
        """
        if not rows:
            self._rows = None
            self._take(_defaults(self.written))
            return
        self._rows = seated(self._adapters, rows)
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
