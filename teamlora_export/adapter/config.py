"""`adapter_config.json`: the fields that decide shapes and constants, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from teamlora_export.adapter.patterns import PatternMatcher, why_no_pattern
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import read_json

CONFIG_NAME = "adapter_config.json"
_LARGEST = 1e9
_MOST_EXPERTS = 1024
_NUMBERS = {int: "an integer", float: "a number"}
_BIAS_MODES = ("none", "all", "lora_only")
# What CoMoL's code calls itself, and what it calls the fields of the others.
_COMOL, COMOL_NAMES = "MoCoreLORA", {"r": "lora_rank", "lora_nums": "num_experts"}
# What those call themselves whose r is called so.
_KNOWN = ("LORA", "TEAMLORA", "HYDRALORA", "MOELORA", _COMOL)
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
        core_router: the router reads A x, not x (CoMoL only); None where the file does not say.
        layers_to_transform: of the modules that suffixes name, those of these layers alone; none: of all.
        layers_pattern: what the list of layers is called, as regular expressions; none: whatever has a number behind.
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
    core_router: bool | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def targets(self, path: str) -> bool:
        """Whether `target_modules` names the module at `path`, by PEFT's rules."""
        return (
            self._matches(self.target_modules, path)
            and not self._matches(self.exclude_modules, path)
            and self._is_in_layers(path)
        )

    def rank(self, path: str) -> int:
        """Rank of the module at `path` (`rank_pattern` first, then r)."""
        return int(self._by_pattern(self.rank_pattern, path, self.r))

    def alpha(self, path: str) -> float:
        """Alpha of the module at `path` (`alpha_pattern` first, then lora_alpha)."""
        return float(self._by_pattern(self.alpha_pattern, path, self.lora_alpha))

    @cached_property
    def _matcher(self) -> PatternMatcher:
        return PatternMatcher()

    def _matches(self, targets: tuple[str, ...] | str, path: str) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or (bool(targets) and self._matcher.fullmatch(targets, path))
        return any(path == target or path.endswith(f".{target}") for target in targets)

    def _is_in_layers(self, path: str) -> bool:
        """By PEFT's rule, which leaves a module that is named in full where it is."""
        if not self.layers_to_transform or isinstance(self.target_modules, str) or path in self.target_modules:
            return True
        numbers = (self._matcher.layer_of(pattern, path) for pattern in self.layers_pattern or (r"[^.]*",))
        found = next((number for number in numbers if number is not None), "")
        return found in map(str, self.layers_to_transform)

    def _by_pattern(self, patterns: Mapping[str, float] | None, path: str, default: float) -> float:
        for pattern, value in (patterns or {}).items():
            if self._matcher.fullmatch(rf"(.*\.)?({pattern})", path):
                return value
        return default


def read_config(folder: Path) -> AdapterConfig:
    """Read `adapter_config.json` of `folder`.

    Raises:
        ExportError: the file is missing, is not a JSON object, or holds values that cannot be; all of them listed.
    """
    path = folder / CONFIG_NAME
    try:
        fields = read_json(path, "Copy it again from where it was trained.", folder)
    except FileNotFoundError:
        raise ExportError(
            f"{folder}: no {CONFIG_NAME} in it. Give the folder that training wrote the adapter to."
        ) from None
    return _parse(fields, str(path))


