"""What PyTorch computes with is read by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from conftest import random_adapter

from teamlora_export.errors import ExportError
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


def test_the_lowest_number_of_float64_is_one_where_code_names_no_type(tmp_path):
    """As XGLM masks its scores."""
    config = transformers.XGLMConfig(vocab_size=96, d_model=32, num_layers=1, attention_heads=4, ffn_dim=48)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    base = open_base(str(tmp_path))
    adapter = random_adapter(base, ("fc1",))
    numbers = np.arange(12).reshape(2, 6)
    feeds = {"input_ids": numbers, "attention_mask": np.ones_like(numbers), "position_ids": numbers % 6}
    wide, narrow = (TorchRunner(base, adapter, dtype).run(feeds) for dtype in (torch.float64, torch.float32))
    for name, value in wide.items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(narrow[name], value, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_compute_is_one_sentence(make_base):
    base = make_base("llama")
    runner = TorchRunner(base, random_adapter(base, ("q_proj",)), torch.float64)
    numbers = np.full((1, 3), 384)
    with pytest.raises(ExportError, match="PyTorch cannot run it in float64"):
        runner.run({"input_ids": numbers, "attention_mask": np.ones_like(numbers)})
