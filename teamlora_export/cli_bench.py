"""The command `bench`: parse, call, print. No logic lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_output import (
    STANDARD_OUTPUT,
    THIS_FOLDER,
    BundleArgument,
    JsonOption,
    NativeLibraryOption,
    given_path,
    native_library,
    wide_console,
    write_json,
    writing_to_standard_output,
)


def bench_command(
    bundle: BundleArgument = THIS_FOLDER,
    lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            "--lengths",
            min=1,
            max=1 << 20,
            help="Tokens of a prompt; may be given again. Default: 64 and 256.",
        ),
    ] = None,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, max=1024, help="Prompts at once; may be given again. Default: 1 and 8."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1 << 16, help="Tokens that are timed after each prompt.")] = 32,
    turns: Annotated[int, typer.Option(min=1, max=10_000, help="How often each row runs.")] = 9,
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="Of each row; 0: one for each core that may be used.")
    ] = 0,
    library: NativeLibraryOption = None,
    pytorch: Annotated[bool, typer.Option("--pytorch", help="PyTorch with the published layer, too.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="PyTorch by torch.compile, too.")] = False,
    base: Annotated[str | None, typer.Option(help="For PyTorch: the base, should it have moved.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            "-a",
            parser=given_path,
            metavar="FOLDER",
            help="For PyTorch: the adapter, should it have moved.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Of a shelf: what rows have, the first where it is one; may be given again. Default: all.",
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure load time and memory, in processes of their own.")
    ] = True,
    report: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="FILE", help="Write a self-contained HTML page here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="FILE", help="Write a plot of the ratios here, a PNG.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Measure a bundle on this CPU, beside the same graph with its experts bypassed; with the native op, too, where one
    is carried, was built here, or is given."""
    from teamlora_export.bench.plot import require_matplotlib, write_plot
    from teamlora_export.bench.report import benchmark_fields, print_benchmark, write_html
    from teamlora_export.bench.run import BenchOptions, bench_bundle
    from teamlora_export.bundle import read_bundle
    from teamlora_export.errors import ExportError, printable
    from teamlora_export.page import refuse_foreign_report, refuse_same_file

    opened = read_bundle(bundle)
    for path in (report, plot):
        if path is not None:
            refuse_foreign_report(path)
    refuse_same_file(report, plot, json)
    if plot is not None:
        require_matplotlib()
    options = BenchOptions(
        lengths=tuple(lengths or ()),
        batches=tuple(batches or BenchOptions.batches),
        count=count,
        turns=turns,
        threads=threads,
        library=native_library(library),
        pytorch=pytorch,
        compiled=compiled,
        base=base,
        adapter=adapter,
        memory=memory,
        only=tuple(only or ()),
    )
    benchmark = bench_bundle(opened, options)
    name = printable(opened.folder.resolve().name)
    untold: ExportError | None = None
    if json != STANDARD_OUTPUT:
        try:
            with writing_to_standard_output():
                print_benchmark(benchmark, name, wide_console())
        except ExportError as error:
            # What took minutes to measure is still to be kept in files.
            untold = error
    if report is not None:
        write_html(benchmark, name, report)
    if plot is not None:
        write_plot(benchmark, name, plot)
    write_json(benchmark_fields(benchmark, name), json)
    if untold is not None:
        raise untold
