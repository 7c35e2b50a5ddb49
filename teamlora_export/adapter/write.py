"""Writes an adapter of any family in the layout its authors publish, as safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from teamlora_export.adapter.config import CONFIG_NAME
from teamlora_export.adapter.families import family_named
from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.adapter.tensors import SAFETENSORS_NAME
from teamlora_export.disk import saving
from teamlora_export.errors import ExportError

_PREFIX = "base_model.model."


def write_adapter(adapter: AdapterSpec, folder: str | Path, dtype: np.dtype | type | None = None) -> None:
    """Write `adapter` to `folder` as `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        dtype: cast every tensor to it; None keeps each tensor's own.

    Raises:
        ExportError: its family is only read.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    tensors = {
        _PREFIX + name: np.ascontiguousarray(value if dtype is None else value.astype(dtype))
        for name, value in _named_tensors(adapter).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        with saving(folder / SAFETENSORS_NAME):
            save_file(tensors, Path(staging) / SAFETENSORS_NAME, metadata={"format": "pt"})
        (Path(staging) / CONFIG_NAME).write_text(json.dumps(_config_fields(adapter), indent=2) + "\n", encoding="utf-8")
        for name in (SAFETENSORS_NAME, CONFIG_NAME):
            (Path(staging) / name).chmod(0o644)
            os.replace(Path(staging) / name, folder / name)


def _named_tensors(adapter: AdapterSpec) -> dict[str, np.ndarray]:
    tensors = dict(adapter.overrides)
    family = family_named(adapter.family)
    if family.leaves is None:
        raise ExportError(
            f"{adapter.source}: adapters of {family.name} are read only; there is no way back to their files."
        )
    for path, projection in adapter.projections.items():
        tensors.update({f"{path}.{leaf}": value for leaf, value in family.leaves(projection).items()})
    return tensors


def _config_fields(adapter: AdapterSpec) -> dict[str, object]:
    config = adapter.config
    # Options that the published code does not know are written where they are used.
    later = {
        "exclude_modules": _names(config.exclude_modules),
        "use_rslora": config.use_rslora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "core_router": config.core_router,
        "layers_to_transform": list(config.layers_to_transform),
        "layers_pattern": list(config.layers_pattern),
    }
    # What plain LoRA does not have, PEFT does not know.
    of_experts = {"lora_nums": config.lora_nums, "blc_alpha": config.blc_alpha, "blc_weight": config.blc_weight}
    return {
        # The code of TeamLoRA and HydraLoRA has "LORA", which PEFT would read as plain LoRA, without the experts; of
        # these names it knows none, and says so. Reading tells families by their tensors.
        "peft_type": adapter.family.upper(),
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        **(of_experts if adapter.family != "lora" else {}),
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "target_modules": _names(config.target_modules),
        "modules_to_save": list(config.modules_to_save) or None,
        "inference_mode": True,
        **{name: value for name, value in later.items() if value},
    }


def _names(modules: tuple[str, ...] | str) -> list[str] | str:
    return modules if isinstance(modules, str) else list(modules)
