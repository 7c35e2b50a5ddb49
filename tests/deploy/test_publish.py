"""`adapters publish`: what comes into a deployment, what is refused, and what happens at the same time."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from cpp_programs import as_engine
from shelves import write_family

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.deploy import publish
from teamlora_export.deploy.genai import deploy_genai
from teamlora_export.deploy.model_folder import check_files, read_settings
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.deploy.python import deploy_python
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter

pytest_plugins = ["shelf_fixtures"]


@pytest.fixture
def out(bundle, tmp_path) -> Path:
    return deploy_python(bundle, tmp_path / "out")


def whole(out: Path, bundle: Bundle) -> bool:
    """Whether a deployment has the adapters of a bundle, and every file is what it should be."""
    settings, shelf = read_settings(out), read_bundle(bundle.folder).manifest.shelf["adapters"]
    check_files(out, settings.hashes)
    return settings.shelf == {name: (a["file"], a["sha256"]) for name, a in shelf.items()}


def test_an_adapter_that_is_damaged_in_the_bundle_is_not_published(bundle, out, shelf_adapters):
    before = (out / "deploy.json").read_bytes()
    added = add_adapter(bundle.folder, "late", shelf_adapters["moe"]).manifest.shelf["adapters"]["late"]
    file = bundle.folder / added["file"]
    file.write_bytes(file.read_bytes()[:-100] + b"?" * 100)
    with pytest.raises(ExportError, match=r"adapters/late.*: is damaged \(its SHA-256 differs\)"):
        publish_shelf(bundle, out)
    assert (out / "deploy.json").read_bytes() == before
    assert not (out / added["file"]).exists()


def test_what_is_damaged_or_missing_in_the_deployment_comes_anew(bundle, out):
    files = [out / adapter["file"] for adapter in bundle.manifest.shelf["adapters"].values()]
    files[0].write_bytes(b"half")
    files[1].unlink()
    publish_shelf(bundle, out)
    assert whole(out, bundle)


def test_nothing_is_written_or_removed_behind_a_link(bundle, out, shelf_adapters, tmp_path):
    """Two bundles, or two deployments, whose adapters are in one place."""
    shared = tmp_path / "shared"
    refused = pytest.raises(ExportError, match="adapters: is a link")
    for place, how, change in (
        (bundle.folder, refused, lambda: add_adapter(bundle.folder, "late", shelf_adapters["moe"])),
        (bundle.folder, nullcontext(), lambda: remove_adapter(bundle.folder, "team")),
        (out, refused, lambda: publish_shelf(bundle, out)),
    ):
        shutil.rmtree(shared, ignore_errors=True)
        shutil.copytree(place / "adapters", shared)
        others = shared / f"other.{'0' * 16}.safetensors"
        others.write_bytes(b"of another bundle")
        before, kept = sorted(shared.iterdir()), tmp_path / "kept"
        (place / "adapters").rename(kept)
        (place / "adapters").symlink_to(shared)
        with how:
            change()
        assert sorted(shared.iterdir()) == before
        (place / "adapters").unlink()
        kept.rename(place / "adapters")


def test_adapters_for_slots_of_another_shape_are_refused(make_base, tmp_path):
    """Of one base, with as many numbers: the weights beside the graphs are the same file."""
    base, bundles = make_base("llama"), []
    for k in (4, 2):
        folder = write_family(tmp_path / f"adapter{k}", base, "teamlora", ["gate_proj", "up_proj"], 8, k)
        bundles.append(export_onnx(base.name, {"x": folder}, tmp_path / f"bundle{k}", slots=3))
    one, other = (bundle.manifest.sha256 for bundle in bundles)
    assert one["model.onnx.data"] == other["model.onnx.data"]
    out = deploy_python(bundles[0], tmp_path / "out")
    assert publish_shelf(bundles[0], out) == ["x"]
    before = (out / "deploy.json").read_bytes()
    with pytest.raises(ExportError, match="was not made of"):
        publish_shelf(bundles[1], out)
    assert (out / "deploy.json").read_bytes() == before


@pytest.mark.parametrize("form", ["graph", "engine"])
def test_of_two_at_once_the_later_one_waits_and_has_what_the_bundle_has_then(
    form, bundle, out, shelf_adapters, monkeypatch
):
    stale = bundle
    if form == "engine":
        as_engine(out)
    write, seen = publish.write_aside, threading.Event()
    second = threading.Thread(target=publish_shelf, args=(stale, out))

    def write_while_another_publishes(path: Path, *given: object, **named: object) -> None:
        if path.name == "deploy.json" and not seen.is_set():
            seen.set()
            second.start()
            second.join(1)
            assert second.is_alive(), "it does not wait"
        write(path, *given, **named)

    replace_adapter(bundle.folder, "moe", shelf_adapters["lora"])
    monkeypatch.setattr(publish, "write_aside", write_while_another_publishes)
    publish_shelf(stale, out)
    second.join()
    assert seen.is_set()
    assert whole(out, bundle)


def test_a_deployment_of_onnxruntime_genai_is_refused_by_what_it_is(make_shelf, tmp_path):
    out = deploy_genai(make_shelf(), tmp_path / "out")
    with pytest.raises(ExportError, match="onnxruntime-genai's own form"):
        publish_shelf(make_shelf(), out)
    assert "shelf" in json.loads((out / "deploy.json").read_text())
