"""`adapter_config.json`: the fields that decide shapes and constants, checked as they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teamlora_export.errors import ExportError, raise_findings

CONFIG_NAME = "adapter_config.json"
_BIAS_MODES = ("none", "all", "lora_only")
# Options of PEFT that change what a LoRA layer computes and that the op does not express.
_UNSUPPORTED_OPTIONS = ("use_dora", "use_qalora", "lora_bias", "layer_replication", "alora_invocation_tokens")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of `adapter_config.json` that the computation depends on.

    Attributes:
        r: total rank.
        lora_alpha: numerator of the scaling.
        lora_nums: number of experts k; None where the file does not say.
        target_modules: suffixes of module names, or one regular expression for the whole name.
        bias: which base biases were trained: none, all or lora_only.
        fan_in_fan_out: the base stores its weights as [in, out] (`Conv1D`).
        use_rslora: scaling is alpha / sqrt(r) (PEFT's LoRA only).
        modules_to_save: suffixes of modules that were trained whole.
    """

    r: int
    lora_alpha: float
    lora_nums: int | None = None
    target_modules: tuple[str, ...] | str = ()
    exclude_modules: tuple[str, ...] | str = ()
    bias: str = "none"
    fan_in_fan_out: bool = False
    blc_alpha: float = 0.0
    blc_weight: float = 0.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] = ()
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    def targets(self, path: str) -> bool:
        """Whether `target_modules` names the module at `path`, by PEFT's rules."""
        return _matches(self.target_modules, path) and not _matches(self.exclude_modules, path)

    def rank(self, path: str) -> int:
        """Rank of the module at `path` (`rank_pattern` first, then r)."""
        return int(_by_pattern(self.rank_pattern, path, self.r))

    def alpha(self, path: str) -> float:
        """Alpha of the module at `path` (`alpha_pattern` first, then lora_alpha)."""
        return float(_by_pattern(self.alpha_pattern, path, self.lora_alpha))


def read_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json` of `folder`.

    Raises:
        ExportError: the file is missing, is not a JSON object, or holds values that cannot be; all of them listed.
    """
    path = folder / CONFIG_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{folder}: no {CONFIG_NAME} in it. Give the folder that training wrote the adapter to."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ExportError(
            f"{path}: cannot be read as JSON ({error}). Copy it again from where it was trained."
        ) from None
    if not isinstance(fields, dict):
        raise ExportError(f"{path}: holds a {type(fields).__name__}, expected a JSON object.")
    return _parse(fields, str(path))


def _parse(fields: dict[str, Any], where: str) -> AdapterConfig:
    findings: list[str] = []

    def number(name: str, default: float | None, kind: type, least: float) -> Any:
        value: Any = fields.get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value < 1e9 or (kind is int and value != int(value)):
            findings.append(f"{name} is {value!r}, expected {'an integer' if kind is int else 'a number'} >= {least:g}")
            return default
        return kind(value)

    def names(name: str) -> tuple[str, ...]:
        value = fields.get(name) or ()
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        findings.append(f"{name} is {value!r}, expected a list of module names")
        return ()

    def pattern_or_names(name: str) -> tuple[str, ...] | str:
        value = fields.get(name)
        if not isinstance(value, str):
            return names(name)
        try:
            re.compile(value)
        except re.error as error:
            findings.append(f"{name} is {value!r}, which is not a regular expression: {error}")
        return value

    def per_module(name: str) -> dict[str, Any] | None:
        value = fields.get(name) or None
        if value is None or (
            isinstance(value, dict) and all(isinstance(v, (int, float)) and v > 0 for v in value.values())
        ):
            return value
        findings.append(f"{name} is {value!r}, expected an object of positive numbers by module name")
        return None

    bias = fields.get("bias") or "none"
    if bias not in _BIAS_MODES:
        findings.append(f"bias is {bias!r}, expected one of {', '.join(_BIAS_MODES)}")
    for option in _UNSUPPORTED_OPTIONS:
        if fields.get(option):
            findings.append(f"{option} is set: it changes the layer in a way that the exported op does not compute")
    config = AdapterConfig(
        r=number("r", None, int, 1),
        lora_alpha=number("lora_alpha", None, float, 0),
        lora_nums=number("lora_nums", None, int, 1) if fields.get("lora_nums") is not None else None,
        target_modules=pattern_or_names("target_modules"),
        exclude_modules=pattern_or_names("exclude_modules"),
        bias=bias,
        fan_in_fan_out=bool(fields.get("fan_in_fan_out", False)),
        blc_alpha=number("blc_alpha", 0.0, float, 0),
        blc_weight=number("blc_weight", 0.0, float, 0),
        lora_dropout=number("lora_dropout", 0.0, float, 0),
        use_rslora=bool(fields.get("use_rslora", False)),
        modules_to_save=names("modules_to_save"),
        base_model_name_or_path=fields.get("base_model_name_or_path"),
        task_type=fields.get("task_type"),
        rank_pattern=per_module("rank_pattern"),
        alpha_pattern=per_module("alpha_pattern"),
    )
    raise_findings(where, findings)
    return config


def _matches(targets: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(targets, str):
        if targets == "all-linear":
            return True
        return bool(targets) and re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
