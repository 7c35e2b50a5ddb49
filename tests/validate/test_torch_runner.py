"""What PyTorch computes with is read by name."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from conftest import random_adapter

from teamlora_export.model.base import open_base
from teamlora_export.validate.torch_runner import TorchRunner


def test_a_buffer_that_the_checkpoint_holds_is_read_and_rounded_as_a_parameter_is(tmp_path):
    config = transformers.EsmConfig(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        position_embedding_type="rotary",
        pad_token_id=1,
        mask_token_id=2,
    )
    model = transformers.AutoModel.from_config(config)
    buffer = "rotary_embeddings.inv_freq"
    # Not what the model's code would compute.
    model.get_buffer(buffer).mul_(1.5)
    model.save_pretrained(tmp_path)
    base = open_base(str(tmp_path), "feature-extraction")
    runner = TorchRunner(base, random_adapter(base, ("query",)), torch.float64)
    held = model.get_buffer(buffer)
    assert np.array_equal(runner.read(buffer), held.numpy())
    runner.round_weights(torch.bfloat16, ())
    assert np.array_equal(runner.read(buffer), held.bfloat16().double().numpy())
