"""What the commands have in common: their arguments that name files, and how a result is shown.

A result is text for people: a table on a terminal, a line for each fact elsewhere, so that a script can read it. With
`--json FILE` the same result is also written there as one JSON object; `--json -` prints it in place of the text.
"""

from __future__ import annotations

import errno
import io
import json as json_format
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from teamlora_export import __version__
from teamlora_export.errors import ExportError, printable
from teamlora_export.files import read_json
from teamlora_export.staging import write_aside

STANDARD_OUTPUT = Path("-")
# The field by which a result is known again, so that nothing else is ever replaced.
SIGNATURE = "written_by"


def given_path(value: str | Path) -> Path:
    """A path of the command line: never empty, which would be the current folder; `~` is the user's home."""
    if value == "":
        raise typer.BadParameter("is empty")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


NativeLibraryOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|auto", help="Run the op by this native library; auto: by the one that is carried or built here."
    ),
]
# `--library auto`: the one that the package carries or that was built here. A file of that name is ./auto.
AUTO = "auto"


def native_library(given: str | None) -> Path | None:
    """The library of the op for ONNX Runtime that `--library` names, looked at before a model is opened: ONNX Runtime's
    own words name neither cause nor way out.

    Raises:
        ExportError: it is none of ours or does not fit; or there is none to be found or built.
    """
    if given is None:
        return None
    if not given:
        raise ExportError("--library is empty. Give a file or auto, or leave the option out.")
    from teamlora_export.engine.onnxruntime_library import find_library
    from teamlora_export.progress import Reporter

    return find_library(None if given == AUTO else given_path(given), Reporter()).path


BundleArgument = Annotated[
    Path, typer.Argument(parser=given_path, metavar="BUNDLE", help="Folder of the bundle. Default: this folder.")
]
THIS_FOLDER = Path(".")
AdapterOption = Annotated[
    Path, typer.Option("--adapter", "-a", parser=given_path, metavar="FOLDER", help="Folder of the trained adapter.")
]
AnyBaseOption = Annotated[
    bool, typer.Option("--any-base", help="Take an adapter also where it names another base than this one.")
]
AdapterDtypeOption = Annotated[
    str | None,
    typer.Option(help="fp16 or bf16: the adapter's matrices in 16 bits, beside a graph in fp32. Default: the graph's."),
]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", parser=given_path, metavar="FOLDER", help="Folder to write.")
]


def result_path(value: str | Path) -> Path:
    """Where a result may be written; looked at with the arguments, before a command does anything.

    Raises:
        ExportError: there is a file of that name that `write_json` did not write.
    """
    path = given_path(value)
    refuse_foreign_result(path)
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", parser=result_path, metavar="FILE", help="Write the result as JSON there; - prints it instead."
    ),
]


@dataclass(frozen=True)
class Description:
    """What something is: rows for people, fields for programs."""

    title: str
    rows: tuple[tuple[str, str], ...]
    fields: Mapping[str, Any]

    def lines(self) -> Iterator[str]:
        """One line for each line of a row's value, which is never broken."""
        yield self.title
        for name, value in self.rows:
            yield from (f"{name}: {line}" for line in value.splitlines() or [""])

    def table(self) -> Table:
        table = Table(title=Text(printable(self.title)), title_justify="left", show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self.rows:
            table.add_row(Text(printable(name)), Text(printable(value, None)))
        return table


def show(text: str, fields: Mapping[str, Any], json: Path | None = None) -> None:
    """Show a result: `text`, and `fields` where `--json` asks for them."""
    if json != STANDARD_OUTPUT:
        say(text)
    write_json(fields, json)


def show_description(described: Description, json: Path | None = None) -> None:
    """Show a description: a table on a terminal, lines elsewhere, and its fields where `--json` asks for them."""
    if json != STANDARD_OUTPUT and sys.stdout.isatty():
        with writing_to_standard_output():
            wide_console().print(described.table())
    elif json != STANDARD_OUTPUT:
        for line in described.lines():
            say(line)
    write_json(described.fields, json)


def say(text: str) -> None:
    """Print a line of a result, whatever is in it."""
    with writing_to_standard_output():
        print(printable(text, None), flush=True)


def say_answer(text: str) -> None:
    """Print a piece of a model's answer as it is: its tabs, and what joins an emoji, belong to it."""
    with writing_to_standard_output():
        print(text, end="", flush=True)


def write_json(fields: Mapping[str, Any], path: Path | None) -> None:
    """Write `fields` to `path`, print them (`-`), or do nothing (None).

    Raises:
        ExportError: there is a file of that name that this function did not write, or it cannot be written.
    """
    if path is None:
        return
    signed = {SIGNATURE: f"teamlora-export {__version__}", **_plain(fields)}
    text = json_format.dumps(signed, indent=2, allow_nan=False) + "\n"
    if path == STANDARD_OUTPUT:
        with writing_to_standard_output():
            print(text, end="", flush=True)
        return
    refuse_foreign_result(path)
    write_aside(path, text)


def refuse_foreign_result(path: Path, writer: str | None = None) -> None:
    """Refuse to replace a file that is no earlier result.

    Args:
        writer: whose result; None: any.

    Raises:
        ExportError: there is such a file.
    """
    if path == STANDARD_OUTPUT or not os.path.lexists(path):
        return
    advice = "Give another file to --json."
    try:
        fields = read_json(path, advice)
    except FileNotFoundError:
        raise ExportError(f"{path}: is a link to nothing. {advice}") from None
    if SIGNATURE not in fields or (writer is not None and fields[SIGNATURE] != writer):
        result = "result" if writer is None else f"result of {writer}"
        raise ExportError(f"{path}: is no earlier {result}, and is left as it is. {advice}")


@contextmanager
def writing_to_standard_output() -> Iterator[None]:
    """A reader that went away, or a full disk, is a sentence and no traceback at the end of the program."""
    try:
        yield
    except OSError as error:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise ExportError(f"The result cannot be printed ({error.strerror}).") from None


def wide_console() -> Console:
    """A terminal's own width; wide enough for our tables elsewhere."""
    return _ResultConsole(width=None if sys.stdout.isatty() else 132)


class _ResultConsole(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def prepare_standard_files() -> None:
    """Standard files that the caller closed lead nowhere, and letters that a terminal lacks are escaped.

    Without this, the next file that is opened would get a closed one's number, and whatever prints would write to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _plain(value: Any) -> Any:
    """Of types that JSON has; numbers that it lacks are strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value
