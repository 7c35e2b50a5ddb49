"""A bundle is either whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from teamlora_export.bundle import MANIFEST_NAME, read_bundle, staged
from teamlora_export.errors import ExportError


def fill(folder: Path, text: str) -> None:
    (folder / MANIFEST_NAME).write_text(text)


def stage_and_raise(out: Path, error: type[BaseException]) -> None:
    with staged(out) as folder:
        fill(folder, "second")
        raise error


def test_what_was_staged_appears_whole_and_replaces_the_old(tmp_path):
    out = tmp_path / "out"
    for text in ("first", "second"):
        with staged(out) as folder:
            fill(folder, text)
    assert (out / MANIFEST_NAME).read_text() == "second"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_bundle_and_no_debris(error, tmp_path):
    out = tmp_path / "out"
    with staged(out) as folder:
        fill(folder, "first")
    with pytest.raises(error):
        stage_and_raise(out, error)
    assert (out / MANIFEST_NAME).read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_debris_of_a_killed_export_is_removed_and_its_old_bundle_restored(tmp_path):
    dead = 2**22 + 1  # beyond Linux's largest process number
    partial, old = tmp_path / f".out.{dead}.partial", tmp_path / f".out.{dead}.old"
    partial.mkdir()
    old.mkdir()
    fill(old, "old")
    with pytest.raises(RuntimeError), staged(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / MANIFEST_NAME).read_text() == "old"
    assert not partial.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ExportError, match="is not a bundle; it is left as it is"), staged(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"


def test_a_newer_or_damaged_manifest_is_refused(tmp_path, make_bundle):
    folder = Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "bundle"))
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    fill(folder, json.dumps({**fields, "format_version": 99}))
    with pytest.raises(ExportError, match="format version 99"):
        read_bundle(folder)
    fill(folder, "{}")
    with pytest.raises(ExportError, match="cannot be read"):
        read_bundle(folder)