def _parse(fields: dict[str, Any], where: str) -> AdapterConfig:
    findings: list[str] = []
    kind = fields.get("peft_type")
    called = COMOL_NAMES if kind == _COMOL else {}
    fields = fields | {ours: fields.get(theirs) for ours, theirs in called.items() if fields.get(ours) is None}
    if fields.get("r") is None and isinstance(kind, str) and kind not in _KNOWN:
        findings.append(f"peft_type is {kind!r:.80}, which is not known here, nor what it calls r")

    def number(name: str, default: float | None, kind: type, least: float, most: float = _LARGEST) -> Any:
        value: Any = fields.get(name, default)
        if _is_number(value, kind, least, most):
            return kind(value)
        findings.append(
            f"{called.get(name, name)} is {value!r:.80}, expected {_NUMBERS[kind]} from {least:g} to {most:g}"
        )
        return default

    def text(name: str) -> str | None:
        value = fields.get(name)
        if value is None or isinstance(value, str):
            return value
        findings.append(f"{name} is {value!r:.80}, expected a string")
        return None

    def flag(name: str) -> bool:
        value = fields.get(name) or False
        if isinstance(value, bool):
            return value
        findings.append(f"{name} is {value!r:.80}, expected true or false")
        return False

    def names(name: str) -> tuple[str, ...]:
        value = fields.get(name) or ()
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        findings.append(f"{name} is {value!r:.80}, expected a list of module names")
        return ()

    def pattern_or_names(name: str) -> tuple[str, ...] | str:
        value = fields.get(name)
        if not isinstance(value, str):
            return names(name)
        return value if is_pattern(name, value) else ()

    def is_pattern(name: str, value: str, is_part: bool = False) -> bool:
        reason = why_no_pattern(value) or (why_no_pattern(f"({value})") if is_part else None)
        if reason:
            findings.append(f"{name} is {value!r:.80}, which is not a regular expression: {reason}")
        return reason is None

    def layers(name: str) -> tuple[int, ...]:
        value = fields.get(name)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if all(_is_number(number, int, 0, _LARGEST) for number in numbers):
            return tuple(map(int, numbers))
        findings.append(f"{name} is {value!r:.80}, expected the number of a layer or a list of them")
        return ()

    def patterns(name: str) -> tuple[str, ...]:
        value = fields.get(name)
        return tuple(
            each
            for each in ((value,) if isinstance(value, str) else names(name))
            if is_pattern(name, each, is_part=True)
        )

    def per_module(name: str, kind: type) -> dict[str, Any] | None:
        value = fields.get(name) or {}
        if not isinstance(value, dict) or not all(_is_number(v, kind, 0, _LARGEST) and v for v in value.values()):
            findings.append(f"{name} is {value!r:.80}, expected {_NUMBERS[kind]} above 0 for each module name")
            return None
        refused = [key for key in value if not is_pattern(name, key, is_part=True)]
        return value if value and not refused else None

    bias = fields.get("bias") or "none"
    if bias not in _BIAS_MODES:
        findings.append(f"bias is {bias!r:.80}, expected one of {', '.join(_BIAS_MODES)}")
    for option in _UNSUPPORTED_OPTIONS:
        if fields.get(option):
            findings.append(f"{option} is set: it changes the layer in a way that the exported op does not compute")
    config = AdapterConfig(
        r=number("r", None, int, 1),
        lora_alpha=number("lora_alpha", None, float, 0),
        lora_nums=number("lora_nums", None, int, 1, _MOST_EXPERTS) if fields.get("lora_nums") is not None else None,
        target_modules=pattern_or_names("target_modules"),
        exclude_modules=pattern_or_names("exclude_modules"),
        bias=bias,
        fan_in_fan_out=flag("fan_in_fan_out"),
        blc_alpha=number("blc_alpha", 0.0, float, 0),
        blc_weight=number("blc_weight", 0.0, float, 0),
        lora_dropout=number("lora_dropout", 0.0, float, 0),
        use_rslora=flag("use_rslora"),
        modules_to_save=names("modules_to_save"),
        base_model_name_or_path=text("base_model_name_or_path"),
        task_type=text("task_type"),
        rank_pattern=per_module("rank_pattern", int),
        alpha_pattern=per_module("alpha_pattern", float),
        core_router=flag("core_router") if fields.get("core_router") is not None else None,
        layers_to_transform=layers("layers_to_transform"),
        layers_pattern=patterns("layers_pattern"),
    )
    raise_findings(where, findings)
    return config


def _is_number(value: Any, kind: type, least: float, most: float) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        return False
    return kind is float or value == int(value)
