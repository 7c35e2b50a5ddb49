"""Reads an adapter folder into an `AdapterSpec`, and finds everything that is wrong with it before anything else runs.

Stages: open (`tensors.py`), parse the config (`config.py`), sort keys into modules, name the family (`families.py`),
compare
each module's leaves with what the family expects, build. Findings are collected over all modules and raised at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from teamlora_export.adapter.config import CONFIG_NAME, AdapterConfig, read_config
from teamlora_export.adapter.families import Family, ModuleSizes, count_experts, detect_family
from teamlora_export.adapter.spec import AdapterSpec, ExpertProjection
from teamlora_export.adapter.tensors import FLOAT_DTYPES, read_tensors
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import sha256_of

_PREFIX = "base_model.model."
_LEAF = re.compile(r"^(?P<path>.+?)\.(?P<leaf>lora_[A-Za-z_]+\d*(?:\.fc)?)(?:\.default)?\.(?P<kind>weight|bias)$")
# CoMoL's matrices between A and B are no layers: their keys have no `.weight`.
_CORE = re.compile(r"^(?P<path>.+?)\.lora_Cores(?:\.default)?\.(?P<number>0|[1-9]\d{0,3})$")
_OVERRIDE = re.compile(r"^(?P<path>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(?P<kind>weight|bias)$")

Modules = dict[str, dict[str, np.ndarray]]


def read_adapter(folder: str | Path) -> AdapterSpec:
    """Read the adapter in `folder` (`adapter_config.json` with `adapter_model.safetensors` or `.bin`).

    Raises:
        ExportError: the folder, a file or the tensors in it are not what a supported family writes; every finding
        listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ExportError(f"{folder}: no such folder. Give the folder that holds {CONFIG_NAME}.")
    config = read_config(folder)
    tensors, path = read_tensors(folder)
    findings: list[str] = []
    modules, others = _sort_keys(tensors, findings)
    family = detect_family(set().union(*modules.values()) if modules else set())
    if family is None:
        raise ExportError(
            f"{path}: holds no adapter that is known here (TeamLoRA, HydraLoRA, MoELoRA, CoMoL, LoRA). "
            f"Its first keys: {', '.join(sorted(tensors)[:4]) or 'none at all'}."
        )
    findings.extend(_check_values(tensors))
    if config.use_rslora and family.name != "lora":
        findings.append(f"use_rslora is set, and the published layer of {family.name} has no such scaling")
    projections = _build_projections(modules, family, config, findings)
    overrides = _build_overrides(others, set(modules), config, findings)
    raise_findings(str(path), findings)
    return AdapterSpec(
        family=family.name,
        config=config,
        projections=projections,
        overrides=overrides,
        source=str(folder.resolve()),
        sha256=sha256_of(path),
    )


def _sort_keys(tensors: Mapping[str, np.ndarray], findings: list[str]) -> tuple[Modules, dict[str, np.ndarray]]:
    """Keys by module path and leaf, and the keys that are no adapter leaf."""
    modules: Modules = {}
    others: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        place, leaf = others, name
        if match := _LEAF.match(name):
            place, leaf = modules.setdefault(match["path"], {}), f"{match['leaf']}.{match['kind']}"
        elif match := _CORE.match(name):
            place, leaf = modules.setdefault(match["path"], {}), f"lora_Cores.{match['number']}"
        if leaf in place:
            findings.append(f"{key}: is there twice, with .default or {_PREFIX} in its name and without")
        place[leaf] = value
    return modules, others


