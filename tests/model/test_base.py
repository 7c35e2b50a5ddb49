"""Bases that are not whole, not plain or not harmless: each is refused in a sentence, and nothing is made up."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from conftest import ARCHITECTURES
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from teamlora_export.bundle import COMPANIONS
from teamlora_export.errors import ExportError
from teamlora_export.model.base import BaseModel, LoadedWeights, open_base
from teamlora_export.model.checkpoint import SafetensorsWeights, open_safetensors_weights, refuse_not_finite
from teamlora_export.model.source import find_base

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def untied(tmp_path, make_base) -> Path:
    """A copy of the tiny Mistral, whose head is a weight of its own."""
    return Path(shutil.copytree(make_base("mistral").folder, tmp_path / "base"))


@pytest.fixture
def tied(tmp_path, make_base) -> Path:
    """A copy of the tiny Llama, whose head is its embedding."""
    return Path(shutil.copytree(make_base("llama").folder, tmp_path / "base"))


def edit(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def to_bin(folder: Path, change=lambda state: None) -> None:  # type: ignore[no-untyped-def]
    state = {name: torch.from_numpy(value) for name, value in load_file(folder / "model.safetensors").items()}
    change(state)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def open_weights(base: BaseModel) -> SafetensorsWeights | None:
    aliases = base.aliases()
    return open_safetensors_weights(base.source, aliases, base.signature, aliases.keys())


@pytest.mark.parametrize("name", ["lm_head.weight", Q_PROJ, "model.norm.weight"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_weight_that_the_checkpoint_lacks_is_refused_by_name_and_nan_in_the_reference(name, kind, untied):
    edit(untied, lambda tensors: tensors.pop(name))
    if kind == "bin":
        to_bin(untied)
    base = open_base(str(untied))
    assert open_weights(base) is None
    with pytest.raises(ExportError, match=f"1 problem\n  - {name} is missing"):
        LoadedWeights(base, base.aliases())
    assert base.load(torch.float64).state_dict()[name].isnan().all()


def test_a_head_that_is_tied_to_the_embedding_is_not_missing(tied):
    base = open_base(str(tied))
    weights = open_weights(base)
    assert weights is not None
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    assert np.array_equal(weights.read("lm_head.weight"), embedding)
    assert np.array_equal(LoadedWeights(base, base.aliases()).read("lm_head.weight"), embedding)


def test_a_tied_weight_may_have_the_name_of_either_use(tied):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    edit(tied, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    base = open_base(str(tied))
    weights = open_weights(base)
    assert weights is not None
    for read in (weights.read, LoadedWeights(base, base.aliases()).read):
        assert np.array_equal(read("model.embed_tokens.weight"), embedding)
    edit(tied, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ExportError, match=r"lm_head\.weight is missing"):
        LoadedWeights(base, base.aliases())


def test_a_head_that_is_tied_and_yet_another_is_refused(tied):
    edit(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ExportError, match=r"lm_head\.weight and model\.embed_tokens|model\.embed_tokens.* differ"):
        open_weights(open_base(str(tied)))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, kind, untied):
    edit(untied, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].astype(dtype)}))
    if kind == "bin":
        to_bin(untied)
    base = open_base(str(untied))
    with pytest.raises(ExportError, match=rf"q_proj\.weight is {np.dtype(dtype)}: weights are float32"):
        open_weights(base) or base.load(torch.float32)
    with pytest.raises(ExportError, match="before it was quantised"):
        base.load(torch.float32)


def test_integers_are_refused_as_weights_of_any_name_and_passed_over_as_tables(untied):
    edit(untied, lambda tensors: tensors.update({"model.rotary_emb.positions": np.arange(9)}))
    base = open_base(str(untied))
    assert open_weights(base) is not None
    base.load(torch.float32)
    edit(untied, lambda tensors: tensors.update({"another_name.q_proj.weight": np.ones((32, 32), np.int8)}))
    with pytest.raises(ExportError, match=r"another_name\.q_proj\.weight is int8: weights are float32"):
        base.load(torch.float32)


def test_a_weight_of_another_shape_is_refused_before_anything_is_written(untied):
    edit(untied, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:, :8].copy()}))
    with pytest.raises(ExportError, match=r"q_proj\.weight is \[32, 8\], the model's code expects \[32, 32\]"):
        open_weights(open_base(str(untied)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_weight_with_a_nan_or_infinity_is_named(value, dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    array = np.linspace(-60000, 60000, 300_000).astype(kind)
    array[:2] = ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).min
    refuse_not_finite("healthy", array)
    array[-1] = value
    with pytest.raises(ExportError, match="lm_head: holds NaN or infinite"):
        refuse_not_finite("lm_head", array)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (lambda t: t.to_sparse(), "is sparse or nested"),
        (lambda t: t.to("meta"), "holds no values"),
        (lambda t: torch.zeros(1).expand(1 << 40), "more values than the file has"),
        (lambda t: [1, 2], "does not hold tensors by name"),
    ],
)
def test_a_bin_file_with_anything_but_plain_tensors_is_refused(way, message, untied):
    to_bin(untied, lambda state: state.update({Q_PROJ: way(state[Q_PROJ])}))
    with pytest.raises(ExportError, match=message):
        open_base(str(untied)).load(torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}, "auto_map.*never run"),
        ({"model_type": "mine"}, "none that transformers has code for"),
        ({"model_type": 7}, "has no model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised.*gptq"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, expected 0 to"),
        ({"hidden_size": 10**12}, "hidden_size is"),
        ({"num_labels": 1 << 20}, "num_labels is 1,048,576, expected 0 to 131,072"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"vocab_size": 10**400}, r"vocab_size is about 10\^400"),
        ({"intermediate_size": 1 << 23}, "million parameters; its weights have"),
        ({"transformers_weights": "../secret.safetensors"}, r"transformers_weights.*Give that file the name"),
        ({"hidden_act": "wibble"}, "cannot build a text-generation model"),
        ({"hidden_size": "big"}, "transformers can"),
        ({"architectures": 5}, ""),
        ({"window_size": -1, "chunk_size": -1}, ""),
        ({"hidden_size": -1}, "cannot build a text-generation model"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_at_once(fields, message, untied):
    (untied / "code.py").write_text("raise SystemExit('this code ran')")
    configure(untied, **fields)
    started = time.monotonic()
    if message:
        with pytest.raises(ExportError, match=message) as refusal:
            open_base(str(untied))
        assert len(str(refusal.value)) < 1000
    else:
        assert open_base(str(untied)).task == "text-generation"
    # What it is refused before would take memory for minutes.
    assert time.monotonic() - started < 60


def test_tables_that_no_memory_holds_are_refused_before_they_are_computed(tmp_path):
    """The weights of GPT-J say nothing of its positions."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 16, "vocab_size": 96}
    GPTJForCausalLM(GPTJConfig(**sizes)).save_pretrained(tmp_path)
    configure(tmp_path, n_positions=1 << 26)
    with pytest.raises(ExportError, match="the tables that its code computes would have 4 GB"):
        open_base(str(tmp_path))


