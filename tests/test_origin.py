"""The base that an adapter says it was trained on, and the one that it is put on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from shelves import SHELF, names, write_family
from typer.testing import CliRunner

from teamlora_export.adapter import AdapterConfig, AdapterSpec
from teamlora_export.bundle import read_bundle
from teamlora_export.cli import app
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.origin import model_name, require_base, require_one_base
from teamlora_export.progress import Reporter
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter

pytest_plugins = ["shelf_fixtures"]


def naming(folder: Path, base: str | None) -> Path:
    """The adapter in `folder`, as of one who trained it on `base`."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


def test_an_adapter_that_names_another_base_is_refused_and_taken_when_that_is_asked_for(
    bundle, make_base, tmp_path, capsys
):
    base = make_base("llama")
    folder = naming(write_family(tmp_path / "other", base, "lora", ["q_proj"], 4), "somebody/another-llama")
    words = rf"says that it was trained on somebody/another-llama; the base here is {base.source.origin}\. .*--any-base"
    ours = naming(write_family(tmp_path / "ours", base, "lora", ["q_proj"], 4), base.name)
    with pytest.raises(ExportError, match=words):
        export_onnx(base.name, {"ours": ours, "other": folder}, tmp_path / "out")
    with pytest.raises(ExportError, match=r"says that it was trained on \\x00a; the"):
        add_adapter(bundle.folder, "other", naming(folder, "\0a"))
    naming(folder, "somebody/another-llama")
    with pytest.raises(ExportError, match=words):
        add_adapter(bundle.folder, "other", folder)
    with pytest.raises(ExportError, match=words):
        replace_adapter(bundle.folder, "team", folder)
    assert not (tmp_path / "out").exists() and names(bundle.folder) == list(SHELF)
    given = ["adapters", "add", str(bundle.folder), "other", "-a", str(folder), "--any-base"]
    assert CliRunner().invoke(app, given).exit_code == 0
    # It was taken, and its base is no name of this one.
    with pytest.raises(ExportError, match=words):
        add_adapter(bundle.folder, "again", folder)
    assert "other" in names(bundle.folder) and "again" not in names(bundle.folder)
    add_adapter(bundle.folder, "same", naming(folder, base.name))
    capsys.readouterr()
    add_adapter(bundle.folder, "silent", naming(folder, None))
    assert "does not say which base it was trained on" in capsys.readouterr().err


def test_the_name_on_which_an_export_agrees_is_the_bases_also_when_nothing_on_the_shelf_says_it(
    make_base, shelf_adapters, tmp_path, capsys
):
    given = naming(shutil.copytree(shelf_adapters["team"], tmp_path / "team"), "them/known")
    out = export_onnx(make_base("llama").name, {"team": given}, tmp_path / "out").folder
    assert read_bundle(out).manifest.base["names"] == ["them/known"]
    remove_adapter(out, "team")
    capsys.readouterr()
    add_adapter(out, "team", given)
    assert not capsys.readouterr().err
    with pytest.raises(ExportError, match="trained on them/other"):
        replace_adapter(out, "team", naming(given, "them/other"))
    # The release before did not keep it.
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["base"]["names"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    replace_adapter(out, "team", given)
    assert "says that it was trained on them/other" in capsys.readouterr().err
    assert "names" not in read_bundle(out).manifest.base


def test_a_base_has_one_name_wherever_it_lies(tmp_path, monkeypatch):
    same = (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "smollm2-135m-instruct/",
        "./SmolLM2-135M-Instruct",
        "/data/models/SmolLM2-135M-Instruct//",
        "C:\\models\\SmolLM2-135M-Instruct",
        "/root/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12fd25f77366fa6b",
        "HuggingFaceTB/SmolLM2-135M-Instruct@main",
        "/srv/SmolLM2-135M-Instruct/snapshots/0123abcd",
    )
    assert {model_name(name) for name in same} == {"smollm2-135m-instruct"}
    for nothing in (
        *("", ".", "../", "/", "checkpoint-500", "/models/base", "base_model", "/srv/hf-model", "ckpt", "./pretrained"),
        *("/home/u/checkpoint-100", "out/checkpoint-100", "final_model", "/srv/" + 20 * "a7", "snapshots/0123abcd"),
    ):
        assert model_name(nothing) is None
    assert model_name("out/tuned/checkpoint-500") == "tuned/checkpoint-500"
    # A link has two names, and is one folder.
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)
    adapter = AdapterSpec("lora", AdapterConfig(8, 1.0, base_model_name_or_path="link"), {}, {}, "mine", "0" * 64)
    require_base(adapter, [str(tmp_path / "folder")], False, Reporter(quiet=True))


def test_adapters_that_agree_on_another_name_of_the_base_are_taken_and_those_that_do_not_are_not(capsys):
    """Whoever names both in one command knows better than a name."""

    def of(base: str | None) -> AdapterSpec:
        return AdapterSpec("lora", AdapterConfig(8, 1.0, base_model_name_or_path=base), {}, {}, "mine", "0" * 64)

    for agreed in ([of("them/llama")], [of("them/llama"), of("/data/llama")]):
        assert require_one_base(agreed, "/data/production", False, Reporter()) == [
            agreed[-1].config.base_model_name_or_path
        ]
        assert capsys.readouterr().err.count("says that it was trained on") == len(agreed)
    require_one_base([of("them/production"), of("/data/production")], "/data/production", False, Reporter())
    require_one_base([of(None)], "/data/production", False, Reporter())
    assert not capsys.readouterr().err
    with pytest.raises(ExportError, match="trained on them/llama; the base here is /data/production"):
        require_one_base([of("them/production"), of("them/llama")], "/data/production", False, Reporter())
    # A folder that is called as any other says nothing, and they contradict each other.
    two = [of("them/llama"), of("them/qwen")]
    with pytest.raises(ExportError, match="trained on different bases: mine on them/llama, mine on them/qwen"):
        require_one_base(two, "/data/model", False, Reporter())
    assert require_one_base(two, "/data/model", True, Reporter()) == []
    assert require_one_base([of("them/llama"), of(None)], "/data/model", False, Reporter()) == ["them/llama"]
