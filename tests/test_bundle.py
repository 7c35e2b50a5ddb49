"""A bundle is whole, as its manifest lists it, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from teamlora_export.bundle import COMPANIONS, check_files, copy_companions, listed_files, read_bundle
from teamlora_export.errors import ExportError
from teamlora_export.manifest import MANIFEST_NAME

INPUT_IDS = {"name": "input_ids", "dtype": "int64", "shape": ["batch_size", "sequence_length"]}
FLAT_CACHE = {"name": "past_key_values.0.key", "dtype": "float", "shape": ["batch_size", 16]}


@pytest.fixture
def folder(tmp_path, make_bundle) -> Path:
    """A copy of the tiny Llama's bundle, to be changed."""
    return Path(shutil.copytree(make_bundle("llama").folder, tmp_path / "bundle"))


def edit(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_every_file_of_a_bundle_is_listed(folder):
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(read_bundle(folder).manifest.sha256) == there - {MANIFEST_NAME}
    assert {"model.onnx", "model.onnx.data", "config.json"} <= there


def test_each_listed_file_is_checked(folder):
    bundle = read_bundle(folder)
    for name in bundle.manifest.sha256:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        with pytest.raises(ExportError, match=rf"{name}: is not what was exported"):
            check_files(bundle)
        (folder / name).write_bytes(before)
    check_files(bundle)


def test_a_list_with_a_gap_is_refused_by_name(folder):
    listed = read_bundle(folder).manifest.sha256
    for name in ("model.onnx", "model.onnx.data", "config.json", "generation_config.json"):
        edit(folder, sha256={other: digest for other, digest in listed.items() if other != name})
        with pytest.raises(ExportError, match=f"does not list {name}"):
            read_bundle(folder)
    edit(folder, sha256={})
    with pytest.raises(ExportError, match=r"does not list model\.onnx"):
        read_bundle(folder)
    edit(folder, sha256=listed)
    (folder / "vocab.txt").write_text("{}")
    with pytest.raises(ExportError, match=r"does not list vocab\.txt"):
        read_bundle(folder)
    (folder / "vocab.txt").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json is missing"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/../../b"])
def test_a_list_that_leads_out_of_the_folder_is_refused(name, folder):
    edit(folder, sha256={**read_bundle(folder).manifest.sha256, name: "0" * 64})
    with pytest.raises(ExportError, match="which is not in its folder"):
        read_bundle(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": 1, "tokens": None, "recipes": None}, "format version 1, of an older tool"),
        ({"sha256": {"model.onnx": "abc"}}, "matching regex"),
        ({"sha256": []}, r"Expected `object`, got `array` - at `\$\.sha256`"),
        ({"base": {"source": 3, "model_type": "llama", "sha256": {}}}, r"Expected `str`, got `int` - at `\$\.base"),
        ({"adapter": {}}, r"missing required field `source` - at `\$\.adapter`"),
        ({"op": {"domain": "teamlora", "name": "x", "version": 1, "nodes": "x", "form": "function"}}, "got `str`"),
        ({"dtype": "fp64"}, "matching regex"),
        ({"task": "dancing"}, "matching regex"),
        ({"inputs": [{"name": "input_ids", "dtype": "int64", "shape": [1.5]}]}, "got `float`"),
        ({"inputs": []}, "has not the inputs and outputs"),
        ({"inputs": [{"name": "input_ids", "dtype": "float", "shape": [1, 2]}]}, "has not the inputs and outputs"),
        ({"outputs": [{"name": "logits", "dtype": "float", "shape": [1, 2, 3]}]}, "has not the inputs and outputs"),
        ({"outputs": []}, "has not the inputs and outputs"),
        ({"task": "feature-extraction"}, "has not the inputs and outputs of feature-extraction"),
        ({"inputs": [INPUT_IDS]}, "has not the inputs and outputs of text-generation"),
        ({"inputs": [INPUT_IDS, FLAT_CACHE]}, "has not the inputs and outputs of text-generation"),
        ({"validation": {"passed": "yes"}}, "Expected `bool`, got `str`"),
        ({"refit": {"weights": {"a": 1}}}, "Expected `str`, got `int`"),
    ],
)
def test_a_manifest_with_a_field_of_another_type_is_refused(fields, reason, folder):
    edit(folder, **fields)
    with pytest.raises(ExportError, match=reason) as refusal:
        read_bundle(folder)
    assert str(folder / MANIFEST_NAME) in str(refusal.value)


def test_what_is_no_manifest_of_ours_makes_no_bundle(tmp_path):
    (tmp_path / MANIFEST_NAME).write_text('{"short_name": "A web project", "start_url": "/"}')
    for read in (read_bundle, listed_files):
        with pytest.raises(ExportError, match="format_version is None"):
            read(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(ExportError, match="is not a bundle"):
        read_bundle(tmp_path)


def test_companions_are_copied_as_files_and_no_link_leads_out_of_the_base(tmp_path):
    base, out, secret = tmp_path / "base", tmp_path / "out", tmp_path / "secret.json"
    base.mkdir()
    out.mkdir()
    secret.write_text('{"mine": true}')
    (base / "tokenizer.json").write_text("{}")
    (base / "vocab.json").symlink_to("tokenizer.json")
    copy_companions(base, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"tokenizer.json": "{}", "vocab.json": "{}"}
    assert not any(path.is_symlink() for path in out.iterdir())
    for name in COMPANIONS:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(secret)
        with pytest.raises(ExportError, match="is a link to a file outside"):
            copy_companions(base, out)
        (base / name).unlink()
    os.mkfifo(base / "vocab.txt")
    with pytest.raises(ExportError, match="is not a regular file"):
        copy_companions(base, out)
    (base / "vocab.txt").unlink()
    with (base / "tokenizer.model").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ExportError, match="bytes; such a file has"):
        copy_companions(base, out)
