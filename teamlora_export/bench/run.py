"""`teamlora-export bench`: a bundle, side by side with the same graph without experts, and with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teamlora_export.bench.graphs import Graphs, written_graphs
from teamlora_export.bench.measure import Benchmark, measure
from teamlora_export.bench.rows import GraphRow, Row, TorchRow
from teamlora_export.bench.turns import Workload
from teamlora_export.bundle import Bundle, check_files, refuse_shelf
from teamlora_export.engine.onnxruntime_library import library_for, library_here
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter

BYPASSED, BODY, NATIVE = "experts bypassed", "op's body", "native op"
EAGER, COMPILED = "PyTorch", "PyTorch, compiled"
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


def bench_bundle(bundle: Bundle, options: BenchOptions, reporter: Reporter | None = None) -> Benchmark:
    """Measure `bundle`; ratios are over its graph with the experts bypassed.

    Raises:
        ExportError: the bundle is not what was exported, cannot run on a CPU, or takes no such lengths; the library
            does not fit; base or adapter are not those of the bundle, or for no row; a row cannot run.
        ModuleNotFoundError: onnxruntime is not installed.
    """
    reporter = reporter or Reporter()
    # Rows import it in processes of their own, whose errors are those of a row.
    import onnxruntime  # noqa: F401

    if (options.base is not None or options.adapter is not None) and not (options.pytorch or options.compiled):
        raise ExportError("--base and --adapter are for PyTorch. Add --pytorch or --compile, or leave them out.")
    refuse_shelf(bundle, "`bench`")
    if bundle.manifest.dtype == "bf16":
        raise ExportError(
            f"{bundle.folder}: is in bfloat16, which ONNX Runtime has no kernels for on a CPU. "
            "Export it with --dtype fp32 or fp16."
        )
    workloads = choose_workloads(bundle, options)
    check_files(bundle)
    library = _find_library(bundle, options.library, reporter)
    in_torch = _torch_rows(bundle, options)
    with written_graphs(bundle) as graphs:
        rows = [*_graph_rows(graphs, library, options.threads), *in_torch]
        return measure(
            rows,
            BYPASSED,
            workloads,
            options.turns,
            vocabulary=bundle.manifest.tokens.vocabulary,
            threads=options.threads,
            works={BYPASSED: graphs.bypassed_work, **{row.name: graphs.adapted_work for row in rows[1:]}},
            memory=options.memory,
            reporter=reporter,
        )


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


def _graph_rows(graphs: Graphs, library: Path | None, threads: int) -> list[Row]:
    rows: list[Row] = [
        GraphRow(BYPASSED, graphs.bypassed, threads=threads),
        GraphRow(BODY, graphs.adapted, threads=threads),
    ]
    if library is not None:
        rows.append(GraphRow(NATIVE, graphs.adapted, library, threads))
    return rows


def _torch_rows(bundle: Bundle, options: BenchOptions) -> Sequence[Row]:
    chosen = [(EAGER, False)] * options.pytorch + [(COMPILED, True)] * options.compiled
    if not chosen:
        return ()
    from teamlora_export.validate.sources import open_sources

    manifest = bundle.manifest
    base, adapter = open_sources(bundle, options.base, options.adapter, manifest.adapter["sha256"])
    return [
        TorchRow(name, base.name, adapter.source, manifest.task, manifest.dtype, options.threads, compiled)
        for name, compiled in chosen
    ]
