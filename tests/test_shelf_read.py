"""Shelves as somebody may hand them on: files and descriptions are read with care, and names stay in their folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from teamlora_export.bundle import read_bundle
from teamlora_export.deploy import model_folder
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.folder import Description, deployment
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.errors import ExportError
from teamlora_export.files import read_record

pytest_plugins = ["shelf_fixtures"]


def test_files_of_adapters_are_read_with_care(bundle):
    """They are data, and whatever is in them is a sentence."""
    file = bundle.folder / bundle.manifest.shelf["adapters"]["team"]["file"]
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")

    def with_header(fields: dict[str, object]) -> bytes:
        text = json.dumps(fields).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    other = {**header, first: {**header[first], "dtype": "F16"}}
    beyond = {**header, first: {**header[first], "data_offsets": [0, 1 << 40]}}
    negative = {**header, first: {**header[first], "shape": [-1, -1]}}
    less = {name: fields for name, fields in header.items() if name != first}
    more = {**header, "more": header[first]}
    for content in (
        *(b"", good[:5], good[: length // 2], (1 << 62).to_bytes(8, "little") + good[8:], b"\x80\x04K\x01."),
        *(with_header(fields) for fields in (other, beyond, negative, less, more, {first: 3})),
        (8).to_bytes(8, "little") + b"[1, 2, 3" + good,
    ):
        file.write_bytes(content)
        model = Model(bundle.folder, check=False)
        with pytest.raises(ModelError, match=r"is no file of an adapter|for .* expected|more than the model takes"):
            model.generate([[5]], 1, adapters=["team"])


def test_a_manifest_that_lists_a_file_elsewhere_is_refused(bundle):
    fields = json.loads((bundle.folder / "manifest.json").read_text())
    for file in ("../team.safetensors", "/etc/passwd", "adapters/../x.0000000000000000.safetensors"):
        fields["shelf"]["adapters"]["team"]["file"] = file
        (bundle.folder / "manifest.json").write_text(json.dumps(fields))
        with pytest.raises(ExportError):
            read_bundle(bundle.folder)
        with pytest.raises(ModelError, match="'team' is not as it should be"):
            Model(bundle.folder)


def change_description(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Of a bundle or a deployment, as somebody may hand it on."""
    fields = json.loads(path.read_text())
    change(fields["shelf"]["adapters"], fields.get("sha256") or fields["files"])
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["../../../pwned", "team\n", "a/b", ".", "", 'x", "y'])
def test_names_that_no_adapter_can_have_are_refused_when_a_description_is_read(name, bundle, tmp_path):
    """Names become those of files, and words of programs."""
    out = deploy_python(bundle, tmp_path / "out")

    def rename(adapters, _):  # type: ignore[no-untyped-def]
        adapters[name] = adapters.pop("team")

    for path in (bundle.folder / "manifest.json", out / "deploy.json"):
        change_description(path, rename)
    with pytest.raises(ExportError, match=r"manifest.json: .*shelf"):
        read_bundle(bundle.folder)
    with pytest.raises(ExportError, match=r"deploy.json: .*shelf"):
        read_record(out / "deploy.json", Description, "Again.", newest=2)


def test_a_deployment_writes_into_its_folder_alone(bundle, tmp_path):
    with deployment(bundle, tmp_path / "out", "python", shelf="own") as made:
        for name in ("../out.txt", "adapters/../../out.txt", str(tmp_path / "out.txt")):
            with pytest.raises(ExportError, match="is not in the folder that is written"):
                made.add(name, "words")
    assert not list(tmp_path.rglob("out.txt"))


def test_an_adapter_with_more_than_one_hash_is_refused_when_a_description_is_read(bundle, tmp_path):
    """By a wrong one, one tenant's name could stand for what is another's in memory."""
    out = deploy_python(bundle, tmp_path / "out")

    def as_another(adapters, listed):  # type: ignore[no-untyped-def]
        adapters["lora"]["sha256"] = listed[adapters["lora"]["file"]] = adapters["team"]["sha256"]

    def listed_as_another(adapters, listed):  # type: ignore[no-untyped-def]
        listed[adapters["lora"]["file"]] = adapters["team"]["sha256"]

    for change in (listed_as_another, as_another):
        for path in (bundle.folder / "manifest.json", out / "deploy.json"):
            change_description(path, change)
            with pytest.raises(ModelError, match="'lora' has more than one hash"):
                Model(path.parent)
        with pytest.raises(ExportError, match="adapter lora has more than one hash"):
            read_bundle(bundle.folder)


def test_an_older_program_is_told_that_it_is_older(make_shelf, monkeypatch):
    """Before it runs the base without an adapter."""
    monkeypatch.setattr(model_folder, "_DESCRIPTIONS", {"deploy.json": ("files", 1), "manifest.json": ("sha256", 2)})
    with pytest.raises(ModelError, match="was written by a newer teamlora-export"):
        Model(make_shelf().folder)
