"""The command line: parse, call, print. No logic lives here.

Exit codes: 0 done, 1 a validation that failed, 2 wrong input or environment.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from teamlora_export import __version__
from teamlora_export.cli_deploy import BundleArgument, OutputOption, deploy_app
from teamlora_export.errors import ExportError

app = typer.Typer(
    name="teamlora-export",
    help="Takes a trained TeamLoRA model to ONNX Runtime and TensorRT: exact, validated, fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Packages that come with an extra, because they are a choice or rarely needed.
_EXTRAS = {"onnxruntime": "cpu", "gguf": "gguf", "polygraphy": "tensorrt", "tritonclient": "triton", "grpc": "triton"}

AdapterArgument = Annotated[Path, typer.Option("--adapter", "-a", help="Folder of the trained adapter.")]


class _BuildByDefault(typer.core.TyperGroup):
    """`trt BUNDLE` builds; `trt refit` is a command of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["build", *args]
        return super().parse_args(ctx, args)


trt_app = typer.Typer(
    cls=_BuildByDefault,
    help="Build a TensorRT or TensorRT-RTX engine of a bundle: trt BUNDLE [--fp16], or `trt build --help`.",
    no_args_is_help=True,
)
plugins_app = typer.Typer(help="Build and describe the TensorRT plugin.", no_args_is_help=True)
app.add_typer(trt_app, name="trt")
app.add_typer(plugins_app, name="plugins")
app.add_typer(deploy_app, name="deploy")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if debug:
        os.environ["TEAMLORA_EXPORT_DEBUG"] = "1"
    if version:
        print(f"teamlora-export {__version__}")
        raise typer.Exit


@app.command()
def onnx(
    base: Annotated[str, typer.Argument(help="Base model: a local folder, or a name on the hub.")],
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    task: Annotated[
        str,
        typer.Option(help="auto, text-generation, feature-extraction, sentence-embedding or text-classification."),
    ] = "auto",
    op: Annotated[
        str, typer.Option("--op", help="function: keep the op and its body; standard: inline the body.")
    ] = "function",
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Take the traced graph from the user's cache and keep it there.")
    ] = True,
) -> None:
    """Export a base model with an adapter to a bundle with one ONNX graph."""
    from teamlora_export.export import export_onnx

    bundle = export_onnx(base, adapter, output, dtype=dtype, task=task, op_form=op, use_cache=cache)
    print(
        f"{bundle.folder}: {bundle.manifest.task}, {bundle.manifest.dtype}, {bundle.manifest.op['nodes']} expert nodes"
    )


