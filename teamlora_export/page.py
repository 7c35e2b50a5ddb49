"""Reports in files: pages of HTML that stand alone, and plots. One replaces another, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import jinja2

from teamlora_export.errors import ExportError
from teamlora_export.files import open_file
from teamlora_export.staging import write_aside

# Near the start of every report: a page's generator, and the software in a PNG.
MARK = "teamlora-export"
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
    """Refuse to replace a file that is no report of ours.

    Raises:
        ExportError: it is something else.
    """
    if os.path.lexists(path) and not (path.is_file() and _is_report(path)):
        raise ExportError(f"{path}: exists and is not a report that teamlora-export wrote. Choose another name.")


def _is_report(path: Path) -> bool:
    with open_file(path) as file:
        return MARK.encode() in file.read(_HEAD)
