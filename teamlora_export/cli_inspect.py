"""The command `inspect`: parse, call, print. No logic lives here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teamlora_export.cli_output import THIS_FOLDER, JsonOption, given_path, show_description


def inspect_command(
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
