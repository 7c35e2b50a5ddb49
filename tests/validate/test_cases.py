"""The inputs of a validation fit every model that there is, or the validation says why not."""

from __future__ import annotations

import pytest
import transformers

from teamlora_export.errors import ExportError
from teamlora_export.validate.cases import make_cases

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


def test_a_model_without_a_vocabulary_is_one_sentence():
    with pytest.raises(ExportError, match="vocab_size is -1, so no tokens can be drawn"):
        make_cases(transformers.XLNetConfig(vocab_size=-1), "feature-extraction")
