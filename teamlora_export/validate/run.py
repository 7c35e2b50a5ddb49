"""`teamlora-export validate`: finds what made a bundle, judges it, and writes the verdict into its manifest.

Three checks, and all must pass: the outputs from end to end, over several cases; every weight in the file against its
source; every module by itself, on what the candidate computed before it.

A quantised bundle is judged by these on what its codes mean, and products read activations as they are. What
quantisation cost is a question of its own, asked afterwards of the bundle as it is deployed (`quality.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from teamlora_export.adapter import AdapterSpec
from teamlora_export.adapter.padding import placed
from teamlora_export.attach.products import has_codes
from teamlora_export.bundle import Bundle, check_files
from teamlora_export.engine.facts import EngineFacts, find_engine, is_made_of, read_facts, write_facts
from teamlora_export.engine.onnxruntime_library import OnnxRuntimeLibrary, library_for
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import read_graph
from teamlora_export.graph.weights import BaseWeights
from teamlora_export.model.base import BaseModel, LoadedWeights
from teamlora_export.model.checkpoint import SafetensorsWeights, open_safetensors_weights
from teamlora_export.progress import Reporter
from teamlora_export.shelf import change_manifest, slots_of
from teamlora_export.validate.attached import AttachedRunner, judge_attached
from teamlora_export.validate.cases import Case, Feeds, Step, make_cases
from teamlora_export.validate.engine_runner import EngineRunner, cases_within
from teamlora_export.validate.engine_shelf import EngineShelf
from teamlora_export.validate.judge import MULTIPLE, MULTIPLE_OF_CODES, Judge
from teamlora_export.validate.layerwise import LayerwiseOnnxRunner
from teamlora_export.validate.lm_eval_tasks import LmEval
from teamlora_export.validate.local import LocalJudge, local_judge
from teamlora_export.validate.onnx_runner import OnnxRunner
from teamlora_export.validate.quality import measure_quality, measures_quality
from teamlora_export.validate.shelf import (
    batches_of,
    joined,
    judge_mixed,
    keep_shelf,
    open_shelf_sources,
    slot_fill,
    with_adapters,
)
from teamlora_export.validate.sources import codes_of, fits, open_attached_sources, open_sources, torch_dtype
from teamlora_export.validate.stored import as_held, judge_weights, recipes_of
from teamlora_export.validate.summary import summary
from teamlora_export.validate.taps import live_values, module_of
from teamlora_export.validate.torch_runner import TorchRunner
from teamlora_export.validate.verdict import Departure, LocalCheck, Thresholds, Verdict


def validate_bundle(
    bundle: Bundle,
    *,
    base_source: str | None = None,
    adapter_folder: str | Path | Mapping[str, str | Path] | None = None,
    only: Sequence[str] = (),
    layer_by_layer: bool | None = None,
    engine_name: str | None = None,
    plugin: Path | None = None,
    library: Path | None = None,
    quality: bool | None = None,
    thresholds: Thresholds | None = None,
    tasks: LmEval | None = None,
    reporter: Reporter | None = None,
) -> Verdict:
    """Judge `bundle` against the base and adapter that it was made of (found by its manifest, or given if they moved).

    Args:
        adapter_folder: of a shelf, the folders of those that moved, by name.
        only: of a shelf, the names of those that are judged; nothing: all.
        layer_by_layer: hold one layer in memory at a time and run fewer cases; None: only where the whole does not fit.
        engine_name: judge this engine instead of the graph; its verdict goes into its own facts.
        plugin: the library for an engine that needs the plugin.
        library: judge the graph as it runs with this native library of the op, not with the op's body.
        quality: measure on held-out text what the bundle lost, by `thresholds`; None: where these are given; or it is
            quantised, has a tokenizer, and fits into memory.
        tasks: of lm-eval, scored beside that text.

    Raises:
        ExportError: base or adapter are not there, or are not those that the bundle was made of; the bundle's own files
            are damaged; its model cannot be loaded; `library` does not fit, or the bundle has no use for it.
    """
    reporter = reporter or Reporter()
    manifest = bundle.manifest
    engine: _Engine | None
    if tasks is not None:
        if manifest.task != "text-generation" or quality is False:
            raise ExportError("--lm-eval: scores text that is generated, with --quality. Leave one of them out.")
        tasks.require()
        quality = True
    if library is not None and engine_name:
        raise ExportError("--library and --engine: an engine does not run the native op. Give one of the two.")
    native = library_for(bundle, library, reporter) if library is not None else None
    check_files(bundle)
    moved = adapter_folder if isinstance(adapter_folder, Mapping) else {}
    if manifest.shelf is not None:
        if adapter_folder is not None and not moved:
            raise ExportError(
                f"{bundle.folder}: has a shelf of adapters, which have names. Give --adapter NAME=FOLDER."
            )
        engine = _open_engine(bundle, engine_name, plugin, reporter) if engine_name else None
        of_base, shelved = open_shelf_sources(bundle, base_source, moved, only)
        if layer_by_layer is None:
            layer_by_layer = not fits(of_base, manifest.inputs)
        is_quantised = manifest.quantisation is not None
        measured = measures_quality(bundle, is_quantised, not (layer_by_layer or engine), quality, thresholds, reporter)
        cost = (thresholds or Thresholds(), tasks) if measured else None
        return _judge_shelf(bundle, of_base, shelved, layer_by_layer, engine, cost, native, reporter)
    if moved or only:
        raise ExportError(f"{bundle.folder}: has one adapter of its own, and no names. Give --adapter FOLDER alone.")
    assert not isinstance(adapter_folder, Mapping)
    engine = None
    base: BaseModel | None
    if manifest.attached is not None:
        if engine_name or layer_by_layer:
            raise ExportError(
                f"{bundle.folder}: its graph is another tool's: no engines are built of it, and its layers are not run "
                "one by one. Leave out --engine and --layer-by-layer."
            )
        base, adapter = open_attached_sources(bundle, base_source, adapter_folder, reporter)
        is_quantised = has_codes(read_graph(bundle).graph)
    else:
        engine = _open_engine(bundle, engine_name, plugin, reporter) if engine_name else None
        adapter_sha256 = engine.facts.adapter_sha256 if engine else manifest.adapter["sha256"]
        base, adapter = open_sources(bundle, base_source, adapter_folder, adapter_sha256)
        if layer_by_layer is None:
            layer_by_layer = not fits(base, manifest.inputs)
        is_quantised = manifest.quantisation is not None
    held = as_held(adapter, manifest)
    can_measure = base is not None and not (layer_by_layer or engine)
    quality = measures_quality(bundle, is_quantised, can_measure, quality, thresholds, reporter)
    if base is None or manifest.attached is not None:
        verdict = judge_attached(bundle, held, base, library, reporter)
    else:
        verdict = _judge_export(bundle, base, held, bool(layer_by_layer), engine, library, reporter)
    if native is not None:
        verdict = dataclasses.replace(verdict, library=native.sha256)
    if quality:
        assert base is not None
        with reporter.step("Reading held-out text, to see what quantisation cost"):
            runner = OnnxRunner if manifest.attached is None else AttachedRunner
            graph = runner(bundle, adapter.projections, library, as_deployed=True)
            found = measure_quality(graph, base, adapter, thresholds or Thresholds(), tasks)
        verdict = dataclasses.replace(verdict, quality=found)
    return _keep(verdict, bundle, engine)


def _judge_export(
    bundle: Bundle,
    base: BaseModel,
    adapter: AdapterSpec,
    layer_by_layer: bool,
    engine: _Engine | None,
    library: Path | None,
    reporter: Reporter,
    shelved: str | None = None,
) -> Verdict:
    """Whether the export is right: all of the verdict but what it cost.

    Args:
        shelved: the name of `adapter` on the bundle's shelf.
    """
    manifest = bundle.manifest
    dtype = engine.facts.dtype if engine else manifest.dtype
    weights = _open_streamed(base) if layer_by_layer else None
    if weights is not None:
        reporter.say("Layer by layer: the weights are read from disk on every call")
    fill, in_file = None, adapter
    if shelved is not None:
        fill, in_file = slot_fill(bundle, shelved), placed(adapter, slots_of(manifest.refit))
    if weights is None:
        graph = OnnxRunner(bundle, adapter.projections, library, fill=fill)
    else:
        graph = LayerwiseOnnxRunner(bundle, adapter.projections, library, fill)
    held = codes_of(graph, base) if manifest.quantisation else None
    with reporter.step("Preparing PyTorch in float64 and the bundle's dtype"):
        reference = TorchRunner(base, adapter, torch.float64, weights, held)
        pytorch = TorchRunner(base, adapter, torch_dtype(dtype), weights, held)
    multiple = MULTIPLE_OF_CODES if held else MULTIPLE
    judge = Judge(dtype, reference, pytorch, engine or graph, manifest.inputs, multiple)
    cases = make_cases(base.config, base.task, brief=weights is not None, many=library is not None)
    for case in engine.choose(cases, reporter) if engine else cases:
        with reporter.step(f"Case: {case.name}"):
            if engine is not None and shelved is not None:
                engine.seat_alone(shelved)
            judge.add_case(case)
    expert_use = {path: _mean_share(share) for path, share in reference.expert_use().items()}
    graph.forget()
    sources = (weights or _open_sources(base, adapter, graph)) if held else reference
    inside = _Inside(graph, reference, None if engine else pytorch, in_file, sources)
    # An engine whose adapter was exchanged is no longer what the graph is.
    of_graph = not engine or engine.facts.adapter_sha256 == manifest.adapter["sha256"]
    if of_graph:
        inside.judge(max(cases, key=lambda case: len(case.mask)), reporter)
    if not inside.departures:
        judge.draw_again()
    return Verdict(
        dtype=dtype,
        cases=judge.results(),
        departures=tuple(inside.departures or _from_outputs(judge, inside, of_graph)),
        local=tuple(inside.checks),
        weights=inside.weights,
        expert_use=expert_use,
        candidate=(engine or graph).label,
        multiple=multiple,
    )


def _judge_shelf(
    bundle: Bundle,
    base: BaseModel,
    adapters: Mapping[str, AdapterSpec],
    layer_by_layer: bool,
    engine: _Engine | None,
    cost: tuple[Thresholds, LmEval | None] | None,
    native: OnnxRuntimeLibrary | None,
    reporter: Reporter,
) -> Verdict:
    """Each adapter by itself, and batches of several; all as one.

    Args:
        cost: what may be lost of each adapter, and the tasks that are scored, where this is measured.
    """
    held = {name: as_held(adapter, bundle.manifest) for name, adapter in adapters.items()}
    library, digest = (native.path, native.sha256) if native is not None else (None, None)
    # Before any is judged: an engine that takes none is refused.
    mixed = None if engine is None else (engine, batches_of(bundle, base, list(held), engine, reporter))
    found = {}
    for name, adapter in held.items():
        reporter.say(f"Adapter {name}:")
        found[name] = _judge_export(bundle, base, adapter, layer_by_layer, engine, library, reporter, name)
        if cost is None:
            continue
        with reporter.step("Reading held-out text, to see what quantisation cost"):
            fill = slot_fill(bundle, name)
            graph = OnnxRunner(bundle, adapter.projections, library, as_deployed=True, fill=fill)
            measured = measure_quality(graph, base, adapters[name], *cost)
        found[name] = dataclasses.replace(found[name], quality=measured)
    weights = _open_streamed(base) if layer_by_layer else None
    found[""] = judge_mixed(bundle, base, held, library, reporter, weights, mixed)
    if engine is None:
        return keep_shelf({name: dataclasses.replace(v, library=digest) for name, v in found.items()}, bundle)
    return _keep_facts(joined(found), engine, lambda facts: with_adapters(facts, found, bundle))


class _Inside:
    """The checks of a bundle's file: its graph, its weights, its modules.

    For an engine they show that what it was built from is right; the engine itself shows its outputs alone.
    """

    def __init__(
        self,
        graph: OnnxRunner,
        reference: TorchRunner,
        pytorch: TorchRunner | None,
        adapter: AdapterSpec,
        sources: BaseWeights,
    ) -> None:
        self._graph, self._reference, self._pytorch = graph, reference, pytorch
        self._adapter, self._sources = adapter, sources
        self._recipes = recipes_of(graph.bundle.manifest)
        self.departures: list[Departure] = []
        self.checks: list[LocalCheck] = []
        self.weights = 0

    def judge(self, case: Case, reporter: Reporter) -> None:
        self.departures += self._graph.departures()
        with reporter.step(f"Comparing {len(self._recipes)} weights with their sources"):
            model = self._graph.written
            live = live_values(model)
            manifest = self._graph.bundle.manifest
            self.departures += judge_weights(model, self._recipes, self._sources, self._adapter, live, manifest)
            self.weights = len(self._recipes)
        with reporter.step("Comparing module by module"):
            for check in self._local_judge().check(case):
                self._add(check)

    def follow(self, step: Step, name: str) -> None:
        """Judge module by module in one step that failed from end to end."""
        for check in self._local_judge().check_step(step, name):
            self._add(check)

    def producer_of(self, name: str) -> str:
        return self._graph.producer_of(name)

    def _local_judge(self) -> LocalJudge:
        return local_judge(self._graph, self._reference, self._reference, self._pytorch, self._graph)

    def _add(self, check: LocalCheck) -> None:
        self.checks.append(check)
        for judgement in check.judgements:
            if not judgement.passed:
                reason = (
                    f"{judgement.name} errs by {judgement.error.rms:.2e} in one column, allowed is "
                    f"{judgement.allowed:.2e} (case: {check.case})"
                )
                node = self._graph.producer_of(judgement.name)
                self.departures.append(Departure("modules", module_of(judgement.name), node, reason))


def _from_outputs(judge: Judge, inside: _Inside, of_graph: bool) -> list[Departure]:
    """Where an output departs though nothing else was found: the first module that departs in that step, where the
    candidate is `of_graph`."""
    failure = judge.first_failure()
    if failure is None:
        return []
    case, step, judgement = failure
    if of_graph:
        inside.follow(step, f"{case}, the step that failed")
    reason = f"errs by {judgement.error.rms:.2e}, allowed is {judgement.allowed:.2e} (case: {case})"
    node = inside.producer_of(judgement.name)
    return [*inside.departures, Departure("outputs", judgement.name, node, f"{judgement.name} {reason}")]


def _keep(verdict: Verdict, bundle: Bundle, engine: _Engine | None) -> Verdict:
    """Write the verdict beside what was judged; where that cannot be, the verdict says so."""
    if engine:
        return _keep_facts(verdict, engine, lambda facts: dataclasses.replace(facts, validation=summary(verdict)))
    try:
        change_manifest(bundle, lambda now: dataclasses.replace(now, validation=summary(verdict)))
    except ExportError as error:
        return dataclasses.replace(verdict, not_kept=str(error))
    return verdict


def _keep_facts(verdict: Verdict, engine: _Engine, change: Callable[[EngineFacts], EngineFacts]) -> Verdict:
    """The verdict, which is written beside what others have written there meanwhile."""
    try:
        facts = read_facts(engine.path)
        if facts.sha256 != engine.facts.sha256:
            raise ExportError(f"{engine.path}: is another engine by now.")
        write_facts(change(facts), engine.path)
    except ExportError as error:
        return dataclasses.replace(verdict, not_kept=str(error))
    return verdict


@dataclass(frozen=True)
class _Engine:
    """An engine that is open.

    Attributes:
        shelf: of one that takes adapters.
    """

    path: Path
    facts: EngineFacts
    runner: EngineRunner
    shelf: EngineShelf | None

    runs_defaults = False

    @property
    def label(self) -> str:
        return f"{'TensorRT-RTX' if self.facts.runtime == 'rtx' else 'TensorRT'} ({self.path.name})"

    @property
    def batch_sizes(self) -> tuple[int, int]:
        least, _, most = self.facts.profiles[0].inputs["input_ids"]
        return least[0], most[0]

    def seat_alone(self, name: str) -> None:
        assert self.shelf is not None
        self.shelf.seat_alone(name)

    def seat(self, rows: Sequence[str | None]) -> None:
        assert self.shelf is not None
        self.shelf.seat(rows)

    def run(self, feeds: Feeds) -> Feeds:
        return self.runner.run(feeds)

    def choose(self, cases: list[Case], reporter: Reporter) -> list[Case]:
        """The cases that the engine's profiles take.

        Raises:
            ExportError: there are none.
        """
        chosen = cases_within(cases, self.facts.profiles)
        if not chosen:
            raise ExportError(f"{self.path}: its profiles take none of the cases. Build it with wider --shapes.")
        kept = [id(case) for case in chosen]
        skipped = [case.name for case in cases if id(case) not in kept]
        if skipped:
            reporter.warn(f"Outside of the engine's profiles, left out: {', '.join(skipped)}.")
        return chosen


def _open_engine(bundle: Bundle, name: str, plugin: Path | None, reporter: Reporter) -> _Engine:
    """Opened before PyTorch loads anything: most that can be wrong is found here."""
    path = find_engine(bundle, name)
    facts = read_facts(path)
    if not is_made_of(facts, bundle):
        raise ExportError(f"{path}: was not built from {bundle.folder} as it is now. Build it again.")
    runner = EngineRunner(path, facts, bundle, plugin, reporter)
    return _Engine(path, facts, runner, EngineShelf(bundle, runner, facts) if facts.slots is not None else None)


def _open_sources(base: BaseModel, adapter: AdapterSpec, graph: OnnxRunner) -> BaseWeights:
    """The base's weights as they were before they were quantised."""
    aliases, recipes = base.aliases(), recipes_of(graph.bundle.manifest).values()
    needed = {part.key for recipe in recipes for part in recipe.parts} & aliases.keys() - adapter.overrides.keys()
    return open_safetensors_weights(base.source, aliases, base.signature, needed) or LoadedWeights(base, needed)


def _open_streamed(base: BaseModel) -> SafetensorsWeights:
    aliases = base.aliases()
    weights = open_safetensors_weights(base.source, aliases, base.signature, aliases.keys())
    if weights is None:
        raise ExportError(
            f"{base.name}: does not fit into this machine's memory, and only safetensors can be read layer by layer."
        )
    return weights


def _mean_share(share: np.ndarray) -> list[float]:
    return [float(value) for value in share.reshape(-1, share.shape[-1]).mean(axis=0)]
