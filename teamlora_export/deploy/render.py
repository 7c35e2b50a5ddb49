"""Fills in the texts of `templates/`."""

from __future__ import annotations

import jinja2

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.folder import TEMPLATES


def render(template: str, bundle: Bundle, **values: object) -> str:
    """A template of this package, filled in for `bundle`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template(template).render(manifest=bundle.manifest, **values)
