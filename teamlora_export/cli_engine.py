"""The commands of engines and native libraries, `trt` and `plugins`: parse, call, print. No logic lives here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from teamlora_export.cli_output import (
    THIS_FOLDER,
    AdapterOption,
    BundleArgument,
    JsonOption,
    OutputOption,
    given_path,
    show,
    show_description,
)
from teamlora_export.errors import ExportError

PluginOption = Annotated[
    Path | None,
    typer.Option(parser=given_path, metavar="FILE", help="Plugin library. Default: the one built here."),
]


# A file of that name is given with its folder.
_AUTO = Path("auto")


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
plugins_app = typer.Typer(help="Build and describe native libraries.", no_args_is_help=True)


@trt_app.command("build")
def trt_build(
    bundle: BundleArgument = THIS_FOLDER,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=given_path,
            metavar="FILE",
            help="NAME.engine to write. Default: in the bundle's engines folder.",
        ),
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
    plugin: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FILE|auto",
            help="Plugin library; auto: build with the plugin and without, time both, keep the faster. "
            "Default: the one built here.",
        ),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="Compile the plugin for these GPUs: compute capabilities without the dot, 80,89.")
    ] = None,
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
    timing_cache: Annotated[
        Path | None, typer.Option(parser=given_path, metavar="FILE", help="Keep tactic timings in this file.")
    ] = None,
    json: JsonOption = None,
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
        compare=plugin == _AUTO,
        plugin=None if plugin == _AUTO else plugin,
        architectures=tuple(arch.split(",")) if arch else None,
        capabilities=tuple(compute_capability.split(",")) if compute_capability else (),
        memory_gb=memory,
        optimization_level=optimization_level,
        refit=refit,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
    )
    path, facts = build_engine(read_bundle(bundle), options, output)
    text = f"{path}: {facts.dtype}, {facts.size / 1e6:,.0f} MB, for {', '.join(facts.targets)}"
    show(text, {"engine": path, **dataclasses.asdict(facts)}, json)


@trt_app.command("graph")
def trt_graph(
    output: OutputOption,
    bundle: BundleArgument = THIS_FOLDER,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. Default: the bundle's.")] = None,
    no_plugin: Annotated[bool, typer.Option("--no-plugin", help="Inline the op's body.")] = False,
    capacity: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 30,
            help="Tokens that a cache in place holds. Default: all that the model takes, 2048 at most.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Write the graph alone, for trtexec or polygraphy: its op is the plugin's, or inlined."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.dtypes import DTYPES
    from teamlora_export.engine.prepare import write_graph
    from teamlora_export.progress import Reporter

    opened = read_bundle(bundle)
    wanted = dtype or opened.manifest.dtype
    if wanted not in DTYPES:
        raise ExportError(f"--dtype {wanted}: unknown. Use {', '.join(DTYPES)}.")
    written = write_graph(opened, wanted, output, for_plugin=not no_plugin, reporter=Reporter(), capacity=capacity)
    show(str(written), {"graph": written, "dtype": wanted, "plugin": not no_plugin}, json)


@trt_app.command("refit")
def trt_refit(
    engine: Annotated[
        Path, typer.Argument(parser=given_path, metavar="ENGINE", help="NAME.engine, built with --refit.")
    ],
    adapter: AdapterOption,
    bundle: Annotated[
        Path | None,
        typer.Option(
            parser=given_path,
            metavar="FOLDER",
            help="The bundle it was built from. Default: the one whose folder it is in.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=given_path, metavar="FILE", help="Write another NAME.engine."),
    ] = None,
    plugin: PluginOption = None,
    json: JsonOption = None,
) -> None:
    """Exchange the adapter of an engine without building it anew."""
    from teamlora_export.engine.facts import bundle_of
    from teamlora_export.engine.refit import refit_engine

    path, facts = refit_engine(engine, bundle_of(engine, bundle), adapter, output, plugin)
    show(f"{path}: adapter {facts.adapter_sha256[:12]}", {"engine": path, **dataclasses.asdict(facts)}, json)


@plugins_app.command("build")
def plugins_build(
    arch: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities without the dot: 80,89. Default: those of 80,86,89,90,100,120 that nvcc knows."
        ),
    ] = None,
    onnxruntime: Annotated[
        bool, typer.Option("--onnxruntime", help="The native op for ONNX Runtime on a CPU instead.")
    ] = False,
    cuda: Annotated[
        bool,
        typer.Option("--cuda", help="With --onnxruntime: the op for its CUDA provider, too. Not yet run on a GPU."),
    ] = False,
    json: JsonOption = None,
) -> None:
    """Compile the TensorRT plugin, or the native op for ONNX Runtime; kept in the user's cache for later commands."""
    architectures = tuple(arch.split(",")) if arch else None
    if cuda and not onnxruntime:
        raise ExportError("--cuda: the TensorRT plugin is CUDA code in any case. Leave it out, or add --onnxruntime.")
    if onnxruntime:
        from teamlora_export.engine.onnxruntime_library import build_cuda_library, build_library

        if arch is not None and not cuda:
            raise ExportError("--arch is for CUDA code. Leave it out, or add --cuda.")
        native = build_cuda_library(architectures) if cuda else build_library()
        show(str(native.path), dataclasses.asdict(native), json)
        return
    from teamlora_export.engine.plugin import build_plugin

    library = build_plugin(architectures)
    show(str(library.path), dataclasses.asdict(library), json)


@plugins_app.command("info")
def plugins_info(
    library: Annotated[
        Path | None,
        typer.Argument(parser=given_path, metavar="LIBRARY", help="A library. Default: the plugin built here."),
    ] = None,
    onnxruntime: Annotated[
        bool, typer.Option("--onnxruntime", help="Default: the native op for ONNX Runtime, carried or built here.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Say what a native library holds."""
    from teamlora_export.inspect import inspect_plugin

    show_description(inspect_plugin(library, onnxruntime), json)
