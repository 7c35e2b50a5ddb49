"""The inputs of a validation fit every model that there is, or the validation says why not."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from teamlora_export.bundle import Port
from teamlora_export.errors import ExportError
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
