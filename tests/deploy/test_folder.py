"""What every deployment is: complete, without traces of its origin, and nobody's work lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnxruntime as ort
import pytest
from conftest import list_again

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
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
    folder = deploy_python(list_again(bundle.folder), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()) == fields
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"kept": "é"}
    for file in folder.iterdir():
        assert b"somebody" not in file.read_bytes(), file
    files = json.loads((folder / "deploy.json").read_text())["files"]
    assert files["config.json"] == sha256_of(folder / "config.json")
    path.write_text("[1")
    with pytest.raises(ExportError, match=r"config\.json: cannot be read"):
        deploy_python(list_again(bundle.folder), tmp_path / "other")


def test_what_somebody_changed_or_added_is_not_replaced(bundle, tmp_path):
    project = deploy_cpp(bundle, tmp_path / "project")
    for name in ("notes.txt", ".git/config", "build/CMakeCache.txt", "model/server.py", "__pycache__/other.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("mine")
        with pytest.raises(ExportError, match=f"{name}: is not a file that teamlora-export wrote"):
            deploy_cpp(bundle, project)
        assert (project / name).read_text() == "mine"
        (project / name).unlink()
        if name.count("/") and not name.startswith("model"):
            (project / name).parent.rmdir()
    (project / "main.cpp").write_text("// mine")
    with pytest.raises(ExportError, match=r"main\.cpp: is not as it was written"):
        deploy_cpp(bundle, project)
    assert (project / "main.cpp").read_text() == "// mine"


def test_what_python_compiled_of_a_program_is_replaced_with_it(bundle, tmp_path):
    out = deploy_python(bundle, tmp_path / "out")
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "runner.cpython-311.pyc").write_bytes(b"compiled")
    deploy_python(bundle, out)
    assert not (out / "__pycache__").exists()


@pytest.mark.parametrize("fields", [{"files": []}, {"program": {"runner.py": 3}}, {"task": 1}, {"op": "x"}])
def test_what_is_no_description_of_ours_makes_no_deployment(fields, bundle, tmp_path):
    out = deploy_python(bundle, tmp_path / "out")
    described = json.loads((out / "deploy.json").read_text())
    (out / "deploy.json").write_text(json.dumps({**described, **fields}))
    with pytest.raises(ExportError, match=r"is not a deployment.*left as it is.*deploy\.json: Expected"):
        deploy_python(bundle, out)
    assert (out / "runner.py").is_file()


def test_no_link_leads_out_of_the_bundle_into_a_deployment(bundle, tmp_path):
    (tmp_path / "config.json").write_bytes((bundle.folder / "config.json").read_bytes())
    (bundle.folder / "config.json").unlink()
    (bundle.folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ExportError, match=r"config\.json: is a link to a file outside"):
        deploy_python(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_the_graph_gives_the_logits_of_the_last_token_and_the_same_text(architecture, make_bundle, tmp_path):
    """Tied embeddings, logits that are capped, and a norm with a bias."""
    source = make_bundle(architecture)
    every = deploy_python(source, tmp_path / "all", logits="all")
    last = deploy_python(source, tmp_path / "last")
    described = [json.loads((folder / "deploy.json").read_text()) for folder in (every, last)]
    assert described[0]["files"]["model.onnx"] == source.manifest.sha256["model.onnx"]
    assert described[1]["files"]["model.onnx"] == sha256_of(last / "model.onnx")
    assert described[0]["files"]["model.onnx.data"] == described[1]["files"]["model.onnx.data"]
    (logits, *presents), (cut, *others) = (fields["outputs"] for fields in described)
    assert (logits["shape"], cut["shape"]) == (["batch_size", "sequence_length", 384], ["batch_size", 1, 384])
    assert presents == others
    session = ort.InferenceSession(last / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape == cut["shape"]
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    assert Model(last).generate(prompts, 20) == Model(every).generate(prompts, 20)
    with pytest.raises(ExportError, match="--logits some: unknown"):
        deploy_python(source, tmp_path / "other", logits="some")


def test_the_bundle_itself_is_never_replaced(bundle, tmp_path):
    (tmp_path / "link").symlink_to(bundle.folder)
    for out in (bundle.folder, tmp_path / "link", tmp_path, bundle.folder / ".." / "bundle"):
        with pytest.raises(ExportError, match="which is read"):
            deploy_python(bundle, out)
    assert list_again(bundle.folder).manifest.sha256 == bundle.manifest.sha256


def test_the_model_of_a_deployment_may_be_replaced(bundle, tmp_path):
    out = deploy_python(bundle, tmp_path / "out")
    (out / "model.onnx.data").write_bytes(b"damaged")
    deploy_python(bundle, out)
    assert sha256_of(out / "model.onnx.data") == bundle.manifest.sha256["model.onnx.data"]
