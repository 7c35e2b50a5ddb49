"""The command line: parse, call, print. No logic lives here.

Exit codes: 0 done, 1 a validation that failed, 2 wrong input or environment.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
from rich.console import Console

from teamlora_export import __version__, interrupt
from teamlora_export.cli_adapters import adapters_app, adapters_given, adapters_moved, names_given
from teamlora_export.cli_bench import bench_command
from teamlora_export.cli_deploy import deploy_app
from teamlora_export.cli_engine import PluginOption, plugins_app, trt_app
from teamlora_export.cli_output import (
    STANDARD_OUTPUT,
    THIS_FOLDER,
    AdapterDtypeOption,
    AdapterOption,
    AnyBaseOption,
    BundleArgument,
    JsonOption,
    NativeLibraryOption,
    OutputOption,
    given_path,
    native_library,
    prepare_standard_files,
    say,
    say_answer,
    show,
    show_description,
    wide_console,
    write_json,
    writing_to_standard_output,
)
from teamlora_export.cli_train import train_command
from teamlora_export.errors import ExportError, printable

app = typer.Typer(
    name="teamlora-export",
    help="Takes a trained TeamLoRA model to ONNX Runtime and TensorRT: exact, validated, fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Packages that come with an extra, because they are a choice or rarely needed.
_EXTRAS = {
    "onnxruntime": "cpu",
    "gguf": "gguf",
    "polygraphy": "tensorrt",
    "tritonclient": "triton",
    "grpc": "triton",
    "matplotlib": "bench",
}


app.add_typer(trt_app, name="trt")
app.add_typer(plugins_app, name="plugins")
app.add_typer(deploy_app, name="deploy")
app.add_typer(adapters_app, name="adapters")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["TEAMLORA_EXPORT_DEBUG"] = "1"
    if version:
        say(f"teamlora-export {__version__}")
        raise typer.Exit


@app.command()
def onnx(
    base: Annotated[str, typer.Argument(help="Base model: a local folder, or a name on the hub.")],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            "-a",
            metavar="[NAME=]FOLDER",
            help="Folder of the trained adapter. With a name, or given again: a shelf, one of which each row takes.",
        ),
    ],
    output: OutputOption,
    slots: Annotated[
        int | None, typer.Option(help="Of a shelf: how many adapters programs hold in memory. Default: 8 at least.")
    ] = None,
    slot_rank: Annotated[
        int | None,
        typer.Option(
            help="Of a shelf: room for later adapters of up to this r. Give k times r for families whose r is of each "
            "expert (MoELoRA; HydraLoRA and CoMoL beside others). Default: what the given ones need together."
        ),
    ] = None,
    slot_experts: Annotated[
        int | None, typer.Option(help="Of a shelf: room for later adapters of up to so many experts.")
    ] = None,
    slot_targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Of a shelf: modules that later adapters may change as well, endings with commas."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    task: Annotated[
        str,
        typer.Option(help="auto, text-generation, feature-extraction, sentence-embedding or text-classification."),
    ] = "auto",
    op: Annotated[
        str, typer.Option("--op", help="function: keep the op and its body; standard: inline the body.")
    ] = "function",
    cache: Annotated[
        str, typer.Option(help="The KV cache: growing, or in-place (one buffer a layer, for runtimes with opset 24).")
    ] = "growing",
    weights: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4: the base's linear weights as codes (MatMulNBits, blocks of 32). Default: --dtype."
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="With --weights, int8 or int4: the head as well. Default: --dtype.")
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="With --weights: each block of codes has a zero point.")
    ] = False,
    adapter_dtype: AdapterDtypeOption = None,
    any_base: AnyBaseOption = False,
    retrace: Annotated[
        bool, typer.Option("--retrace", help="Trace the graph even where one is kept from an earlier export.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Export a base model with an adapter to a bundle with one ONNX graph."""
    from teamlora_export.export import export_onnx

    has_slots = bool(slot_targets) or any(number is not None for number in (slots, slot_rank, slot_experts))
    bundle = export_onnx(
        base,
        adapters_given(adapter, is_shelf=has_slots),
        output,
        slots=slots,
        slot_rank=slot_rank,
        slot_experts=slot_experts,
        slot_targets=names_given(slot_targets or ()),
        dtype=dtype,
        task=task,
        op_form=op,
        cache=cache,
        weights_form=weights,
        head_form=head,
        zero_points=zero_points,
        adapter_dtype=adapter_dtype,
        retrace=retrace,
        any_base=any_base,
    )
    made = bundle.manifest
    shelf = made.shelf["adapters"] if made.shelf is not None else {}
    adapters = f", adapters for {made.shelf['slots']} slots: {', '.join(shelf)}" if made.shelf is not None else ""
    codes = f" with weights of {made.quantisation['bits']} bits" if made.quantisation else ""
    fields = {
        "bundle": bundle.folder,
        "task": made.task,
        "dtype": made.dtype,
        "quantisation": made.quantisation,
        "op": made.op,
        "shelf": made.shelf,
        "sha256": made.sha256,
    }
    show(f"{bundle.folder}: {made.task}, {made.dtype}{codes}, {made.op['nodes']} expert nodes{adapters}", fields, json)


