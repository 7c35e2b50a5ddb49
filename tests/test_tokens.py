"""What a model says of its tokens, from every form in which configurations say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from teamlora_export.errors import ExportError
from teamlora_export.tokens import OFFSET_POSITIONS, SETTLED_WINDOWS, Tokens, read_tokens

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def read(folder: Path, config: dict[str, object], task: str = "text-generation", **files: object) -> Tokens:
    """`files`: the others that `read_tokens` reads, by name without .json."""
    for name, fields in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    return read_tokens(folder, task)


def test_what_is_said_is_taken(tmp_path):
    assert read(tmp_path, _LLAMA) == Tokens(100, 3, 1, (2,), 64, None, False)
    generation = {"eos_token_id": [5, 6], "bos_token_id": None, "pad_token_id": 9}
    assert read(tmp_path, _LLAMA, generation_config=generation) == Tokens(100, 3, 1, (5, 6), 64, None, False)
    config = {**_LLAMA, "pad_token_id": None}
    assert read(tmp_path, config, generation_config=generation) == Tokens(100, 9, 1, (5, 6), 64, None, False)


@pytest.mark.parametrize(
    ("changes", "padding", "stops"),
    [
        ({"pad_token_id": None}, 2, (2,)),
        ({"pad_token_id": None, "eos_token_id": [7, 8]}, 7, (7, 8)),
        ({"pad_token_id": -1}, 2, (2,)),
        ({"pad_token_id": 100}, 2, (2,)),
        ({"pad_token_id": None, "eos_token_id": None}, 0, ()),
        ({"eos_token_id": [200]}, 3, ()),
        ({"eos_token_id": []}, 3, ()),
        ({"pad_token_id": 0}, 0, (2,)),
        ({"eos_token_id": 0}, 3, (0,)),
    ],
)
def test_null_ids_and_ids_that_do_not_exist_are_settled(tmp_path, changes, padding, stops):
    found = read(tmp_path, {**_LLAMA, **changes})
    assert (found.padding, found.stops) == (padding, stops)


def test_an_end_that_only_the_tokenizer_names_is_found(tmp_path):
    for number, stops in ((4, (4,)), (100, ())):
        tokenizer = {"added_tokens": [{"id": number, "content": "<end>"}]}
        for named in ("<end>", {"content": "<end>"}):
            files = {"tokenizer": tokenizer, "tokenizer_config": {"eos_token": named}}
            assert read(tmp_path, {**_LLAMA, "eos_token_id": None}, **files).stops == stops


def test_what_is_left_out_is_as_transformers_has_it(tmp_path):
    assert read(tmp_path, {"model_type": "gpt2"}).most == transformers.GPT2Config().n_positions
    bare = read(tmp_path, {"model_type": "roberta"}, "feature-extraction")
    assert (bare.padding, bare.most) == (1, transformers.RobertaConfig().max_position_embeddings - 2)
    assert read(tmp_path, {"model_type": "none-of-these", "vocab_size": 5}) == Tokens(5, 0, None, (), None, None, False)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "bert", "max_position_embeddings": 130, "pad_token_id": 0}, 130),
        ({"model_type": "roberta", "max_position_embeddings": 130, "pad_token_id": 1}, 128),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "mpt", "max_seq_len": 77}, 77),
        ({"model_type": "t5", "relative_attention_num_buckets": 32}, None),
        ({"model_type": "deberta-v2", "max_position_embeddings": -1}, None),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 99}}, 99),
    ],
)
def test_the_longest_input_is_counted_as_the_architecture_counts(tmp_path, config, most):
    assert read(tmp_path, config, "feature-extraction").most == most


def test_the_architectures_that_count_from_the_padding_on_are_those_of_transformers():
    """Of text alone: the others that have such a function read sound or images too, or a vocabulary of their own."""
    others = {
        *("altclip", "bridgetower", "clap", "evolla", "kosmos2", "kosmos2_5", "layoutlmv3", "lilt", "m2m_100"),
        *("nllb_moe", "pp_doclayout_v2", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "speecht5", "trocr"),
    }
    models = Path(transformers.__file__).parent / "models"
    found = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "create_position_ids_from_input_ids" in path.read_text()
    }
    assert found - others == {name.removesuffix("-text").replace("-", "_") for name in OFFSET_POSITIONS}


@pytest.mark.parametrize(
    ("files", "cut"),
    [
        ({"sentence_bert_config": {"max_seq_length": 32}, "tokenizer_config": {"model_max_length": 60}}, 32),
        ({"sentence_bert_config": {"max_seq_length": 512}}, 64),
        ({"sentence_bert_config": {"max_seq_length": None}, "tokenizer_config": {"model_max_length": 60}}, 60),
        ({"tokenizer_config": {"model_max_length": 10**30}}, 64),
        ({"tokenizer_config": {"model_max_length": 1e30}}, 64),
        ({"tokenizer_config": {"model_max_length": None}}, 64),
    ],
)
def test_sentences_are_cut_where_sentence_transformers_cuts_them(tmp_path, files, cut):
    assert read(tmp_path, _LLAMA, "sentence-embedding", **files).cut == cut
    assert read(tmp_path, _LLAMA, "feature-extraction", **files).cut is None


@pytest.mark.parametrize("limit", [10**30, 1e30, None])
def test_sentences_are_not_cut_where_nothing_has_a_limit(tmp_path, limit):
    config = {"model_type": "none-of-these", "vocab_size": 5}
    assert read(tmp_path, config, "sentence-embedding", tokenizer_config={"model_max_length": limit}).cut is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", "many"),
        ("vocab_size", 0),
        ("max_position_embeddings", 1.5),
        ("max_position_embeddings", 10**400),
        ("eos_token_id", "2"),
        ("eos_token_id", [1, "2"]),
        ("pad_token_id", True),
        ("pad_token_id", -7),
        ("bos_token_id", {}),
    ],
)
def test_what_is_no_number_is_one_sentence(tmp_path, name, value):
    with pytest.raises(ExportError, match=rf"config\.json: {name} is .*, expected"):
        read(tmp_path, {**_LLAMA, name: value})


@pytest.mark.parametrize(
    ("changes", "windowed"),
    [
        ({"sliding_window": None}, False),
        ({"sliding_window": 8}, True),
        ({"local_attention": 8}, True),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 2}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"model_type": "gpt_neo", "attention_types": [[["global", "local"], 1]]}, True),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 2]]}, False),
        ({"model_type": "gpt_neo"}, True),
        ({"model_type": "mpt"}, True),
        ({"model_type": "mistral"}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, False),
        ({"model_type": "qwen2", "sliding_window": 8}, False),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, True),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 7}}, True),
    ],
)
def test_layers_that_count_the_rows_between_two_tokens_are_known(tmp_path, changes, windowed):
    assert read(tmp_path, {**_LLAMA, **changes}).windowed is windowed


def test_the_architectures_that_need_no_asking_have_no_windows_of_their_own():
    for kind in SETTLED_WINDOWS - {"gpt_neo", "mpt"}:
        fields = transformers.CONFIG_MAPPING[kind]().to_dict()
        assert not {"sliding_window", "local_attention", "layer_types"} & set(fields), kind


def test_fewer_positions_than_the_padding_takes_are_refused(tmp_path):
    with pytest.raises(ExportError, match="has 2 positions, of which the padding's id takes 2"):
        read(tmp_path, {"model_type": "roberta", "max_position_embeddings": 2, "pad_token_id": 1})
