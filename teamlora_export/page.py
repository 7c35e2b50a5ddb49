"""Reports in files: pages of HTML that stand alone, and plots. One replaces another, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from teamlora_export.errors import ExportError
from teamlora_export.files import open_file
from teamlora_export.staging import real_path, write_aside

MARK = "teamlora-export"
# How a report of each kind begins, and what is near its start: a page's generator, and the software in a PNG. The name
# alone is in graphs and manifests, too.
_KINDS = (
    (b"<!doctype html>", f'<meta name="generator" content="{MARK}">'.encode()),
    (b"\x89PNG\r\n\x1a\n", b"Software\0" + MARK.encode()),
)
_HEAD = 500


def render_page(template: str, **values: object) -> str:
    """A page from a template of the package, which extends `page.html.j2`; no script, no network."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("teamlora_export", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**values)


def write_report(path: Path, content: str | bytes) -> None:
    """Write a report, in place of an earlier one.

    Raises:
        ExportError: there is something else of that name, or it cannot be written.
    """
    refuse_foreign_report(path)
    write_aside(path, content)


def refuse_foreign_report(path: Path) -> None:
    """Refuse to replace a file that is no report of ours, and a place where none can be: before work is done for it.

    Raises:
        ExportError: it is something else, or there can be no file of that name.
    """
    if str(path) == "-":
        raise ExportError("-: a report is a file, and is not printed. Give it a name.")
    parent = next(folder for folder in real_path(path).parents if os.path.lexists(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"{path}: nothing can be written in {parent}. Choose another name.")
    if os.path.lexists(path) and not (path.is_file() and _is_report(path)):
        raise ExportError(f"{path}: exists and is not a report that teamlora-export wrote. Choose another name.")


def refuse_same_file(*places: Path | None) -> None:
    """Refuse to write two results to one file, of which the first would be lost.

    Raises:
        ExportError: with the name of that file.
    """
    given = [real_path(place) for place in places if place is not None]
    for place in given:
        if given.count(place) > 1:
            raise ExportError(f"{place}: is to take two results. Give each a file of its own.")


def _is_report(path: Path) -> bool:
    with open_file(path) as file:
        head = file.read(_HEAD)
    return any(head.startswith(start) and mark in head for start, mark in _KINDS)
