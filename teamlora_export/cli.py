"""The command line: parse, call, print. No logic lives here.

Exit codes: 0 done, 1 a validation that failed, 2 wrong input or environment.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from teamlora_export import __version__
from teamlora_export.errors import ExportError

app = typer.Typer(
    name="teamlora-export",
    help="Takes a trained TeamLoRA model to ONNX Runtime and TensorRT: exact, validated, fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Packages that come with an extra, because they are a choice or rarely needed.
_EXTRAS = {"onnxruntime": "cpu", "gguf": "gguf"}

AdapterArgument = Annotated[Path, typer.Option("--adapter", "-a", help="Folder of the trained adapter.")]


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
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every figure as JSON here.")] = None,
) -> None:
    """Compare a bundle with PyTorch; exit with 1 where it departs, and say which module does."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.validate.report import print_verdict, write_html, write_json
    from teamlora_export.validate.run import validate_bundle

    opened = read_bundle(bundle)
    verdict = validate_bundle(opened, base_source=base, adapter_folder=adapter, layer_by_layer=layer_by_layer)
    print_verdict(verdict, _wide_console())
    if report is not None:
        write_html(verdict, opened, report)
    if json is not None:
        write_json(verdict, opened, json)
    if not verdict.passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of an adapter or of a bundle.")],
) -> None:
    """Say what an adapter or a bundle is."""
    from teamlora_export.inspect import inspect_path

    _wide_console().print(inspect_path(path))


def _wide_console() -> Console:
    """A terminal's own width; wide enough for our tables elsewhere."""
    return Console() if sys.stdout.isatty() else Console(width=132)


class _Interrupted(BaseException):
    """Ctrl-C or a polite kill. Not `KeyboardInterrupt`, which the command-line library turns into an exit of its
    own."""


def main() -> None:
    """Run the command line; every expected failure is one message and exit code 2."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _interrupt)
    try:
        app()
    except ExportError as error:
        _fail(str(error))
    except _Interrupted:
        _fail("Interrupted; nothing was written.")
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


def _fail(message: str) -> None:
    if os.environ.get("TEAMLORA_EXPORT_DEBUG"):
        traceback.print_exc()
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"Error: {message}", style="red", markup=False)
    sys.stderr.flush()
    sys.exit(2)


if __name__ == "__main__":
    main()
