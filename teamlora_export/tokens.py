"""What a model says of its tokens, settled once: at the export, from the configuration that comes with the base.

    config.json                  the vocabulary, the positions, the ids with a meaning; what it leaves out is as
                                 transformers has it for that model type
    generation_config.json       ids with a meaning, where it names them
    sentence_bert_config.json    where sentences are cut
    tokenizer_config.json        the same, for sentences without the file above; the end of a text that only it names

The result goes into `manifest.json` and `deploy.json`. Whatever runs the model reads it there (the command line,
runner.py, the C++ program, Triton's models, profiles of engines), so that no null or missing field is left to a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teamlora_export.errors import ExportError
from teamlora_export.files import read_json

_ADVICE = "Repair it, or download the model again."
# How configurations of different families call the number of positions.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# They number positions from the padding's id on, so that their table holds that many fewer (transformers:
# create_position_ids_from_input_ids). A test compares this list with the transformers that is installed.
OFFSET_POSITIONS = {
    *("camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "markuplm", "mpnet", "xmod"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
}
# Whether these have windows is settled by what a configuration says, without asking transformers. A test compares them
# with the transformers that is installed.
SETTLED_WINDOWS = {
    *("bert", "gpt2", "gpt_neox", "llama", "olmo", "opt", "phi", "roberta", "stablelm", "xlm-roberta"),
    *("gpt_neo", "mpt"),
}
# Tokenizers without a limit say 10^30.
_NO_LIMIT = 1 << 31


@dataclass(frozen=True)
class Tokens:
    """The tokens of one model.

    Attributes:
        vocabulary: ids are 0 to `vocabulary` - 1; None where the configuration does not say.
        padding: the id that fills a row; masked, so any that exists serves.
        start: the id that texts begin with, or None. stops: the ids that end one.
        most: tokens that the model takes at most, prompt and answer together; None where there is no limit.
        cut: words are cut to so many tokens, special ones included, as sentence-transformers does; None where a longer
            input is refused instead.
        windowed: some layer counts the rows of the cache between two tokens (a window of the last tokens, a bias by
            distance), so that none may be left out or stand empty.
        padded: rows of one batch may be of different lengths, the shorter ones with padding in front; where not, they
            are run one by one.
    """

    vocabulary: int | None
    padding: int
    start: int | None
    stops: tuple[int, ...]
    most: int | None
    cut: int | None
    windowed: bool
    padded: bool = True


def read_tokens(folder: Path, task: str) -> Tokens:
    """What the files in `folder` (a base model's, or a bundle's) say, for a model that does `task`.

    Raises:
        ExportError: a file cannot be read, or a field is of another type or out of its range.
    """
    path, named = folder / "config.json", folder / "generation_config.json"
    config, generation = _completed(_text_part(_read(path))), _read(named)
    vocabulary, most = _size(config, "vocab_size", path), longest_input(config, path)

    def ids(name: str) -> list[int]:
        """Of those that exist, what the generation's configuration says before the model's."""
        found = [*_ids(generation, name, named)] or [*_ids(config, name, path)]
        return [id_ for id_ in found if vocabulary is None or id_ < vocabulary]

    stops = ids("eos_token_id")
    if task == "text-generation" and not stops:
        stops = _tokenizers_end(folder, vocabulary)
    # Where positions are counted from the padding on, it is the model's own.
    paddings = [*_ids(config, "pad_token_id", path), *ids("pad_token_id"), *stops, 0]
    return Tokens(
        vocabulary=vocabulary,
        padding=next(id_ for id_ in paddings if vocabulary is None or id_ < vocabulary),
        start=next(iter(ids("bos_token_id")), None),
        stops=tuple(stops),
        most=most,
        cut=_cut(folder, most) if task == "sentence-embedding" else None,
        windowed=_is_windowed(config),
    )


def longest_input(config: Mapping[str, Any], path: Path) -> int | None:
    """Tokens that a model of this configuration takes at most; None where it names no limit.

    Raises:
        ExportError: the number of positions is none, or there are fewer than the padding's id takes.
    """
    config = _text_part(config)
    most = next((size for name in _POSITIONS if (size := _size(config, name, path)) is not None), None)
    if most is None or config.get("model_type") not in OFFSET_POSITIONS:
        return most
    offset = next(iter(_ids(config, "pad_token_id", path)), 0) + 1
    if most <= offset:
        raise ExportError(f"{path}: has {most} positions, of which the padding's id takes {offset}. {_ADVICE}")
    return most - offset


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _ADVICE, path.parent)
    except FileNotFoundError:
        return {}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models for more than text keep what belongs to it in a part of its own."""
    part = config.get("text_config")
    return {**config, **part} if isinstance(part, dict) else config


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what transformers makes of fields that are left out (not of those that are null)."""
    ids = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    if all(name in config for name in ids) and any(name in config for name in _POSITIONS) and _says_windows(config):
        return config
    # Slow, and rarely needed.
    from transformers import CONFIG_MAPPING

    try:
        # Not the class's own defaults: some fields follow from others.
        return {**_text_part(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()), **config}
    except Exception:  # of many kinds: what is no configuration is told field by field
        return config


def _says_windows(config: Mapping[str, Any]) -> bool:
    return (
        config.get("model_type") in SETTLED_WINDOWS
        or isinstance(config.get("layer_types"), list)
        or config.get("use_sliding_window") is False
        or config.get("sliding_window", ...) is None
    )


def _size(fields: Mapping[str, Any], name: str, path: Path) -> int | None:
    value = fields.get(name)
    # Some say -1 where there is no limit.
    if value is None or (type(value) is int and value == -1):
        return None
    if type(value) is not int or not 1 <= value < _NO_LIMIT:
        raise ExportError(f"{path}: {name} is {value!r:.80}, expected a whole number of at least 1. {_ADVICE}")
    return value


def _ids(fields: Mapping[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """One id or a list of them; -1 is none (LLaMA's first configurations)."""
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id_) is int and -1 <= id_ < _NO_LIMIT for id_ in ids):
        raise ExportError(f"{path}: {name} is {value!r:.80}, expected a token's id or a list of them. {_ADVICE}")
    return tuple(id_ for id_ in ids if id_ >= 0)