def _check_values(tensors: Mapping[str, np.ndarray]) -> list[str]:
    findings = []
    for name, value in tensors.items():
        if str(value.dtype) not in FLOAT_DTYPES:
            findings.append(f"{name} is {value.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
        elif bad := int(np.count_nonzero(~np.isfinite(value.astype(np.float32)))):
            findings.append(
                f"{name} holds {bad} values that are NaN or infinite; training diverged or the file is damaged"
            )
    return findings


def _build_projections(
    modules: Modules, family: Family, config: AdapterConfig, findings: list[str]
) -> dict[str, ExpertProjection]:
    num_experts = _num_experts(modules, family, config, findings)
    projections = {}
    for path, leaves in sorted(modules.items()):
        rank = config.rank(path)
        if family.splits_rank and rank % num_experts:
            findings.append(f"{path}: lora_nums={num_experts} does not divide r={rank}. Fix {CONFIG_NAME}")
            break
        if config.target_modules and not config.targets(path):
            findings.append(f"{path}: has adapter weights, but target_modules does not name it")
        sizes = _module_sizes(leaves, rank, num_experts)
        problems = _check_leaves(path, leaves, family, sizes)
        if not problems and (against := family.contradiction(leaves, sizes, config)):
            problems.append(f"{path}: {against}. Fix {CONFIG_NAME}")
        findings.extend(problems)
        if not problems:
            projections[path] = family.build(path, leaves, sizes, config)
    return projections


def _num_experts(modules: Modules, family: Family, config: AdapterConfig, findings: list[str]) -> int:
    if family.name == "lora":
        return 1
    if config.lora_nums is None:
        name = family.field_names[1]
        findings.append(f"{name} is missing from {CONFIG_NAME}: a {family.name} adapter needs its number of experts")
        return max(count_experts(set(leaves)) for leaves in modules.values())
    return config.lora_nums


def _module_sizes(leaves: Mapping[str, np.ndarray], rank: int, num_experts: int) -> ModuleSizes:
    """Sizes that most of a module's leaves agree on, so that the odd one is the finding."""
    inputs = [v.shape[1] for name, v in leaves.items() if name.startswith(("lora_A", "lora_route.")) and v.ndim == 2]
    outputs = [v.shape[0] for name, v in leaves.items() if name.startswith("lora_B") and v.ndim == 2]
    return ModuleSizes(_majority(inputs), _majority(outputs), rank, num_experts)


def _majority(values: list[int]) -> int:
    return Counter(values).most_common(1)[0][0] if values else 0


def _check_leaves(path: str, leaves: Mapping[str, np.ndarray], family: Family, sizes: ModuleSizes) -> list[str]:
    expected = family.expected(sizes)
    context = f"(r={sizes.rank}" + (f", k={sizes.num_experts})" if family.name != "lora" else ")")
    findings = []
    for leaf, shapes in expected.items():
        if leaf not in leaves:
            findings.append(f"{path}: {leaf} is missing {context}")
        elif leaves[leaf].shape not in shapes:
            found, wanted = list(leaves[leaf].shape), " or ".join(str(list(shape)) for shape in shapes)
            findings.append(
                f"{path}: {leaf} is {found}, expected {wanted} {context}. "
                f"Are {' and '.join(family.field_names)} right in {CONFIG_NAME}?"
            )
    findings.extend(
        f"{path}: {leaf} is not a key of a {family.name} module" for leaf in sorted(set(leaves) - set(expected))
    )
    ranks = {leaves[leaf].shape[0] for leaf in expected if leaf.startswith("lora_A") and leaf in leaves}
    if not findings and len(ranks) > 1:
        findings.append(f"{path}: its experts have different ranks {sorted(ranks)}, expected one rank for all")
    return findings


def _build_overrides(
    others: Mapping[str, np.ndarray], paths: set[str], config: AdapterConfig, findings: list[str]
) -> dict[str, np.ndarray]:
    """Base parameters that training replaced, by the base's own name; anything else is a finding."""
    overrides = {}
    for name, value in others.items():
        match = _OVERRIDE.match(name)
        if match and _may_override(match["path"], match["kind"], paths, config):
            overrides[f"{match['path']}.{match['kind']}"] = value
        else:
            findings.append(f"{name}: neither an adapter key nor allowed by bias={config.bias!r} or modules_to_save")
    return overrides


def _may_override(path: str, kind: str, adapted: set[str], config: AdapterConfig) -> bool:
    if kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and path in adapted)):
        return True
    return any(path == module or f".{module}." in f".{path}." for module in config.modules_to_save)
