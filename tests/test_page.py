"""Reports replace reports, and nothing else."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest

from teamlora_export.errors import ExportError
from teamlora_export.page import refuse_foreign_report, refuse_same_file


def test_a_file_that_is_no_report_of_ours_is_left_alone(tmp_path):
    page = jinja2.PackageLoader("teamlora_export", ".").get_source(jinja2.Environment(), "page.html.j2")[0]
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17) + b"\0\0\0\x18tEXtSoftware\0teamlora-export"
    for ours in (page.encode(), png):
        (tmp_path / "report").write_bytes(ours)
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


def test_a_report_that_cannot_be_written_is_refused_before_work_is_done_for_it(tmp_path):
    (tmp_path / "file").touch()
    refuse_foreign_report(tmp_path / "new" / "deeper" / "report.html")
    for path, message in (
        (Path("-"), "-: a report is a file"),
        (tmp_path / "file" / "report.html", "nothing can be written in .*file"),
    ):
        with pytest.raises(ExportError, match=message):
            refuse_foreign_report(path)


def test_the_files_of_a_bundle_and_what_only_names_the_tool_are_no_reports(make_bundle, tmp_path):
    files = [path for path in make_bundle("llama").folder.iterdir() if path.is_file()]
    for name, content in (
        ("readme.md", "# How I use teamlora-export\n"),
        ("note.html", "<!doctype html> teamlora-export"),
    ):
        (tmp_path / name).write_text(content)
        files.append(tmp_path / name)
    assert {"model.onnx", "manifest.json", "readme.md"} <= {path.name for path in files}
    for path in files:
        with pytest.raises(ExportError, match=f"{path.name}: exists and is not a report"):
            refuse_foreign_report(path)


def test_two_results_have_two_files(tmp_path):
    refuse_same_file(tmp_path / "a.html", None, tmp_path / "a.png", None)
    (tmp_path / "link").symlink_to("a.html")
    for other in (tmp_path / "a.html", tmp_path / "below" / ".." / "a.html", tmp_path / "link"):
        with pytest.raises(ExportError, match="is to take two results"):
            refuse_same_file(tmp_path / "a.html", None, other)
