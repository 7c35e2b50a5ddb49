"""Results as they are told: those of one cell over its seeds together, and what each is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from method.plan import BASE

NAMES = {"teamlora": "TeamLoRA", "moelora": "MoELoRA", "hydralora": "HydraLoRA", "lora": "LoRA", BASE: "the base"}
TARGET_NAMES = {"ffn": "gate, up, down", "all": "all projections"}
# What exports are compared with.
TORCH = "PyTorch"

Result = Mapping[str, Any]
Rows = Sequence[Result]


def groups(scores: Rows) -> dict[str, list[Result]]:
    """Results of the same cell but for the seed, by what `Cell.group` calls them."""
    found: dict[str, list[Result]] = {}
    for result in scores:
        found.setdefault(_group(result), []).append(result)
    return found


def _group(result: Result) -> str:
    name = str(result["cell"])
    return name if result["family"] == BASE else name.rpartition("-s")[0]


def name_of(result: Result) -> str:
    """Of its group, but for the modules that were adapted."""
    name = NAMES[result["family"]]
    if result["family"] in (BASE, "lora"):
        return name
    return f"{name}, k={result['experts']}" + (", half the parameters" if result["share"] != 1 else "")