@app.command()
def attach(
    base: Annotated[
        Path,
        typer.Argument(
            parser=given_path,
            metavar="ONNX|FOLDER",
            help="A graph that another tool made, or the folder that it is in.",
        ),
    ],
    adapter: AdapterOption,
    output: OutputOption,
    source: Annotated[
        str | None,
        typer.Option("--base", help="The model that the graph was made of: its weights then prove each module."),
    ] = None,
    adapter_dtype: AdapterDtypeOption = None,
    json: JsonOption = None,
) -> None:
    """Attach an adapter to a graph that was exported or quantised elsewhere."""
    from teamlora_export.attach.run import attach as attach_adapter

    bundle = attach_adapter(base, adapter, output, base_source=source, adapter_dtype=adapter_dtype)
    made = bundle.manifest
    show(
        f"{bundle.folder}: {made.task}, {made.dtype}, {made.op['nodes']} expert nodes",
        {
            "bundle": bundle.folder,
            "task": made.task,
            "dtype": made.dtype,
            "op": made.op,
            "sha256": made.sha256,
            "attached": made.attached,
        },
        json,
    )


@app.command()
def validate(
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
    from teamlora_export.progress import Reporter
    from teamlora_export.validate.lm_eval_tasks import LmEval
    from teamlora_export.validate.report import print_verdict, verdict_fields, write_html
    from teamlora_export.validate.run import validate_bundle
    from teamlora_export.validate.verdict import thresholds_of

    if engine == "":
        # A variable that a script forgot to set: not the wish to judge the graph.
        raise ExportError("--engine is empty. Give an engine's name, or leave the option out.")
    if not lm_eval and (lm_eval_tasks is not None or lm_eval_limit is not None):
        raise ExportError("--lm-eval-tasks and --lm-eval-limit: say more of --lm-eval. Give a task with it.")
    opened = read_bundle(bundle)
    if report is not None:
        refuse_foreign_report(report)
    refuse_same_file(report, json)
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


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            parser=given_path,
            metavar="PATH",
            help="Folder of an adapter or of a bundle, an engine, or any ONNX graph. Default: this folder.",
        ),
    ] = THIS_FOLDER,
    json: JsonOption = None,
) -> None:
    """Say what an adapter, a bundle, an engine or a graph is."""
    from teamlora_export.inspect import inspect_path

    show_description(inspect_path(path), json)


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or cuda:1 and so on, with onnxruntime-gpu.")]


@app.command()
def generate(
    bundle: Annotated[Path, typer.Argument(parser=given_path, metavar="BUNDLE", help="Folder of the bundle.")],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One is streamed; several make a batch.")],
    tokens: Annotated[int, typer.Option(min=1, help="Generate at most so many.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token, always; above: drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that are so likely together.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Of tokens that are there already; 1: none.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same one draws the same tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this; may be given again.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Of the shelf: what answers; give it again for each prompt's own, - for none."
        ),
    ] = None,
    library: NativeLibraryOption = None,
    device: DeviceOption = "cpu",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the files with their hashes.")] = True,
) -> None:
    """Try a bundle: text in ONNX Runtime, greedy by default, with the tokens a second at the end."""
    from teamlora_export.attach.interface import refuse_window_caches
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.runner import Model, Sampling, answer

    native = native_library(library)
    refuse_window_caches(bundle)
    try:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed=seed)
        model = Model(bundle, native, check, device=device)
        written = [prompt.replace("\\n", "\n") for prompt in prompts]
        count, seconds = answer(model, written, tokens, say_answer, sampling, stop or (), adapter or ())
    except ModelError as error:
        raise ExportError(str(error)) from None
    print(f"({count} tokens, {count / seconds:.1f} a second)", file=sys.stderr)


@app.command()
def embed(
    bundle: Annotated[Path, typer.Argument(parser=given_path, metavar="BUNDLE", help="Folder of the bundle.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Of the shelf: what reads them; give it again for each text's own, - for none."
        ),
    ] = None,
    library: NativeLibraryOption = None,
    device: DeviceOption = "cpu",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the files with their hashes.")] = True,
) -> None:
    """Try a bundle that does not generate text: a line of JSON for each text, with its vector or scores."""
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.runner import Model, encode_text, shared_adapters

    native = native_library(library)
    try:
        model = Model(bundle, native, check, device=device)
        ids = [encode_text(model.tokenizer, text) for text in texts]
        rows = model.encode(ids, shared_adapters(adapter or (), len(ids)))
    except ModelError as error:
        raise ExportError(str(error)) from None
    for row in rows:
        say(str(row.astype(float).tolist()))


app.command("bench")(bench_command)
app.command("train")(train_command)


# What the command line library raises for arguments that it cannot take.
_WrongUsage: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line; every expected failure is one message and exit code 2."""
    with interrupt.reported():
        _run()


def _run() -> None:
    prepare_standard_files()
    try:
        sys.exit(app(standalone_mode=False))
    except _WrongUsage as error:
        usage = io.StringIO()
        error.show(file=usage)
        _print_error(usage.getvalue())
        sys.exit(2)
    except ExportError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            _fail_unforeseen(error)
        _fail(f"{error.name} is not installed, and this command needs it: pip install 'teamlora-export[{extra}]'")
    except MemoryError:
        _fail("Not enough memory for this model on this machine.")
    except OSError as error:
        _fail(f"{error.filename or 'The output'}: {error.strerror or error}.")
    except Exception as error:
        _fail_unforeseen(error)


def _fail_unforeseen(error: Exception) -> NoReturn:
    """The last resort. Tests take its words for a failure."""
    _fail(
        f"Unexpected {type(error).__name__} ({error}): a fault of teamlora-export. Run it with --debug and report it."
    )


def _fail(message: str) -> NoReturn:
    if interrupt.arrived():
        interrupt.leave()
    _report(message)
    sys.exit(2)


def _report(message: str) -> None:
    if os.environ.get("TEAMLORA_EXPORT_DEBUG"):
        traceback.print_exc()
    _print_error(f"Error: {message}")


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        Console(stderr=True, highlight=False, soft_wrap=True).print(printable(text.rstrip()), style="red", markup=False)
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
