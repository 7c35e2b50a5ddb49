"""The commands of a bundle's shelf of adapters, `adapters`: parse, call, print. No logic lives here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teamlora_export.cli_output import (
    THIS_FOLDER,
    AdapterOption,
    AnyBaseOption,
    BundleArgument,
    Description,
    JsonOption,
    given_path,
    show,
    show_description,
)
from teamlora_export.errors import ExportError

if TYPE_CHECKING:
    from teamlora_export.bundle import Bundle

adapters_app = typer.Typer(
    help="List, add, remove and replace the adapters of a bundle that has a shelf of them.", no_args_is_help=True
)

ShelfArgument = Annotated[Path, typer.Argument(parser=given_path, metavar="BUNDLE", help="Folder of the bundle.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the adapter.")]


def adapters_given(given: Sequence[str], is_shelf: bool) -> Path | dict[str, Path]:
    """What `--adapter` says: one folder, or several by name. A folder without a name lends its own.

    Args:
        is_shelf: also a single one has a name.

    Raises:
        ExportError: two have one name, or a folder's cannot be one.
    """
    from teamlora_export.manifest import SHELVED_NAME

    named: dict[str, Path] = {}
    one = len(given) == 1 and not is_shelf
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or given_path(text).exists():
            path = given_path(text)
            if one:
                return path
            name = path.resolve().name
            if not re.fullmatch(SHELVED_NAME, name):
                raise ExportError(f"--adapter {text}: {name!r:.80} cannot name an adapter. Give NAME=FOLDER.")
        else:
            path = given_path(folder)
        if name in named:
            raise ExportError(f"--adapter: two are called {name}. Give NAME=FOLDER.")
        named[name] = path
    return named


def names_given(given: Sequence[str]) -> tuple[str, ...]:
    """Names of several options, or several with commas in one."""
    return tuple(name.strip() for one in given for name in one.split(","))


def adapters_moved(given: Sequence[str]) -> Path | dict[str, Path] | None:
    """Where `--adapter` says that adapters are now: one folder, or several by name; None: where they were."""
    if not given:
        return None
    named = [text.partition("=") for text in given]
    if all(equals and not given_path(text).exists() for text, (_, equals, _) in zip(given, named, strict=True)):
        return {name: given_path(folder) for name, _, folder in named}
    if len(given) > 1:
        raise ExportError("--adapter: give one folder, or NAME=FOLDER for each that moved.")
    return given_path(given[0])


@adapters_app.command("list")
def list_adapters(bundle: BundleArgument = THIS_FOLDER, json: JsonOption = None) -> None:
    """Say which adapters a bundle has on its shelf."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.shelf import require_shelf, slot_megabytes

    opened = read_bundle(bundle)
    shelf = require_shelf(opened)
    rows = tuple(
        (name, f"{a['origin']['family']}, r={a['origin']['r']}, {a['origin']['num_experts']} experts, {a['file']}")
        for name, a in shelf["adapters"].items()
    )
    title = f"{opened.folder}: adapters {len(rows)}, slots {shelf['slots']} of {slot_megabytes(opened.manifest)} each"
    show_description(Description(title, rows, {"bundle": opened.folder, **shelf}), json)


@adapters_app.command("add")
def add(
    bundle: ShelfArgument,
    name: NameArgument,
    adapter: AdapterOption,
    any_base: AnyBaseOption = False,
    json: JsonOption = None,
) -> None:
    """Put an adapter on a bundle's shelf."""
    from teamlora_export.shelf import add_adapter

    made = add_adapter(bundle, name, adapter, any_base=any_base)
    _show_edited(made, f"{name} is added", json)


@adapters_app.command("replace")
def replace(
    bundle: ShelfArgument,
    name: NameArgument,
    adapter: AdapterOption,
    any_base: AnyBaseOption = False,
    json: JsonOption = None,
) -> None:
    """Put an adapter in the place of the one of its name."""
    from teamlora_export.shelf import replace_adapter

    made = replace_adapter(bundle, name, adapter, any_base=any_base)
    _show_edited(made, f"{name} is replaced", json)


@adapters_app.command("remove")
def remove(bundle: ShelfArgument, name: NameArgument, json: JsonOption = None) -> None:
    """Take an adapter off a bundle's shelf."""
    from teamlora_export.shelf import remove_adapter

    made = remove_adapter(bundle, name)
    _show_edited(made, f"{name} is removed", json)


@adapters_app.command("publish")
def publish(
    bundle: ShelfArgument,
    deployment: Annotated[
        Path,
        typer.Argument(parser=given_path, metavar="DEPLOYMENT", help="What `deploy python`, `cpp` or `triton` wrote."),
    ],
    json: JsonOption = None,
) -> None:
    """Make the adapters of a deployment those of its bundle, also while it serves."""
    from teamlora_export.bundle import read_bundle
    from teamlora_export.deploy.publish import publish_shelf

    names = publish_shelf(read_bundle(bundle), deployment)
    show(f"{deployment}: {', '.join(names) or 'no adapter'}", {"deployment": deployment, "adapters": names}, json)


def _show_edited(bundle: Bundle, what: str, json: Path | None) -> None:
    show(f"{bundle.folder}: {what}", {"bundle": bundle.folder, "shelf": bundle.manifest.shelf}, json)
