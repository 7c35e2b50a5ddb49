"""An adapter on graphs that TorchScript's exporter makes, as they are and quantised to products of integers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from conftest import random_adapter, save_tokenizer
from faults import Fault, judged, plant, weight
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers.cache_utils import DynamicCache

from teamlora_export.adapter import write_adapter
from teamlora_export.attach.run import attach
from teamlora_export.deploy.runner import Model
from teamlora_export.graph import op
from teamlora_export.graph.read import read_graph
from teamlora_export.model.base import open_base
from teamlora_export.validate.run import validate_bundle
from teamlora_export.validate.verdict import Thresholds

# Random weights have nothing that survives being quantised.
LENIENT = Thresholds(perplexity=10.0, agreement=0.0)
SIZES = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
MODELS = {
    # Conv1D, whose weights lie the other way round; one of them is square.
    "gpt2": (
        transformers.GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=2),
        ("c_attn", "c_proj", "c_fc"),
    ),
    # Biases behind every product, and places that are looked up.
    "opt": (
        transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    ),
    # q, k and v packed in one product, gate and up in another.
    "phi3": (
        transformers.Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, bos_token_id=1, eos_token_id=2),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
}


class _Flat(torch.nn.Module):
    """A model with its cache as single tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.more = () if model.config.model_type == "opt" else ("position_ids",)

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        kept = {name: value for name, value in given.items() if name in ("input_ids", "attention_mask", *self.more)}
        made = self.model(**kept, past_key_values=cache, use_cache=True)
        return made.logits, *(value for layer in made.past_key_values.layers for value in (layer.keys, layer.values))


@dataclass(frozen=True)
class Made:
    """Folders of a base, an adapter on it, and its graph: as it was exported, and quantised."""

    base: Path
    adapter: Path
    graphs: dict[str, Path]


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory) -> Made:
    config, targets = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    write_adapter(random_adapter(open_base(str(folder / "base")), targets), folder / "adapter")
    graphs = {"float": folder / "float", "integers": folder / "integers"}
    for graph in graphs.values():
        graph.mkdir()
    export(model, graphs["float"] / "model.onnx")
    quantize_dynamic(graphs["float"] / "model.onnx", graphs["integers"] / "model.onnx", weight_type=QuantType.QInt8)
    return Made(folder / "base", folder / "adapter", graphs)


def export(model: torch.nn.Module, path: Path) -> None:
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = config.hidden_size // config.num_attention_heads
    past = [torch.randn(2, heads, 3, size) for _ in range(2 * config.num_hidden_layers)]
    caches = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{each}" for each in caches)]
    outputs = ["logits", *(f"present.{each}" for each in caches)]
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in ("input_ids", "position_ids", "logits")}
    axes["attention_mask"] = {0: "batch_size", 1: "total_sequence_length"}
    axes |= {f"past_key_values.{each}": {0: "batch_size", 2: "past_sequence_length"} for each in caches}
    axes |= {f"present.{each}": {0: "batch_size", 2: "total_sequence_length"} for each in caches}
    ids, mask = torch.randint(3, 300, (2, 4)), torch.ones(2, 7, dtype=torch.long)
    given = (ids, mask, torch.arange(3, 7).repeat(2, 1), *past)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Flat(model), given, path, input_names=inputs, output_names=outputs, dynamic_axes=axes, dynamo=False
        )


@pytest.mark.parametrize("form", ["float", "integers"])
def test_it_is_right_as_a_whole_and_told_what_it_lost(made, form, tmp_path):
    bundle = attach(made.graphs[form], made.adapter, tmp_path / "out", base_source=str(made.base))
    assert {"weights"} <= set.intersection(*map(set, bundle.manifest.attached["projections"].values()))
    verdict = validate_bundle(bundle, thresholds=LENIENT if form == "integers" else None)
    assert verdict.exact, verdict.departures[:3]
    assert (verdict.quality is not None) == (form == "integers")
    if verdict.quality is not None:
        assert 0 < verdict.quality.quantised.kl < verdict.quality.base.kl
    assert len(Model(bundle.folder).generate([[5, 9, 200]], 4)[0]) == 4


def test_faults_of_an_attached_graph_are_found_where_they_are(made, tmp_path):
    bundle = attach(made.graphs["integers"], made.adapter, tmp_path / "out", base_source=str(made.base))
    nodes = [node for node in read_graph(bundle).graph if op.is_op(node)]
    # The first of the second layer, in which everything is as wide as in the first.
    second = nodes[len(nodes) // 2]
    up = str(nodes[0].inputs[4].name)
    exchanged = weight(up, lambda array: np.roll(array, len(array) // 2, axis=0))
    faults = {
        "experts exchanged": (nodes[0], exchanged),
        "reads another value": (second, lambda model: reread(model, second.name, nodes[0].inputs[0].name)),
        "passed by": (nodes[1], lambda model: pass_by(model, nodes[1].name)),
    }
    for name, (node, edit) in faults.items():
        planted = plant(bundle, tmp_path / name, {name: Fault(edit, "")})
        verdict = judged(planted, base_source=str(made.base) if name == "passed by" else None, quality=False)
        assert verdict.departure is not None
        assert verdict.departure.node == node.name, (name, verdict.departures[:3])


def reread(model: ir.Model, name: str, source: str) -> None:
    """An op's node reads another value than the product behind it."""
    value = next(value for node in model.graph for value in node.outputs if value.name == source)
    model.graph.node(name).replace_input_with(0, value)


def pass_by(model: ir.Model, name: str) -> None:
    """What read the sum of a product and its experts reads the product alone."""
    node = model.graph.node(name)
    for reader, index in list(node.outputs[0].uses()):
        reader.replace_input_with(index, node.inputs[1])