@app.command()
def validate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    base: Annotated[str | None, typer.Option(help="The base model, should it have moved since the export.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="The adapter, should it have moved.")] = None,
    layer_by_layer: Annotated[
        bool | None,
        typer.Option("--layer-by-layer/--whole", help="Hold one layer in memory at a time. Default: where it must be."),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Judge this engine of the bundle instead of its graph.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="The plugin library, should it not be the one built here.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure as JSON here.")] = None,
) -> None:
    """Compare a bundle with PyTorch; exit with 1 where it departs, and say which module does."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.validate.report import print_verdict, write_html, write_json
    from teamlora_export.validate.run import validate_bundle

    opened = read_bundle(bundle)
    verdict = validate_bundle(
        opened,
        base_source=base,
        adapter_folder=adapter,
        layer_by_layer=layer_by_layer,
        engine_name=engine,
        plugin=plugin,
    )
    print_verdict(verdict, _wide_console())
    if report is not None:
        write_html(verdict, opened, report)
    if json is not None:
        write_json(verdict, opened, json)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of an adapter or of a bundle, or an engine.")],
) -> None:
    """Say what an adapter, a bundle or an engine is."""
    from teamlora_export.inspect import inspect_path

    _wide_console().print(inspect_path(path))


@app.command()
def generate(
    bundle: BundleArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One is streamed; several make a batch.")],
    tokens: Annotated[int, typer.Option(min=1, help="Generate at most so many.")] = 64,
    library: Annotated[Path | None, typer.Option(help="A native library with the op.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the files with their hashes.")] = True,
) -> None:
    """Try a bundle: greedy text in ONNX Runtime, with the tokens a second at the end."""
    from teamlora_export.deploy.runner import Model, ModelError, answer

    _check_library(library)
    try:
        model = Model(bundle, library, check)
        written = [prompt.replace("\\n", "\n") for prompt in prompts]
        count, seconds = answer(model, written, tokens, lambda text: print(text, end="", flush=True))
    except ModelError as error:
        raise ExportError(str(error)) from None
    print(f"({count} tokens, {count / seconds:.1f} a second)", file=sys.stderr)


@app.command()
def embed(
    bundle: BundleArgument,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...")],
    library: Annotated[Path | None, typer.Option(help="A native library with the op.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the files with their hashes.")] = True,
) -> None:
    """Try a bundle that does not generate text: a line of JSON for each text, with its vector or scores."""
    from teamlora_export.deploy.runner import Model, ModelError

    _check_library(library)
    try:
        model = Model(bundle, library, check)
        rows = model.encode([model.tokenizer.encode(text).ids for text in texts])
    except ModelError as error:
        raise ExportError(str(error)) from None
    for row in rows:
        print(row.astype(float).tolist())


def _check_library(library: Path | None) -> None:
    """Refuse a library of ours that does not fit; ONNX Runtime's own words name neither cause nor way out."""
    if library is not None:
        from teamlora_export.engine.onnxruntime_library import check_library, read_library

        check_library(read_library(library))


@trt_app.command("build")
def trt_build(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="NAME.engine to write. Default: in the bundle's engines folder."),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Weights and activations in float32.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="In float16; norms, softmax and routing in float32.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="In bfloat16; norms, softmax and routing in float32.")] = False,
    runtime: Annotated[str, typer.Option(help="auto, tensorrt, or rtx (TensorRT-RTX, which needs no GPU).")] = "auto",
    shapes: Annotated[
        str | None,
        typer.Option(
            help="BATCHxTOKENS at least, best, at most: 1x1,1x256,4x2048. Tokens: prompt and answer together."
        ),
    ] = None,
    plugin: Annotated[Path | None, typer.Option(help="Use this plugin library.")] = None,
    no_plugin: Annotated[bool, typer.Option("--no-plugin", help="Inline the op's body instead.")] = False,
    compute_capability: Annotated[
        str | None, typer.Option(help="For RTX: the GPUs to build for, such as 8.9,12.0. Default: this one, or all.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Workspace at most, in GB.")] = None,
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="TensorRT's, 0 to 5.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Let `trt refit` exchange the adapter later.")] = False,
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="Leave the weights out; they come from the bundle when it is loaded."),
    ] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="Keep tactic timings in this file.")] = None,
) -> None:
    """Build an engine: NAME.engine and NAME.json. Default dtype: the bundle's."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.engine.build import BuildOptions, build_engine

    chosen = [name for name, given in (("fp32", fp32), ("fp16", fp16), ("bf16", bf16)) if given]
    if len(chosen) > 1:
        raise ExportError(f"--{' and --'.join(chosen)} exclude each other.")
    options = BuildOptions(
        dtype=chosen[0] if chosen else None,
        runtime=runtime,
        shapes=shapes,
        use_plugin=not no_plugin,
        plugin=plugin,
        capabilities=tuple(compute_capability.split(",")) if compute_capability else (),
        memory_gb=memory,
        optimization_level=optimization_level,
        refit=refit,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
    )
    path, facts = build_engine(read_bundle(bundle), options, output)
    print(f"{path}: {facts.dtype}, {facts.size / 1e6:,.0f} MB, for {', '.join(facts.targets)}")


@trt_app.command("graph")
def trt_graph(
    bundle: BundleArgument,
    output: OutputOption,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. Default: the bundle's.")] = None,
    no_plugin: Annotated[bool, typer.Option("--no-plugin", help="Inline the op's body.")] = False,
) -> None:
    """Write the graph alone, for trtexec or polygraphy: its op is the plugin's, or inlined."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.engine.prepare import write_graph
    from teamlora_export.graph.precision import DTYPES
    from teamlora_export.progress import Reporter

    opened = read_bundle(bundle)
    wanted = dtype or opened.manifest.dtype
    if wanted not in DTYPES:
        raise ExportError(f"--dtype {wanted}: unknown. Use {', '.join(DTYPES)}.")
    print(write_graph(opened, wanted, output, for_plugin=not no_plugin, reporter=Reporter()))


