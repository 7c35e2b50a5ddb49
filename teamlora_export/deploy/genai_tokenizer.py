"""The tokenizer as onnxruntime-genai reads it: `tokenizer.json` as it is, and a `tokenizer_config.json` of ours.

The library insists on fields of `tokenizer_config.json` that `save_pretrained` leaves out or writes as null, decides by
the class that is named there which tokens begin and end a text, whatever `tokenizer.json` says, and knows a few classes
alone. So the fields that it reads are written anew, and say what `tokenizer.json` itself does (tried with 0.18; a test
with words for every architecture tells when that changes).
"""

from __future__ import annotations

import json
from typing import Any

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.words import encode_text, open_tokenizer
from teamlora_export.files import read_json

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
_ADVICE = "Export the model again."
# The class for which it reads everything from tokenizer.json, and the models and decoders that it then knows.
_CLASS = "PreTrainedTokenizerFast"
_KINDS = {"model": ("BPE",), "decoder": ("ByteLevel", "Sequence")}
# What a sequence of decoders may be made of.
_INNER = {"ByteLevel", "ByteFallback", "Fuse", "Replace", "Strip"}


def why_unreadable(bundle: Bundle) -> str | None:
    """Why onnxruntime-genai cannot read the bundle's tokenizer, as the end of a sentence; None where it can.

    Raises:
        ExportError: tokenizer.json is no JSON.
    """
    path = bundle.folder / TOKENIZER_NAME
    if not path.is_file():
        return f"there is no {TOKENIZER_NAME}"
    fields = read_json(path, _ADVICE, bundle.folder)
    for part, known in _KINDS.items():
        kind = fields[part].get("type") if isinstance(fields.get(part), dict) else None
        if kind not in known:
            return f"its tokenizer's {part} is {kind!r:.40}, and onnxruntime-genai reads {' and '.join(known)}"
    inner = fields["decoder"].get("decoders") or []
    for part in inner if isinstance(inner, list) else [inner]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _INNER:
            return f"its tokenizer's decoder has a part {kind!r:.40}, which onnxruntime-genai does not read"
    try:
        _ends(bundle)
    except ModelError as error:
        return str(error)
    return None


def adds_tokens(bundle: Bundle) -> bool:
    """Whether the tokenizer puts a token before or behind a text."""
    return any(_ends(bundle))


def tokenizer_config(bundle: Bundle) -> str:
    """The tokenizer_config.json for a tokenizer that can be read."""
    starts, ends = _ends(bundle)
    names = _names(bundle)
    tokens = bundle.manifest.tokens
    end = names.get(ends[0] if ends else tokens.stops[0] if tokens.stops else None)
    start = names.get(starts[0] if starts else tokens.start)
    fields: dict[str, Any] = {"tokenizer_class": _CLASS, "add_bos_token": bool(starts), "add_eos_token": bool(ends)}
    if start or end:
        # With one of the two alone, it appends a token 0.
        fields |= {"bos_token": start or end, "eos_token": end or start}
    template = _chat_template(bundle)
    if template is not None:
        fields["chat_template"] = template
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def _ends(bundle: Bundle) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    tokenizer = open_tokenizer(bundle.folder, None)
    text = encode_text(tokenizer, "a", specials=False)
    whole = encode_text(tokenizer, "a")
    at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    if at is None or at > 1 or len(whole) - len(text) - at > 1:
        raise ModelError("its tokenizer puts more than one token before or behind a text, which it cannot be told")
    return whole[:at], whole[at + len(text) :]


def _names(bundle: Bundle) -> dict[int | None, str]:
    """Special tokens by id."""
    added = read_json(bundle.folder / TOKENIZER_NAME, _ADVICE, bundle.folder).get("added_tokens")
    return {token["id"]: token["content"] for token in added or []}


def _chat_template(bundle: Bundle) -> str | None:
    try:
        config = read_json(bundle.folder / TOKENIZER_CONFIG_NAME, _ADVICE, bundle.folder)
    except FileNotFoundError:
        return None
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several, by name.
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
