"""What a manifest says of the adapter in a bundle, and what is to be said of it before."""

from __future__ import annotations

from collections.abc import Mapping

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.bundle import AdapterOrigin, OpForm, Refit
from teamlora_export.errors import ExportError
from teamlora_export.graph import op, weights
from teamlora_export.graph.passes.narrow_adapter import NarrowAdapter
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.progress import Reporter

MOST_WARNINGS = 5


def describe_adapter(adapter: AdapterSpec) -> AdapterOrigin:
    return {
        "source": adapter.source,
        "sha256": adapter.sha256,
        "family": adapter.family,
        "r": adapter.config.r,
        "num_experts": max(p.num_experts for p in adapter.projections.values()),
        "modules": len(adapter.projections),
        "parameters": adapter.num_parameters,
    }


def describe_op(nodes: int, form: str, adapter_dtype: str | None) -> OpForm:
    made: OpForm = {"domain": op.DOMAIN, "name": op.NAME, "version": op.VERSION, "nodes": nodes, "form": form}
    if adapter_dtype is not None:
        made["adapter_dtype"] = adapter_dtype
    return made


def narrowing(adapter_dtype: str | None, dtype: str) -> NarrowAdapter | None:
    """What holds the adapter in `adapter_dtype` beside a graph in `dtype`; None where nothing is asked for.

    Raises:
        ExportError: they do not go together.
    """
    if adapter_dtype is None:
        return None
    if adapter_dtype not in ("fp16", "bf16"):
        raise ExportError(f"--adapter-dtype {adapter_dtype}: unknown. Use fp16 or bf16, or leave it out.")
    if dtype != "fp32":
        raise ExportError(f"--adapter-dtype: is for graphs in fp32, this one is in {dtype} as it is. Leave it out.")
    return NarrowAdapter(IR_DTYPES[adapter_dtype])


def describe_refit(recipes: Mapping[str, weights.Recipe], adapter: AdapterSpec, body_prefix: str) -> Refit:
    """What exchanging the adapter needs: the recipes of its weights, and what another adapter is checked against."""
    own = {
        name: recipe.to_json()
        for name, recipe in recipes.items()
        if any(part.source in weights.OP_SOURCES or part.key in adapter.overrides for part in recipe.parts)
    }
    return {
        "weights": own,
        "projections": {
            path: (p.in_features, p.out_features, p.down_rank, p.num_experts, p.expert_rank)
            for path, p in adapter.projections.items()
        },
        "overrides": {name: list(value.shape) for name, value in adapter.overrides.items()},
        "body_prefix": body_prefix,
    }


def warn_of_normalizers(adapter: AdapterSpec, reporter: Reporter) -> None:
    unsafe = list(adapter.unsafe_normalizers().items())
    for path, floor in unsafe[:MOST_WARNINGS]:
        reporter.warn(
            f"{path}: its routing normaliser can fall to {floor:.3g}; a token there divides by zero or flips sign."
        )
    if len(unsafe) > MOST_WARNINGS:
        rest = len(unsafe) - MOST_WARNINGS
        reporter.warn(f"{rest} more modules have such a normaliser; `teamlora-export inspect` lists them.")