@trt_app.command("refit")
def trt_refit(
    engine: Annotated[Path, typer.Argument(help="NAME.engine, built with --refit.")],
    adapter: AdapterArgument,
    bundle: Annotated[
        Path | None, typer.Option(help="The bundle it was built from. Default: the one whose folder it is in.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write another NAME.engine.")] = None,
    plugin: Annotated[Path | None, typer.Option(help="Use this plugin library.")] = None,
) -> None:
    """Exchange the adapter of an engine without building it anew."""
    from teamlora_export.engine.facts import bundle_of
    from teamlora_export.engine.refit import refit_engine

    path, facts = refit_engine(engine, bundle_of(engine, bundle), adapter, output, plugin)
    print(f"{path}: adapter {facts.adapter_sha256[:12]}")


@plugins_app.command("build")
def plugins_build(
    arch: Annotated[
        str | None, typer.Option(help="Compute capabilities without the dot: 80,89. Default: 80,86,89,90,100,120.")
    ] = None,
    onnxruntime: Annotated[
        bool, typer.Option("--onnxruntime", help="The native op for ONNX Runtime on a CPU instead.")
    ] = False,
) -> None:
    """Compile the TensorRT plugin for this machine's TensorRT headers; kept in the user's cache."""
    if onnxruntime:
        from teamlora_export.engine.onnxruntime_library import build_library

        print(build_library().path)
        return
    from teamlora_export.engine.plugin import ARCHITECTURES, build_plugin

    print(build_plugin(tuple(arch.split(",")) if arch else ARCHITECTURES).path)


@plugins_app.command("info")
def plugins_info(
    library: Annotated[Path | None, typer.Argument(help="A library. Default: the one built here.")] = None,
) -> None:
    """Say what a plugin library holds."""
    from teamlora_export.inspect import inspect_plugin

    _wide_console().print(inspect_plugin(library))


def _wide_console() -> Console:
    """A terminal's own width; wide enough for our tables elsewhere."""
    return Console() if sys.stdout.isatty() else Console(width=132)


class _Interrupted(BaseException):
    """Ctrl-C or a polite kill. Not `KeyboardInterrupt`, which the command-line library turns into an exit of its
    own."""


def main() -> None:
    """Run the command line; every expected failure is one message and exit code 2."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(kind, _interrupt)
    sys.unraisablehook = _interrupt_again
    try:
        app()
    except ExportError as error:
        _fail(str(error))
    except _Interrupted:
        _report("Interrupted; nothing was written.")
        # At once: a builder of TensorRT may still be at work in its thread.
        os._exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        _fail(f"{error.name} is not installed, and this command needs it: pip install 'teamlora-export[{extra}]'")
    except MemoryError:
        _fail("Not enough memory for this model on this machine.")
    except OSError as error:
        _fail(f"{error.filename or 'A file'}: {error.strerror or error}.")


def _interrupt(_signal: int, _frame: object) -> None:
    raise _Interrupted


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a finalizer; an interruption that fell there comes once more, a moment later."""
    if isinstance(dropped.exc_value, _Interrupted):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(dropped)


def _fail(message: str) -> None:
    _report(message)
    sys.exit(2)


def _report(message: str) -> None:
    if os.environ.get("TEAMLORA_EXPORT_DEBUG"):
        traceback.print_exc()
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"Error: {message}", style="red", markup=False)
    sys.stdout.flush()
    sys.stderr.flush()


if __name__ == "__main__":
    main()
