"""What every deployment is: complete, without traces of its origin, and nobody's work lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.python import deploy_python
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of


@pytest.fixture
def bundle(make_bundle, tmp_path) -> Bundle:
    source = make_bundle("llama")
    return Bundle(Path(shutil.copytree(source.folder, tmp_path / "bundle")), source.manifest)


def test_configurations_lose_the_path_and_the_token_that_their_model_was_loaded_with(bundle, tmp_path):
    path = bundle.folder / "config.json"
    fields = json.loads(path.read_text())
    traces = {"_name_or_path": "/home/somebody/models/llama", "use_auth_token": "hf_secret"}
    path.write_text(json.dumps({**fields, **traces}))
    (bundle.folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/somebody", "kept": "é"}))
    folder = deploy_python(bundle, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()) == fields
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"kept": "é"}
    for file in folder.iterdir():
        assert b"somebody" not in file.read_bytes(), file
    files = json.loads((folder / "deploy.json").read_text())["files"]
    assert files["config.json"] == sha256_of(folder / "config.json")
    path.write_text("[1")
    with pytest.raises(ExportError, match=r"config\.json: cannot be read"):
        deploy_python(bundle, tmp_path / "other")


def test_a_program_that_somebody_changed_is_not_replaced(bundle, tmp_path):
    project = deploy_cpp(bundle, tmp_path / "project")
    (project / "build").mkdir()
    (project / "build" / "CMakeCache.txt").touch()
    assert deploy_cpp(bundle, project) == project
    assert not (project / "build").exists()
    (project / "main.cpp").write_text("// mine")
    with pytest.raises(ExportError, match=r"main\.cpp: is not as it was written"):
        deploy_cpp(bundle, project)
    assert (project / "main.cpp").read_text() == "// mine"
    other = deploy_python(bundle, tmp_path / "other")
    (other / "server.py").touch()
    with pytest.raises(ExportError, match=r"server\.py: is not as it was written"):
        deploy_python(bundle, other)
    (other / "deploy.json").write_text("{}")
    with pytest.raises(ExportError, match=r"deploy\.json: cannot be read"):
        deploy_python(bundle, other)


def test_the_model_of_a_deployment_may_be_replaced(bundle, tmp_path):
    out = deploy_python(bundle, tmp_path / "out")
    (out / "model.onnx.data").write_bytes(b"damaged")
    deploy_python(bundle, out)
    assert sha256_of(out / "model.onnx.data") == bundle.manifest.sha256["model.onnx.data"]
