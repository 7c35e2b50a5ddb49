"""The inputs of a validation fit every model that there is, or the validation says why not."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import transformers

from teamlora_export.errors import ExportError
from teamlora_export.ports import Port
from teamlora_export.validate import sources
from teamlora_export.validate.cases import first_step, make_cases, next_step

TEXT = {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 5}


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**TEXT),
        transformers.LlamaConfig(**{**TEXT, "pad_token_id": -1}),
        transformers.LlamaConfig(**{**TEXT, "pad_token_id": None}),
        transformers.Gemma3Config(text_config=TEXT),
        transformers.XLNetConfig(vocab_size=96),
    ],
)
@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_ids_are_tokens_of_the_text_model(config, task):
    for case in make_cases(config, task):
        assert case.ids.min() >= 0
        assert case.ids.max() < 96


@pytest.mark.parametrize(("window", "past"), [(6, 11), (48, 53), (49, None), (None, None)])
def test_a_case_begins_past_the_window_where_the_model_has_room_for_one(window, past):
    cases = make_cases(transformers.MistralConfig(**TEXT, sliding_window=window), "text-generation")
    assert [case.past for case in cases if case.past] == ([past] if past else [])
    port = Port("past_key_values.0.key", "float", ("batch_size", 2, "window_6", 4))
    step = first_step([port], cases[-1])
    assert step.feeds[port.name].shape == (1, 2, past or 0, 4)
    assert step.mask.shape == (1, past + 7 if past else 1)
    following = next_step([port], step, {}, np.zeros((1, 1, 96)))
    assert following.mask.shape[1] == step.mask.shape[1] + 1


def test_a_model_without_a_vocabulary_is_one_sentence():
    with pytest.raises(ExportError, match="vocab_size is -1, so no tokens can be drawn"):
        make_cases(transformers.XLNetConfig(vocab_size=-1), "feature-extraction")


@pytest.mark.parametrize(("window", "fits"), [(64, True), (4096, False)])
def test_the_cache_of_a_wide_window_counts_as_memory(window, fits, monkeypatch):
    """Of Phi-3-mini's sizes, 1.6 GB in float32, with no weights to speak of."""
    config = transformers.MistralConfig(vocab_size=96, sliding_window=window, max_position_embeddings=8192)
    base = SimpleNamespace(config=config, task="text-generation", signature=SimpleNamespace(parameters={}))
    names = (f"past_key_values.{layer}.{kind}" for layer in range(32) for kind in ("key", "value"))
    inputs = [Port(name, "float", ("batch_size", 32, "past", 96)) for name in names]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 << 30))
    assert sources.fits(base, inputs) == fits
