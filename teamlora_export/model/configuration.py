"""Looks at a base's `config.json` before transformers does: some of what it may say costs memory or runs code."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import read_json
from teamlora_export.model.source import CONFIG_NAME, BaseSource

# How many modules or names transformers makes one by one of a number, far beyond any model that is published.
_MOST_REPEATED = 1024
_REPEATED = re.compile(r"(^|_)(layers?|layer_num|depth|experts|blocks)$")
_MOST_LABELS = 1 << 17
_LARGEST_SIZE = 1 << 24
_SIZE = re.compile(r"(^|_)(size|dim|embd|inner|heads?|kv|model|ff|groups|rank|labels)$")
_LARGEST_NUMBER = 1 << 40


def check_config(source: BaseSource, known_types: Collection[str]) -> None:
    """Refuse a configuration that would run code, is of quantised weights, or has sizes that no model has.

    Args:
        known_types: the `model_type`s that transformers has code for.

    Raises:
        ExportError: what is wrong, or the file cannot be read.
    """
    path = source.folder / CONFIG_NAME
    fields = read_json(path, "Download the model again.", source.folder)
    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise ExportError(f'{path}: has no model_type, expected a name such as "llama". Is it a model\'s own folder?')
    if kind not in known_types:
        code = " It names code of its own (auto_map), which is never run." if fields.get("auto_map") else ""
        raise ExportError(f"{path}: model_type {kind!r:.80} is none that transformers has code for.{code}")
    for name in ("quantization_config", "compression_config"):
        if value := fields.get(name):
            method = value.get("quant_method") if isinstance(value, dict) else value
            raise ExportError(
                f"{path}: its weights are quantised ({name}: {method!r:.80}), which is not supported. "
                "Give the model as it was before."
            )
    if (named := fields.get("transformers_weights")) is not None:
        raise ExportError(
            f"{path}: names a file of its own for the weights (transformers_weights: {named!r:.80}), which is not "
            "supported. Give that file the name model.safetensors, and leave the field out."
        )
    raise_findings(str(path), list(_findings(fields)))


def _findings(fields: dict[str, Any], where: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _findings(value, f"{where}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool):
            most = _most(name)
            # Some say -1 where there is none; what cannot do without is told when the model is built.
            if value > most or (value < -1 and most < _LARGEST_NUMBER):
                yield f"{where}{name} is {_short(value)}, expected 0 to {most:,}"


def _most(name: str) -> int:
    if _REPEATED.search(name):
        return _MOST_REPEATED
    if name == "num_labels":
        return _MOST_LABELS
    return _LARGEST_SIZE if _SIZE.search(name) else _LARGEST_NUMBER


def _short(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**18 else f"about 10^{len(str(abs(value))) - 1}"
