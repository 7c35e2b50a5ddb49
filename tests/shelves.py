"""Adapters of every family for a small model, as folders, to be put on a shelf."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from teamlora_export.bundle import read_bundle
from teamlora_export.model.base import BaseModel

_PREFIX = "base_model.model."


def write_family(
    folder: Path, base: BaseModel, family: str, targets: Sequence[str], r: int, k: int = 1, seed: int = 0
) -> Path:
    """A random adapter of `family` on the modules of `base` that end with `targets`, in its published layout; it
    changes the model's answers clearly."""
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {}
    for path, linear in base.signature.linears.items():
        if not path.endswith(tuple(f".{target}" for target in targets)):
            continue
        d_in, d_out, name = linear.in_features, linear.out_features, f"{_PREFIX}{path}"
        own = r // k if family == "teamlora" else r
        if family == "moelora":
            tensors |= {f"{name}.lora_A{i}.weight": array(own, d_in) for i in range(k)}
        else:
            tensors[f"{name}.lora_A.weight"] = array(r, d_in)
        if family in ("lora", "comol"):
            tensors[f"{name}.lora_B.weight"] = array(d_out, r)
        if family == "comol":
            tensors |= {f"{name}.lora_Cores.{i}": array(r, r) for i in range(k)}
            tensors[f"{name}.lora_router.weight"] = 2 * array(k, r)
        if family in ("lora", "comol"):
            continue
        tensors |= {f"{name}.lora_B{i}.weight": array(d_out, own) for i in range(k)}
        if family == "teamlora":
            tensors[f"{name}.lora_route.fc.weight"] = 2 * array(k, d_in)
            tensors[f"{name}.lora_interaction_matrix.weight"] = (0.1 * rng.normal(size=(k, k)) / k).astype(np.float32)
        else:
            tensors[f"{name}.lora_route.weight"] = 2 * array(k, d_in)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": r, "lora_alpha": 1.5 * r / k, "lora_nums": k, "target_modules": list(targets), "bias": "none"}
    if family == "lora":
        config.pop("lora_nums")
    if family == "comol":
        config |= {"peft_type": "MoCoreLORA", "lora_rank": config.pop("r"), "num_experts": config.pop("lora_nums")}
        config["core_router"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# Family, targets, r, k: unlike each other in everything. The first decides most of the slots' shape.
SHELF = {
    "team": ("teamlora", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 8, 4),
    "small": ("teamlora", ("q_proj", "v_proj", "o_proj"), 2, 2),
    "lora": ("lora", ("q_proj", "v_proj", "down_proj"), 6, 1),
    "hydra": ("hydralora", ("gate_proj", "up_proj", "k_proj"), 2, 3),
    "moe": ("moelora", ("o_proj", "down_proj"), 2, 3),
}


def write_shelf(folder: Path, base: BaseModel) -> dict[str, Path]:
    """The adapters of `SHELF`, by name."""
    return {
        name: write_family(folder / name, base, family, targets, r, k, seed)
        for seed, (name, (family, targets, r, k)) in enumerate(SHELF.items())
    }


def names(folder: Path) -> list[str]:
    """Of the adapters on the shelf of a bundle."""
    return list(read_bundle(folder).manifest.shelf["adapters"])


# Requests of the tiny model, of more adapters than the three slots that there are.
PROMPTS = [[5, 6, 7], [9, 3], [200, 100, 50, 25, 12], [5, 6, 7], [7] * 9, [44, 45, 46, 47], [5, 6, 7]]
NAMES = ["team", "small", None, "lora", "hydra", "moe", "team"]
COUNT = 12
Answers = Mapping[tuple[str | None, tuple[int, ...]], list[int]]


def expected(answers: Answers, names: Sequence[str | None] = NAMES) -> list[list[int]]:
    """What each of `PROMPTS` is answered."""
    return [answers[name, tuple(prompt)] for name, prompt in zip(names, PROMPTS, strict=True)]
