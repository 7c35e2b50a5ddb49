"""The reader of foreign files: each thing that is no readable file is one sentence that names it."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from teamlora_export.disk import FULL, saving
from teamlora_export.errors import ExportError
from teamlora_export.files import copy_file, link_or_copy, open_file, read_json, read_record, sha256_of

ADVICE = "Copy it again."


@dataclass(frozen=True)
class Record:
    name: str
    sizes: tuple[int, ...]
    format_version: int = 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list"),
        (b"null", "holds a value"),
        (b'{"a": "\xff"}', "is not text in UTF-8"),
        (rb'{"a": "\ud800"}', "is not text in UTF-8"),
        (b'{"a":' * 100_000, "cannot be read as JSON"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"a": 1, "a": 2}', "names 'a' twice"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=reason) as refusal:
        read_json(path, ADVICE)
    assert str(path) in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_a_fifo_a_folder_and_a_sparse_giant_are_refused_before_they_are_read(tmp_path: Path) -> None:
    fifo, giant = tmp_path / "fifo.json", tmp_path / "giant.json"
    os.mkfifo(fifo)
    with giant.open("wb") as file:
        file.truncate(3 << 30)
    for path, reason in (
        (fifo, "not a regular file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (giant, "bytes; such a file has"),
    ):
        with pytest.raises(ExportError, match=reason):
            read_json(path, ADVICE)
    with pytest.raises(ExportError, match="not a regular file"):
        sha256_of(fifo)


def test_a_link_may_not_lead_out_of_the_folder_but_into_the_hubs_blobs(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(ExportError, match="link to a file outside"):
        open_file(folder / "config.json", folder)
    blob = tmp_path / "hub" / "blobs" / "abc"
    snapshot = tmp_path / "hub" / "snapshots" / "1"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to(blob)
    assert read_json(snapshot / "config.json", ADVICE, snapshot) == {}


def test_a_link_to_itself_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("config.json")
    for folder in (tmp_path, None):
        with pytest.raises(ExportError, match=r"config\.json: "):
            open_file(tmp_path / "config.json", folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"sizes": [1], "format_version": 1}', "missing required field `name`"),
        ('{"name": 3, "sizes": [1], "format_version": 1}', "Expected `str`, got `int`"),
        ('{"name": "a", "sizes": [1.5], "format_version": 1}', "Expected `int`, got `float`"),
        ('{"name": "a", "sizes": ["1"], "format_version": 1}', "Expected `int`, got `str`"),
        ('{"name": "a", "sizes": [1], "format_version": 2}', "format version 2, this tool reads up to 1"),
        ('{"name": "a", "sizes": [1], "format_version": "1"}', "format_version is '1'"),
        ('{"name": "a", "sizes": [1]}', "format_version is None"),
    ],
)
def test_a_record_with_a_field_of_another_type_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(ExportError, match=reason):
        read_record(path, Record, ADVICE, newest=1)


def test_a_record_is_read_into_its_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('{"name": "a", "sizes": [1, 2], "format_version": 1, "more": 3}')
    assert read_record(path, Record, ADVICE, newest=1) == Record("a", (1, 2))
    path.write_text(r'{"name": "\ud83d\ude00", "sizes": []}')
    assert read_record(path, Record, ADVICE) == Record("😀", ())


def test_a_copy_holds_the_bytes_and_obeys_the_same_rules(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_bytes(b"secret")
    (folder / "a").write_bytes(b"content" * 1000)
    (folder / "inner").symlink_to("a")
    (folder / "outer").symlink_to(secret)
    copy_file(folder / "inner", tmp_path / "copy", folder)
    assert (tmp_path / "copy").read_bytes() == b"content" * 1000
    assert not (tmp_path / "copy").is_symlink()
    for name, largest, reason in (("outer", None, "link to a file outside"), ("a", 100, "such a file has 100")):
        with pytest.raises(ExportError, match=reason):
            copy_file(folder / name, tmp_path / "other", folder, largest)
    assert not (tmp_path / "other").exists()


def test_another_name_of_a_linked_file_is_one_of_the_file_itself(tmp_path: Path) -> None:
    """As the weights of a bundle in the hub's cache, which are below another folder than their link."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "hash").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "model.onnx.data"
    link.symlink_to("../blobs/hash")
    target = tmp_path / "snapshot" / "deeper" / "model.onnx.data"
    target.parent.mkdir()
    link_or_copy(link, target)
    assert not target.is_symlink()
    assert target.samefile(tmp_path / "blobs" / "hash")


def test_a_full_disk_is_the_systems_error_where_safetensors_writes(tmp_path: Path) -> None:
    """`disk.saving` can go when safetensors says `OSError` itself. A limit on files is what a test can fill."""
    tensors, limits = {"a": np.zeros(100_000, np.float32)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as found, saving(Path("there")):
            save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(SafetensorError):
            save_file(tensors, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found.value.errno in FULL and found.value.filename == "there"
    with pytest.raises(ValueError, match="another"), saving(Path("there")):
        raise ValueError("another")
