"""Layers that look alike and are not: what differs by depth, index, list, buffer or size is exported right or
traced whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import random_adapter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, EsmcConfig, LlamaConfig, LlamaForCausalLM
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from teamlora_export.adapter import write_adapter
from teamlora_export.export import export_onnx
from teamlora_export.graph.build import shallow_model
from teamlora_export.graph.record import NotLayered
from teamlora_export.graph.trace import traceable
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.model.inject import inject

DEPTH = 6
TABLE = [0.5, 0.5, 0.5, 0.5, 2.0, 0.5]


class OddConfig(LlamaConfig):
    """A Llama whose layers are scaled by something: `oddity` says by what."""

    model_type = "odd_llama"
    oddity: str = "nothing"
    table: list | None = None
    by_name: dict | None = None


class OddScale(nn.Module):
    """A buffer that no checkpoint holds."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.value = scale
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


class OddLayer(LlamaDecoderLayer):
    def __init__(self, config: OddConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.config, self.layer_idx = config, layer_idx
        self.depth_scale = math.sqrt(config.num_hidden_layers / 36)
        # No more than two numbers may differ.
        self.index_scale = 1 - 1e-9 * (layer_idx // 4)
        self.scales = list(TABLE)
        self.named = {"attention": {"scale": TABLE[layer_idx]}}
        self.buffered = OddScale(TABLE[layer_idx])
        self.closure = lambda x: x * TABLE[layer_idx]
        # Whatever place it takes in a shallow model.
        self.is_first, self.is_last = layer_idx == 0, layer_idx == DEPTH - 1
        self.last = None

    def forward(self, hidden_states, **kwargs):  # type: ignore[no-untyped-def]
        self.last = super().forward(hidden_states, **kwargs)
        return SCALES[self.config.oddity](self, self.last)


def _skip(layer: OddLayer, x: torch.Tensor) -> torch.Tensor:
    """The first layer's result comes back in the last."""
    first = layer.config.__dict__.setdefault("_first", [x])
    if layer.is_first:
        first[0] = x
    return x + first[0] if layer.is_last else x


SCALES = {
    "nothing": lambda layer, x: x,
    "depth when made": lambda layer, x: x * layer.depth_scale,
    "depth when run": lambda layer, x: x / layer.config.num_hidden_layers,
    "index when made": lambda layer, x: x * layer.index_scale,
    "index when run": lambda layer, x: x * (1 / (2 + layer.layer_idx)),
    "the last layer": lambda layer, x: x * (0.5 if layer.layer_idx == layer.config.num_hidden_layers - 1 else 1.5),
    "a list of the module": lambda layer, x: x * layer.scales[layer.layer_idx],
    "a list of the configuration": lambda layer, x: x * layer.config.table[layer.layer_idx],
    "a longer list": lambda layer, x: x * layer.config.table[layer.layer_idx + 1],
    "a dict of the configuration": lambda layer, x: x * layer.config.by_name[str(layer.layer_idx)],
    "a dict of the module": lambda layer, x: x * layer.named["attention"]["scale"],
    "a buffer": lambda layer, x: x * layer.buffered.scale,
    "a closure": lambda layer, x: layer.closure(x),
    "the number of layers, ahead of them": lambda layer, x: x,
    "the number of layers, after them": lambda layer, x: x,
    "a size": lambda layer, x: x / min(x.shape[1], 20 if layer.layer_idx < 4 else 40),
    "a skip": _skip,
}
# The kind of each layer where a shallow model is proven right; where it is not, every layer is traced.
ALIKE = (0, 0, 0, 0, 0, 0)
BY_TABLE = (0, 0, 0, 0, 1, 0)
KINDS = {
    "nothing": ALIKE,
    "depth when made": ALIKE,
    "depth when run": ALIKE,
    "index when made": (0, 0, 0, 0, 1, 1),
    "a list of the configuration": BY_TABLE,
    "a dict of the module": BY_TABLE,
    "a buffer": BY_TABLE,
    "a closure": BY_TABLE,
}


class OddModel(LlamaModel):
    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(OddLayer(config, index) for index in range(config.num_hidden_layers))
        for place, module in (("ahead of", self.embed_tokens), ("after", self.norm)):
            if config.oddity == f"the number of layers, {place} them":
                module.register_forward_hook(lambda _module, _inputs, x: x / len(self.layers))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OddScale):
            init.constant_(module.scale, module.value)


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.model = OddModel(config)
        self.post_init()


@pytest.fixture(scope="module")
def odd_base(tmp_path_factory):  # type: ignore[no-untyped-def]
    AutoConfig.register(OddConfig.model_type, OddConfig)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM)

    def make(oddity: str) -> BaseModel:
        torch.manual_seed(0)
        table = TABLE if oddity == "a list of the configuration" else [1.0, *TABLE]
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


@pytest.mark.parametrize("oddity", SCALES)
def test_layers_that_differ_by_anything_are_of_different_kinds_or_traced_whole(oddity, odd_base):
    base = odd_base(oddity)
    model = traceable(base, random_adapter(base, ("q_proj", "down_proj")), torch.float32)
    try:
        shallow = shallow_model(base, model)
    except NotLayered:
        shallow = None
    kinds = None
    if shallow is not None:
        seen = list(dict.fromkeys(shallow.plan.sources))
        kinds = tuple(seen.index(source) for source in shallow.plan.sources)
    assert kinds == KINDS.get(oddity)
    left = [value for module in model.modules() for value in (*vars(module).values(), *module._buffers.values())]
    assert not any(isinstance(value, FakeTensor) for value in left), "the runs left something behind"


# Of each way one: constants of the deep model kept, a kind of its own for one layer, every layer traced.
@pytest.mark.parametrize("oddity", ["depth when made", "a buffer", "a dict of the configuration"])
def test_odd_layers_are_exported_right(oddity, odd_base, tmp_path):
    assert worst_error(odd_base(oddity), ("q_proj", "down_proj"), "logits", tmp_path) < 1e-5


def test_the_residual_scale_of_esmc_is_that_of_its_depth(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4}
    AutoModel.from_config(EsmcConfig(**sizes)).save_pretrained(tmp_path / "base")
    base = open_base(str(tmp_path / "base"), "feature-extraction")
    assert worst_error(base, ("q_proj", "o_proj"), "last_hidden_state", tmp_path) < 1e-5
    assert "2 of 8 layers" in capsys.readouterr().err


def worst_error(base: BaseModel, targets: tuple[str, ...], output: str, folder: Path) -> float:
    """Of the exported float32 model against PyTorch in float64, relative to the largest value: rounding alone."""
    adapter = random_adapter(base, targets)
    write_adapter(adapter, folder / "adapter")
    bundle = export_onnx(base.name, folder / "adapter", folder / "out", task=base.task, retrace=True)
    ids = np.random.default_rng(0).integers(1, 60, (2, 7))
    model = base.load(torch.float64)
    inject(model, adapter)
    with torch.no_grad():
        expected = getattr(model(input_ids=torch.from_numpy(ids)), output).numpy()
    session = ort.InferenceSession(bundle.model, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(7)[None].repeat(2, 0)}
    for port in session.get_inputs():
        empty = [2, *port.shape[1:2], 0, *port.shape[3:]]
        feeds.setdefault(port.name, np.zeros(empty, np.float32) if len(empty) == 4 else ids)
    feeds = {port.name: feeds[port.name] for port in session.get_inputs()}
    return float(np.abs(session.run([output], feeds)[0] - expected).max() / np.abs(expected).max())