class TableConfig(LlamaConfig):
    model_type = "llama_with_a_table"


class TableForCausalLM(LlamaForCausalLM):
    """Its buffer is in no checkpoint, and `_init_weights` does not know it."""

    config_class = TableConfig

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.arange(1000.0) + 0.5, persistent=False)


@contextmanager
def filled_with_nan() -> Iterator[None]:
    """Memory that nobody has written holds NaN here, where it may hold what somebody wrote before."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_buffer_that_the_models_code_computes_once_is_what_it_computed(tmp_path):
    AutoConfig.register(TableConfig.model_type, TableConfig)
    AutoModelForCausalLM.register(TableConfig, TableForCausalLM)
    made = TableForCausalLM(TableConfig(**ARCHITECTURES["llama"].fields))
    made.save_pretrained(tmp_path)
    assert torch.equal(open_base(str(tmp_path)).load(torch.float32).table, made.table)
    with filled_with_nan():
        alone = TableForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(alone.table, made.table), "transformers computes it again: _copy_computed_buffers can go"


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "1_Pooling/config.json"])
def test_a_file_that_leads_out_of_the_base_is_refused_before_anything_opens_it(name, untied, tmp_path):
    secret = tmp_path / "secret"
    (untied / name).parent.mkdir(exist_ok=True)
    if (untied / name).exists():
        (untied / name).rename(secret)
    else:
        secret.write_text("{}")
    (untied / name).symlink_to(secret)
    with pytest.raises(ExportError, match="link to a file outside"):
        open_base(str(untied))


def test_a_link_to_notes_is_the_users_own_and_every_file_of_a_tokenizer_is_looked_at(untied, tmp_path):
    (tmp_path / "secret").write_text("mine")
    for name in ("README.txt", "notes.txt", "trainer_state.json"):
        (untied / name).symlink_to(tmp_path / "secret")
    assert open_base(str(untied)).task == "text-generation"
    sources = Path(transformers.__file__).parent.rglob("tokenization_*.py")
    tables = [re.search(r"^VOCAB_FILES_NAMES\s*=\s*\{([^}]*)\}", path.read_text(), re.M) for path in sources]
    names = {name for table in tables if table for name in re.findall(r":\s*\"([^\"]+)\"", table[1])}
    assert {"vocab.json", "emoji.json", "bpe.codes"} <= names
    for name in (*names, *COMPANIONS):
        (tmp_path / "looked-at" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "looked-at" / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ExportError, match="link to a file outside"):
            find_base(str(tmp_path / "looked-at"))
        (tmp_path / "looked-at" / name).unlink()


def test_one_file_of_weights_comes_before_an_index_that_is_left_over(untied):
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (untied / "model.safetensors.index.json").write_text(json.dumps(index))
    base = open_base(str(untied))
    assert [path.name for path in base.source.weight_files()] == ["model.safetensors"]
    weights = open_weights(base)
    assert weights is not None
    assert np.array_equal(weights.read(Q_PROJ), base.load(torch.float32).state_dict()[Q_PROJ].numpy())


def test_a_hub_cache_and_a_folder_that_is_a_link_are_opened(untied, tmp_path, monkeypatch):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in untied.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        assert open_weights(open_base(str(folder))) is not None
    # On another disk: in the user's own cache, and nowhere else.
    (tmp_path / "models--tiny").mkdir()
    snapshot.parent.rename(tmp_path / "models--tiny" / "snapshots")
    moved = tmp_path / "models--tiny" / "snapshots" / "1"
    (tmp_path / "models--tiny" / "blobs").symlink_to(blobs)
    with pytest.raises(ExportError, match="link to a file outside"):
        open_base(str(moved))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_weights(open_base(str(moved))) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_model_computes_once_is_rounded_once(dtype, make_base):
    """GPT-J's table of positions: its code would compute the frequencies in 16 bits."""
    exact, narrow = (dict(make_base("gptj").skeleton(kind).named_buffers()) for kind in (torch.float32, dtype))
    tables = {name for name in exact if exact[name].is_floating_point()}
    assert any("embed_positions" in name for name in tables)
    for name in tables:
        assert torch.equal(narrow[name], exact[name].to(narrow[name].dtype)), name
