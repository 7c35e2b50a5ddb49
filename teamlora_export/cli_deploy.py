"""The commands of `deploy`, one a target: parse, call, print. No logic lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_output import (
    THIS_FOLDER,
    BundleArgument,
    JsonOption,
    NativeLibraryOption,
    OutputOption,
    given_path,
    native_library,
    show,
)

deploy_app = typer.Typer(
    help="Write what a system loads: python, genai, cpp, triton, kubernetes.", no_args_is_help=True
)

EngineOption = Annotated[str | None, typer.Option(help="Run this engine of the bundle on TensorRT, not its graph.")]
ServerLibraryOption = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="A native library with the op, where the server will find it."),
]
LogitsOption = Annotated[
    str,
    typer.Option(help="last: the graph gives the logits of a prompt's last token, all that our programs read; or all."),
]
PluginOption = Annotated[
    Path | None,
    typer.Option(
        parser=given_path,
        metavar="FILE",
        help="The plugin that the engine was built with. Default: found among those built here.",
    ),
]

NameOption = Annotated[str | None, typer.Option(help="Of the model. Default: the base's and the adapter's.")]
GpuOption = Annotated[bool, typer.Option("--gpu", help="Run the graph on a GPU (engines do in any case).")]
TextOption = Annotated[bool, typer.Option("--text/--no-text", help="Add the models that take words.")]
BatchOption = Annotated[
    int | None,
    typer.Option(min=1, max=65536, help="Requests that run together at most. Default: 8 for text, 32 elsewhere."),
]
SequencesOption = Annotated[
    int, typer.Option(min=1, max=1 << 20, help="Texts at a time: at work, each with its cache, or waiting to be.")
]
CapacityOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1 << 30,
        help="Tokens that a cache in place holds. Default: all that the model takes; as a state, 2048 at most.",
    ),
]
BatchingOption = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Of text. continuous (default with a cache in place, or of an attached model): one model, words in and "
        "out; sequence: a step of the model, its cache as Triton's state.",
    ),
]


@deploy_app.command("python")
def deploy_python_command(
    output: OutputOption,
    bundle: BundleArgument = THIS_FOLDER,
    engine: EngineOption = None,
    plugin: PluginOption = None,
    library: NativeLibraryOption = None,
    logits: LogitsOption = "last",
    json: JsonOption = None,
) -> None:
    """The model with a program in Python that runs it on onnxruntime, or an engine on TensorRT, and numpy."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.deploy.python import deploy_python

    made = deploy_python(read_bundle(bundle), output, logits, native_library(library), engine, plugin)
    _show(made, "python", json)


@deploy_app.command("genai")
def deploy_genai_command(
    output: OutputOption,
    bundle: BundleArgument = THIS_FOLDER,
    library: NativeLibraryOption = None,
    logits: LogitsOption = "last",
    json: JsonOption = None,
) -> None:
    """What onnxruntime-genai loads."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.deploy.genai import deploy_genai

    _show(deploy_genai(read_bundle(bundle), output, native_library(library), logits), "genai", json)


@deploy_app.command("cpp")
def deploy_cpp_command(
    output: OutputOption,
    bundle: BundleArgument = THIS_FOLDER,
    engine: EngineOption = None,
    plugin: PluginOption = None,
    library: NativeLibraryOption = None,
    logits: LogitsOption = "last",
    json: JsonOption = None,
) -> None:
    """A CMake project that runs the model from C++, on ONNX Runtime or TensorRT."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.deploy.cpp import deploy_cpp

    made = deploy_cpp(read_bundle(bundle), output, engine, plugin, logits, native_library(library))
    _show(made, "cpp", json)


@deploy_app.command("triton")
def deploy_triton_command(
    output: OutputOption,
    bundle: BundleArgument = THIS_FOLDER,
    name: NameOption = None,
    engine: EngineOption = None,
    plugin: PluginOption = None,
    library: ServerLibraryOption = None,
    gpu: GpuOption = False,
    text: TextOption = True,
    check: Annotated[bool, typer.Option("--check/--no-check", help="They compare the files with their hashes.")] = True,
    instances: Annotated[int, typer.Option(min=1, max=1024, help="Copies of the model.")] = 1,
    batch: BatchOption = None,
    sequences: SequencesOption = 64,
    capacity: CapacityOption = None,
    batching: BatchingOption = None,
    logits: LogitsOption = "last",
    json: JsonOption = None,
) -> None:
    """A model repository for Triton Inference Server, with clients."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.deploy.triton import deploy_triton
    from teamlora_export.deploy.triton_options import TritonOptions

    options = TritonOptions(
        name=name,
        engine=engine,
        plugin=plugin,
        library=library,
        gpu=gpu,
        text=text,
        check_files=check,
        instances=instances,
        batch=batch,
        sequences=sequences,
        logits=logits,
        capacity=capacity,
        batching=batching,
    )
    written = deploy_triton(read_bundle(bundle), output, options)
    _show(written, "triton", json)


@deploy_app.command("kubernetes")
def deploy_kubernetes_command(
    output: OutputOption,
    bundle: BundleArgument = THIS_FOLDER,
    name: NameOption = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Where pods find the repository: pvc://CLAIM[/PATH] (default: NAME-models), s3://BUCKET[/PATH] or "
            "oci://IMAGE@sha256:DIGEST.",
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Of the server. Default: Triton's, or what the Dockerfile makes of it.")
    ] = None,
    replicas: Annotated[str, typer.Option(metavar="N|MIN-MAX", help="Pods; between two numbers they scale.")] = "2-8",
    cpus: Annotated[int, typer.Option(min=1, max=1024, help="For each pod, and threads of ONNX Runtime.")] = 4,
    monitor: Annotated[bool, typer.Option("--monitor/--no-monitor", help="Add a PodMonitor for Prometheus.")] = True,
    engine: EngineOption = None,
    plugin: PluginOption = None,
    library: ServerLibraryOption = None,
    gpu: GpuOption = False,
    text: TextOption = True,
    batch: BatchOption = None,
    sequences: SequencesOption = 64,
    capacity: CapacityOption = None,
    batching: BatchingOption = None,
    json: JsonOption = None,
) -> None:
    """The repository for Triton with manifests that run it in a cluster, or by KServe."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.deploy.kubernetes import deploy_kubernetes
    from teamlora_export.deploy.triton_options import TritonOptions

    served = TritonOptions(
        name=name,
        engine=engine,
        plugin=plugin,
        library=library,
        gpu=gpu,
        text=text,
        batch=batch,
        sequences=sequences,
        capacity=capacity,
        batching=batching,
    )
    written = deploy_kubernetes(
        read_bundle(bundle),
        output,
        served,
        source=source,
        image=image,
        replicas=replicas,
        cpus=cpus,
        monitor=monitor,
    )
    _show(written, "kubernetes", json)


def _show(folder: Path, target: str, json: Path | None) -> None:
    show(str(folder), {"folder": folder, "target": target}, json)
