"""An adapter on graphs of onnxruntime-genai's own builder, in its own generator, against PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
from conftest import random_adapter, save_tokenizer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "deploy"))
from triton_server import Server

from teamlora_export.adapter import align_with_base, read_adapter, write_adapter
from teamlora_export.attach.run import attach
from teamlora_export.bundle import Bundle
from teamlora_export.cli import app
from teamlora_export.deploy.genai import deploy_genai
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.errors import ExportError
from teamlora_export.inspect import inspect_path
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.progress import Reporter
from teamlora_export.validate.held_by_products import holding_weights
from teamlora_export.validate.run import validate_bundle
from teamlora_export.validate.verdict import Thresholds

# Random weights have nothing that survives being quantised.
LENIENT = Thresholds(perplexity=10.0, agreement=0.0)
PROMPT = [1, 17, 200, 44, 9, 300, 21]
COUNT = 12


def small(kind: type[PretrainedConfig], **others: int) -> PretrainedConfig:
    """Two layers whose heads GroupQueryAttention takes."""
    return kind(
        vocab_size=384,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        pad_token_id=0,
        **others,
    )


def save_base(folder: Path, kind: type[PreTrainedModel], config: PretrainedConfig, targets: Sequence[str]) -> None:
    """A base with random weights and a tokenizer, and an adapter on its `targets`."""
    torch.manual_seed(5)
    kind(config).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    write_adapter(random_adapter(open_base(str(folder / "base")), targets), folder / "adapter")


def build_with_genai(folder: Path, out: str, *options: str) -> None:
    """The base in `folder` as onnxruntime-genai's builder exports it."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", "base", "-o", out, "-e", "cpu"]
    done = subprocess.run([*command, "-c", "cache", *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny Llama, an adapter on all of it, and its graphs in fp32 and int4."""
    folder = tmp_path_factory.mktemp("genai")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    save_base(folder, LlamaForCausalLM, small(LlamaConfig, hidden_size=32), targets)
    for precision in ("fp32", "int4"):
        # Its default lets products read 8 bits of x; the test of the graph has to see past that.
        build_with_genai(folder, f"genai-{precision}", "-p", precision, "--extra_options", "accuracy_level=1")
    return folder


@pytest.fixture(scope="module")
def base(made) -> BaseModel:
    return open_base(str(made / "base"))


@pytest.fixture(scope="module", params=["fp32", "int4"])
def bundle(request, made) -> Bundle:
    return attach(made / f"genai-{request.param}", made / "adapter", made / f"attached-{request.param}")


def generate(folder: Path, prompt: list[int], count: int) -> tuple[np.ndarray, list[int]]:
    """Logits of the prompt, and greedy tokens after it, in onnxruntime-genai."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(prompt) + count
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens([prompt])
    logits = np.array(generator.get_output("logits"))[0]
    while not generator.is_done():
        generator.generate_next_token()
    return logits, [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def test_its_own_generator_gives_what_pytorch_does(bundle, base, made):
    adapter = align_with_base(read_adapter(made / "adapter"), base.signature)
    (reference,) = holding_weights(bundle, base, adapter, [torch.float64], None, Reporter(quiet=True))
    feeds = {"input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64)}
    expected = reference.run(feeds)["logits"][0]
    logits, tokens = generate(bundle.folder, PROMPT, COUNT)
    np.testing.assert_allclose(logits, expected[-len(logits) :], atol=2e-6)
    assert tokens[0] == expected[-1].argmax()
    assert tokens == Model(bundle.folder).generate([PROMPT], COUNT)[0]
    bare, _ = generate(Path(bundle.manifest.attached["source"]).parent, PROMPT, COUNT)
    assert np.abs(bare - logits).max() > 1e-2


def test_it_stays_a_folder_of_genais(bundle, made):
    source = Path(bundle.manifest.attached["source"]).parent
    for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (bundle.folder / name).read_bytes() == (source / name).read_bytes()
    assert bundle.data.read_bytes() == (source / "model.onnx.data").read_bytes()
    # Names and places agree, and q, k and v of one product share a node.
    assert {tuple(found) for found in bundle.manifest.attached["projections"].values()} == {("name", "place")}
    assert bundle.manifest.op["nodes"] == 2 * 5
    before, after = (onnx.load(each / "model.onnx", load_external_data=False) for each in (source, bundle.folder))
    kept = {node.name: node.SerializeToString() for node in after.graph.node}
    changed = [node for node in before.graph.node if kept[node.name] != node.SerializeToString()]
    assert {node.op_type for node in changed} <= {"MatMul", "MatMulNBits"}
    assert len(changed) == 2 * 5


def test_it_is_valid_alone_and_against_its_base(bundle, made):
    alone = validate_bundle(bundle)
    assert alone.passed
    assert len(alone.modules) == 14
    is_quantised = bundle.folder.name.endswith("int4")
    whole = validate_bundle(bundle, base_source=str(made / "base"), thresholds=LENIENT if is_quantised else None)
    assert whole.passed
    assert (whole.quality is not None) == is_quantised
    assert {judgement.name for judgement in whole.cases[0].judgements} >= {"logits", "present.1.key"}


def test_rows_of_different_lengths_are_each_what_they_are_alone(bundle):
    assert not bundle.manifest.tokens.padded
    model = Model(bundle.folder)
    told: list[tuple[int, int]] = []
    both = model.generate([PROMPT, PROMPT[:3]], COUNT, lambda row, token: told.append((row, token)))
    assert both == [model.generate([prompt], COUNT)[0] for prompt in (PROMPT, PROMPT[:3])]
    assert both == [[token for row, token in told if row == each] for each in range(2)]


def test_it_deploys_to_genai_with_its_own_configuration(bundle, tmp_path):
    folder = deploy_genai(bundle, tmp_path / "deployed")
    config = json.loads((folder / "genai_config.json").read_text())
    assert config == json.loads((bundle.folder / "genai_config.json").read_text())
    assert generate(folder, PROMPT, COUNT)[1] == generate(bundle.folder, PROMPT, COUNT)[1]


def test_triton_batches_it_continuously(bundle, tmp_path):
    out = deploy_triton(bundle, tmp_path / "triton", TritonOptions(name="attached", batch=3))
    server, prompts = Server(out / "models"), [PROMPT, PROMPT[:3], PROMPT[1:4], PROMPT[:5]]

    def ask(prompt: list[int]) -> list[int]:
        given = {"input_ids": np.array([prompt]), "max_tokens": np.array([[COUNT]], np.int32)}
        (answer,) = server.stream("attached_text", given)
        return answer["token_ids"][0].tolist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, prompts)) == [Model(bundle.folder).generate([each], COUNT)[0] for each in prompts]
    server.models["attached_text"].unload()


def test_triton_steps_it_with_its_cache_as_state(bundle, tmp_path):
    server = Server(deploy_triton(bundle, tmp_path / "triton", TritonOptions(name="attached", text=False)) / "models")
    # A state starts as one row that the mask hides, and that the graph does not count.
    step, mask, found = list(PROMPT), [0] + [1] * len(PROMPT), []
    for turn in range(COUNT):
        given = {"input_ids": np.array([step]), "attention_mask": np.array([mask])}
        (answer,) = server.infer_together("attached", [(given, 1, turn == 0, turn == COUNT - 1)])
        found.append(int(answer["logits"][0, -1].argmax()))
        step, mask = found[-1:], [*mask, 1]
    assert found == Model(bundle.folder).generate([PROMPT], COUNT)[0]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory) -> Bundle:
    """A tiny Gemma 2, whose every other layer has a cache with room for its window of eight alone."""
    folder = tmp_path_factory.mktemp("windowed")
    # The builder rounds the root of a width, which embeddings are multiplied by: 64 has a whole one.
    config = small(Gemma2Config, hidden_size=64, sliding_window=8, query_pre_attn_scalar=16)
    save_base(folder, Gemma2ForCausalLM, config, ("q_proj", "down_proj"))
    build_with_genai(folder, "genai", "-p", "fp32")
    return attach(folder / "genai", folder / "adapter", folder / "out", base_source=str(folder / "base"))


def test_caches_of_a_window_grow_in_what_is_deployed_for_our_own_programs(windowed, tmp_path):
    """Past the window, which the prompt nearly fills."""
    _, expected = generate(windowed.folder, PROMPT, COUNT)
    assert len(set(expected)) > 2
    assert generate(deploy_genai(windowed, tmp_path / "genai"), PROMPT, COUNT)[1] == expected
    deployed = Model(deploy_python(windowed, tmp_path / "python"))
    assert deployed.generate([PROMPT, PROMPT[:3]], COUNT)[0] == expected
    server = Server(deploy_triton(windowed, tmp_path / "triton", TritonOptions(name="attached", batch=2)) / "models")
    given = {"input_ids": np.array([PROMPT]), "max_tokens": np.array([[COUNT]], np.int32)}
    (answer,) = server.stream("attached_text", given)
    assert answer["token_ids"][0].tolist() == expected
    server.models["attached_text"].unload()
    assert validate_bundle(windowed).passed
    result = CliRunner().invoke(app, ["generate", str(windowed.folder), "a"])
    assert isinstance(result.exception, ExportError)
    assert "teamlora-export deploy python" in str(result.exception)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_renamed_graph_is_found_by_place_alone(precision, made, tmp_path):
    model = onnx.load(made / f"genai-{precision}" / "model.onnx", load_external_data=False)
    rename(model)
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "model.onnx.data").write_bytes(
        (made / f"genai-{precision}" / "model.onnx.data").read_bytes()
    )
    onnx.save(model, tmp_path / "renamed" / "model.onnx")
    bundle = attach(tmp_path / "renamed", made / "adapter", tmp_path / "out", base_source=str(made / "base"))
    found = {tuple(kinds) for kinds in bundle.manifest.attached["projections"].values()}
    assert found == {("place", "weights")}
    assert validate_bundle(bundle).passed
    # In a layer that is another, nothing is attached: activation(gate) + up is not what `down` reads.
    products = [node for node in model.graph.node if node.op_type == "Mul"]
    products[1].op_type = "Add"
    onnx.save(model, tmp_path / "renamed" / "model.onnx")
    with pytest.raises(ExportError, match="down_proj: is missing"):
        attach(tmp_path / "renamed", made / "adapter", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def rename(model: onnx.ModelProto) -> None:
    """Give every node, weight and value a name that says nothing."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output)} | {""}
    names: dict[str, str] = {}

    def new(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"value_{len(names)}")

    for index, node in enumerate(model.graph.node):
        node.name = f"node_{index}"
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
    for named in (*model.graph.initializer, *model.graph.value_info):
        named.name = new(named.name)


def test_inspect_tells_what_is_in_a_graph(made):
    fields = inspect_path(made / "genai-int4").fields
    assert fields["products"]["MatMulNBits, 4 bits, blocks of 32, float"] == 2 * 5 + 1
    assert fields["modules"]["q+k+v"] == "layers 0 - 1 (name and place)"
    assert fields["obstacles"] == []
