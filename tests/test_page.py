"""Reports replace reports, and nothing else."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from teamlora_export.errors import ExportError
from teamlora_export.page import refuse_foreign_report


def test_a_file_that_is_no_report_of_ours_is_left_alone(tmp_path):
    page = jinja2.PackageLoader("teamlora_export", ".").get_source(jinja2.Environment(), "page.html.j2")[0]
    for ours in (page, '{\n  "tool": "teamlora-export 0.1.0",\n  "bundle": "out"'):
        (tmp_path / "report").write_text(ours)
        refuse_foreign_report(tmp_path / "report")
    refuse_foreign_report(tmp_path / "new")
    (tmp_path / "thesis.html").write_text(
        "<!doctype html><title>Mine</title>" + " " * 600 + "made with teamlora-export"
    )
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("thesis.html", "link.html", "folder"):
        with pytest.raises(ExportError, match=f"{name}: exists and is not a report"):
            refuse_foreign_report(Path(tmp_path / name))