def _tokenizers_end(folder: Path, vocabulary: int | None) -> list[int]:
    """The end of a text that the tokenizer alone knows: its eos_token, which tokenizer.json gives an id."""
    named = _read(folder / "tokenizer_config.json").get("eos_token")
    content = named.get("content") if isinstance(named, dict) else named
    added = _read(folder / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and content is not None and token.get("content") == content:
            return [id_ for id_ in _ids(token, "id", folder / "tokenizer.json") if id_ < (vocabulary or _NO_LIMIT)]
    return []


def _cut(folder: Path, most: int | None) -> int | None:
    """The length that sentence-transformers cuts to: its own, else the tokenizer's; never past the positions."""
    path = folder / "sentence_bert_config.json"
    limit = _size(_read(path), "max_seq_length", path)
    if limit is None:
        # 10^30 is written as a float by some, and as a whole number by others.
        stated = _read(folder / "tokenizer_config.json").get("model_max_length")
        limit = int(stated) if isinstance(stated, (int, float)) and 1 <= stated < _NO_LIMIT else None
    return min((length for length in (limit, most) if length is not None), default=None)


def _is_windowed(config: Mapping[str, Any]) -> bool:
    # MPT's ALiBi goes by rows, not by the mask; GPT-Neo has a word of its own for the kinds of its layers, and windows
    # in every second one where it is left out.
    if config.get("model_type") == "mpt":
        return True
    if config.get("model_type") == "gpt_neo":
        return "local" in str(config.get("attention_types", "local"))
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return any(kind != "full_attention" for kind in kinds)
    if config.get("use_sliding_window") is False:
        # Qwen2.5 names a window that it does not use.
        return False
    return any(config.get(name) for name in ("sliding_window", "local_attention"))
