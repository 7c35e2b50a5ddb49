"""Layers that look alike and are not: what differs by depth, by index, by a list, a buffer or a size is exported right or
traced whole."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from teamlora_export.adapter import write_adapter
from teamlora_export.export import export_onnx
from teamlora_export.graph.build import build_graph
from teamlora_export.graph.trace import traceable
from teamlora_export.graph.record import NotLayered
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.progress import Reporter
from teamlora_export.validate.run import validate_bundle

DEPTH = 6
TABLE = [0.5, 0.5, 0.5, 0.5, 2.0, 0.5]


class OddConfig(LlamaConfig):
    """A Llama whose layers are scaled by something: `oddity` says by what."""

    model_type = "odd_llama"
    oddity: str = "none"
    table: list | None = None
    by_name: dict | None = None


class OddLayer(LlamaDecoderLayer):
    def __init__(self, config: OddConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config, self.layer_idx = config, layer_idx
        self.depth_scale = math.sqrt(config.num_hidden_layers / 36)
        self.index_scale = 1 / (1 + layer_idx // 4)
        self.scales = list(TABLE)
        self.named = {"attention": {"scale": TABLE[layer_idx]}}
        self.register_buffer("scale", torch.tensor(TABLE[layer_idx]), persistent=False)
        self.closure = lambda x: x * TABLE[layer_idx]

    def forward(self, hidden_states, **kwargs):  # type: ignore[no-untyped-def]
        hidden = super().forward(hidden_states, **kwargs)
        return SCALES[self.config.oddity](self, hidden)


SCALES = {
    "none": lambda layer, x: x,
    "depth when made": lambda layer, x: x * layer.depth_scale,
    "depth when run": lambda layer, x: x / layer.config.num_hidden_layers,
    "index when made": lambda layer, x: x * layer.index_scale,
    "index when run": lambda layer, x: x * (1 / (2 + layer.layer_idx)),
    "last layer": lambda layer, x: x * (0.5 if layer.layer_idx == layer.config.num_hidden_layers - 1 else 1.5),
    "list of the module": lambda layer, x: x * layer.scales[layer.layer_idx],
    "list of the configuration": lambda layer, x: x * layer.config.table[layer.layer_idx],
    "longer list of the configuration": lambda layer, x: x * layer.config.table[layer.layer_idx + 1],
    "dict of the configuration": lambda layer, x: x * layer.config.by_name[str(layer.layer_idx)],
    "dict of the module": lambda layer, x: x * layer.named["attention"]["scale"],
    "buffer": lambda layer, x: x * layer.scale,
    "closure": lambda layer, x: layer.closure(x),
    "size": lambda layer, x: x / min(x.shape[1], 20 if layer.layer_idx < 4 else 40),
}
# What the deep model decides when it is made stays right in the shallow one.
STAMPED = {"none", "depth when made", "depth when run"}


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(OddLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory):  # type: ignore[no-untyped-def]
    AutoConfig.register(OddConfig.model_type, OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)

    def make(oddity: str) -> BaseModel:
        torch.manual_seed(0)
        table = TABLE if oddity == "list of the configuration" else [1.0, *TABLE]
        config = OddConfig(
            vocab_size=96,
            hidden_size=16,
            num_hidden_layers=DEPTH,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=64,
            pad_token_id=0,
            oddity=oddity,
            table=table,
            by_name={str(index): scale for index, scale in enumerate(TABLE)},
        )
        folder = tmp_path_factory.mktemp("odd")
        OddForCausalLM(config).save_pretrained(folder)
        return open_base(str(folder), "text-generation")

    return make
