"""`teamlora-export bench`: a bundle, side by side with the same graph without experts, and with PyTorch.

A bundle with a shelf has rows for a batch with one adapter for all, with adapters of their own, and with none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from teamlora_export.bench.floor import Work
from teamlora_export.bench.graphs import Graphs, written_graphs
from teamlora_export.bench.measure import Benchmark, measure
from teamlora_export.bench.rows import GraphRow, Row, TorchRow
from teamlora_export.bench.turns import Workload
from teamlora_export.bundle import Bundle, check_files
from teamlora_export.engine.onnxruntime_library import library_for, library_here
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter
from teamlora_export.shelf import require_known, require_shelf

BYPASSED, BODY, NATIVE = "experts bypassed", "op's body", "native op"
EAGER, COMPILED = "PyTorch", "PyTorch, compiled"
# Of a shelf: which adapters the rows of a batch have.
ONE, MIXED, BASE = "one adapter", "mixed adapters", "base alone"
_LENGTHS = (64, 256)


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        lengths: tokens of a prompt; none: 64 and 256, as far as the model takes them.
        batches: how many prompts at once.
        count: tokens that are timed after each prompt.
        threads: 0: one for each core that may be used.
        library: the native library. Default: the one that is carried or was built here, if any.
        pytorch, compiled: measure PyTorch in eager mode, and compiled.
        base, adapter: what the bundle was made of, should it have moved; for PyTorch.
        memory: measure load time and memory.
        only: of a shelf, the adapters that rows have, the first of them where it is one; nothing: all.
    """

    lengths: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    count: int = 32
    turns: int = 9
    threads: int = 0
    library: Path | None = None
    pytorch: bool = False
    compiled: bool = False
    base: str | None = None
    adapter: Path | None = None
    memory: bool = True
    only: tuple[str, ...] = ()


def bench_bundle(bundle: Bundle, options: BenchOptions, reporter: Reporter | None = None) -> Benchmark:
    """Measure `bundle`; ratios are over its graph with the experts bypassed.

    Raises:
        ExportError: the bundle is not what was exported, cannot run on a CPU, or takes no such lengths; the library
            does not fit; base or adapter are not those of the bundle, or for no row; an adapter is not on its shelf;
            a row cannot run.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    reporter = reporter or Reporter()
    # Rows import it in processes of their own, whose errors are those of a row.
    import onnxruntime  # noqa: F401

    if (options.base is not None or options.adapter is not None) and not (options.pytorch or options.compiled):
        raise ExportError("--base and --adapter are for PyTorch. Add --pytorch or --compile, or leave them out.")
    adapters = _adapters(bundle, options.only)
    if bundle.manifest.dtype == "bf16":
        raise ExportError(
            f"{bundle.folder}: is in bfloat16, which ONNX Runtime has no kernels for on a CPU. "
            "Export it with --dtype fp32 or fp16."
        )
    workloads = choose_workloads(bundle, options)
    check_files(bundle)
    library = _find_library(bundle, options.library, reporter)
    in_torch = _torch_rows(bundle, options, adapters)
    with written_graphs(bundle) as graphs:
        rows = {
            **_graph_rows(graphs, library, options.threads, _ways(bundle, adapters)),
            **dict.fromkeys(in_torch, graphs.adapted_work),
        }
        benchmark = measure(
            list(rows),
            BYPASSED,
            workloads,
            options.turns,
            vocabulary=bundle.manifest.tokens.vocabulary,
            threads=options.threads,
            works={row.name: work for row, work in rows.items()},
            memory=options.memory,
            reporter=reporter,
        )
    return replace(benchmark, adapters=adapters)


def choose_workloads(bundle: Bundle, options: BenchOptions) -> list[Workload]:
    """Every batch with every length.

    Raises:
        ExportError: the model has no room for a length that was asked for.
    """
    most = bundle.manifest.tokens.most
    generates = bundle.manifest.task == "text-generation"
    # The first token comes with the prefill.
    count, after = (options.count, options.count + 1) if generates else (0, 0)
    longest = None if most is None else most - after
    if longest is not None and longest < 1:
        raise ExportError(f"--count {options.count}: the model takes {most} tokens, prompt and answer together.")
    for length in options.lengths:
        if longest is not None and length > longest:
            room = f"{most} tokens" + (f", and {after} follow the prompt" if generates else "")
            raise ExportError(f"--length {length}: the model takes {room}. Give {longest} at most.")
    lengths = options.lengths or tuple(dict.fromkeys(min(n, longest or n) for n in _LENGTHS))
    return [
        Workload(batch, length, count) for batch in dict.fromkeys(options.batches) for length in dict.fromkeys(lengths)
    ]


def _find_library(bundle: Bundle, given: Path | None, reporter: Reporter) -> Path | None:
    if given is not None:
        return library_for(bundle, given, reporter).path
    if bundle.manifest.op["form"] == "standard":
        return None
    try:
        return library_here().path
    except ExportError as error:
        reporter.say(f"Native op: left out. {error}")
        return None


def _adapters(bundle: Bundle, only: Sequence[str]) -> tuple[str, ...]:
    """Of a shelf: what rows have, as many as fit into the slots at a time."""
    if bundle.manifest.shelf is None and not only:
        return ()
    shelf = require_shelf(bundle)
    for name in only:
        require_known(bundle, shelf, name)
    return tuple(dict.fromkeys(only or shelf["adapters"]))[: shelf["slots"]]


def _ways(bundle: Bundle, adapters: Sequence[str]) -> Mapping[str, tuple[str | None, ...]]:
    """What the rows of a batch have, each way by its name."""
    if bundle.manifest.shelf is None:
        return {"": ()}
    found: dict[str, tuple[str | None, ...]] = {}
    if adapters:
        found[ONE] = tuple(adapters[:1])
    if len(adapters) > 1:
        found[MIXED] = tuple(adapters)
    return {**found, BASE: (None,)}


def _graph_rows(
    graphs: Graphs, library: Path | None, threads: int, ways: Mapping[str, tuple[str | None, ...]]
) -> dict[Row, Work]:
    rows: dict[Row, Work] = {GraphRow(BYPASSED, graphs.bypassed, threads=threads): graphs.bypassed_work}
    for name, native in ((BODY, None), *([(NATIVE, library)] if library is not None else [])):
        for way, adapters in ways.items():
            row = GraphRow(f"{name}, {way}" if way else name, graphs.adapted, native, threads, adapters)
            own = replace(graphs.adapted_work, adapters=len(adapters))
            rows[row] = graphs.bypassed_work if None in adapters else own
    return rows


def _torch_rows(bundle: Bundle, options: BenchOptions, adapters: Sequence[str]) -> Sequence[Row]:
    chosen = [(EAGER, False)] * options.pytorch + [(COMPILED, True)] * options.compiled
    if not chosen:
        return ()
    from teamlora_export.validate.sources import open_sources

    manifest, folder, sha256 = bundle.manifest, options.adapter, bundle.manifest.adapter["sha256"]
    if manifest.shelf is not None:
        if not adapters:
            raise ExportError(f"{bundle.folder}: its shelf is empty, and PyTorch runs one adapter. Leave it out.")
        origin = manifest.shelf["adapters"][adapters[0]]["origin"]
        folder, sha256 = folder or Path(origin["source"]), origin["sha256"]
    base, adapter = open_sources(bundle, options.base, folder, sha256)
    return [
        TorchRow(
            f"{name}, {ONE}" if adapters else name,
            base.name,
            adapter.source,
            manifest.task,
            manifest.dtype,
            options.threads,
            compiled,
        )
        for name, compiled in chosen
    ]
