"""The command line: which commands there are, and how one ends that fails. The commands are in the `cli_` modules.

Exit codes: 0 done, 1 a validation that failed, 2 wrong input or environment.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from teamlora_export import __version__, interrupt
from teamlora_export.cli_adapters import adapters_app
from teamlora_export.cli_bench import bench_command
from teamlora_export.cli_deploy import deploy_app
from teamlora_export.cli_engine import plugins_app, trt_app
from teamlora_export.cli_export import attach_command, onnx_command
from teamlora_export.cli_inspect import inspect_command
from teamlora_export.cli_output import prepare_standard_files, say
from teamlora_export.cli_train import train_command
from teamlora_export.cli_try import embed_command, generate_command
from teamlora_export.cli_validate import validate_command
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

app.command("onnx")(onnx_command)
app.command("attach")(attach_command)
app.command("validate")(validate_command)
app.command("inspect")(inspect_command)
app.command("generate")(generate_command)
app.command("embed")(embed_command)
app.command("bench")(bench_command)
app.command("train")(train_command)
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
