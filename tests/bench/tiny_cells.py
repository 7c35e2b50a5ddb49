"""A tiny base, and a cell that is trained on it in a second; the fixtures of them are in `claim_fixtures`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import tokenizers
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from method.cells import Place, run_cell
from method.plan import Cell, Settings

TINY = Settings(rank=8, steps=2, batch=2, train=3, validation=1, test=2, dtype="fp32")
# The settings `TINY`, as words of the command.
FEW = [
    word
    for name, value in dataclasses.asdict(TINY).items()
    if name != "data_seed"
    for word in (f"--{name.replace('_', '-')}", value)
]
TEAM, LORA = Cell("teamlora", 4, "ffn", 1.0, 0), Cell("lora", 1, "ffn", 1.0, 0)


def save_base(folder: Path) -> None:
    """A Llama that takes the longest prompts, and a tokenizer that cuts them into single letters, as they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=384, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def train_team(base: Path, folder: Path) -> None:
    """What `run_cell` tells of `TEAM`, into told.json, beside the cache that it keeps it in."""
    told = run_cell(TEAM, Place(base, TINY, folder / "cache"))
    (folder / "told.json").write_text(json.dumps(told))
