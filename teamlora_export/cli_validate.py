"""The command `validate`: parse, call, print. No logic lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_adapters import adapters_moved
from teamlora_export.cli_engine import PluginOption
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
from teamlora_export.errors import ExportError


def validate_command(
    bundle: BundleArgument = THIS_FOLDER,
    base: Annotated[str | None, typer.Option(help="The base model, should it have moved since the export.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", "-a", metavar="[NAME=]FOLDER", help="The adapter, should it have moved; of a shelf, by name."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Of a shelf: judge this adapter; may be given again.")
    ] = None,
    layer_by_layer: Annotated[
        bool | None,
        typer.Option("--layer-by-layer/--whole", help="Hold one layer in memory at a time. Default: where it must be."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Judge this engine of the bundle instead of its graph.")] = None,
    plugin: PluginOption = None,
    library: NativeLibraryOption = None,
    quality: Annotated[
        bool | None,
        typer.Option(
            "--quality/--no-quality",
            help="Measure on held-out text what the bundle lost. Default: where it is quantised.",
        ),
    ] = None,
    most_perplexity: Annotated[
        float | None,
        typer.Option(min=1.0, help="Fail above so many times the perplexity before quantisation. Default: 1.5."),
    ] = None,
    least_agreement: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Fail below this share of unchanged likeliest tokens, or labels. Default: 0.6."
        ),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Score this task of lm-eval as well; may be given again."),
    ] = None,
    lm_eval_tasks: Annotated[
        Path | None,
        typer.Option(parser=given_path, metavar="FOLDER", help="With --lm-eval: a folder with tasks of your own."),
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option(min=1, help="With --lm-eval: so many documents of each task.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="FILE", help="Write a self-contained HTML report here.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Compare a bundle with PyTorch; exit with 1 where it departs, and say which module does."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.page import refuse_foreign_report, refuse_same_file

    if engine == "":
        # A variable that a script forgot to set: not the wish to judge the graph.
        raise ExportError("--engine is empty. Give an engine's name, or leave the option out.")
    if not lm_eval and (lm_eval_tasks is not None or lm_eval_limit is not None):
        raise ExportError("--lm-eval-tasks and --lm-eval-limit: say more of --lm-eval. Give a task with it.")
    opened = read_bundle(bundle)
    if report is not None:
        refuse_foreign_report(report)
    refuse_same_file(report, json)

    # With them come seconds of PyTorch.
    from teamlora_export.progress import Reporter
    from teamlora_export.validate.lm_eval_tasks import LmEval
    from teamlora_export.validate.report import print_verdict, verdict_fields, write_html
    from teamlora_export.validate.run import validate_bundle
    from teamlora_export.validate.verdict import thresholds_of

    verdict = validate_bundle(
        opened,
        base_source=base,
        adapter_folder=adapters_moved(adapter or ()),
        only=only or (),
        layer_by_layer=layer_by_layer,
        engine_name=engine,
        plugin=plugin,
        library=native_library(library),
        quality=quality,
        thresholds=thresholds_of(most_perplexity, least_agreement),
        tasks=LmEval(tuple(lm_eval), lm_eval_tasks, lm_eval_limit) if lm_eval else None,
    )
    if json != STANDARD_OUTPUT:
        with writing_to_standard_output():
            print_verdict(verdict, wide_console())
    if report is not None:
        write_html(verdict, opened, report)
    write_json(verdict_fields(verdict, opened), json)
    if verdict.not_kept:
        Reporter().warn(f"The verdict could not be kept: {verdict.not_kept}")
    if not verdict.passed:
        raise typer.Exit(1)
