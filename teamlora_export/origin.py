"""What a manifest says of the adapter in a bundle, and what is to be said of it before."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.graph import op, weights
from teamlora_export.graph.passes.narrow_adapter import NarrowAdapter
from teamlora_export.graph.precision import IR_DTYPES
from teamlora_export.manifest import AdapterOrigin, OpForm, Refit
from teamlora_export.progress import Reporter

MOST_WARNINGS = 5
# Of the hub's cache: models--ORGANISATION--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"models--(?:[^-]+(?:-[^-]+)*--)?(.+)")
# What a training writes beneath the name of what it trains.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# What the hub's cache calls the folder of a revision: its commit.
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Folders that are called so, or final-model and the like, say nothing of what is in them.
_NO_NAMES = frozenset(
    [
        *("base", "checkpoint", "checkpoints", "ckpt", "final", "gguf", "hf", "latest", "merged", "model", "models"),
        *("out", "output", "outputs", "pretrained", "snapshot", "snapshots", "weights"),
    ]
)
# What is in them is named after its user.
_HOMES = frozenset(["home", "users"])


def require_base(adapter: AdapterSpec, known: Sequence[str], any_base: bool, reporter: Reporter) -> None:
    """Refuse an adapter that was trained on a model of another name: sizes tell a base from most others, and not from
    one that was trained further.

    Args:
        known: the folder of the base, or its name on the hub; and what else it is called.
        any_base: it is taken; what is not known or not the same is said.

    Raises:
        ExportError: the names are known, and differ.
    """
    base, trained = known[0], adapter.config.base_model_name_or_path or ""
    theirs, names = model_name(trained), {model_name(name) for name in known} - {None}
    if theirs is None or not names:
        told = f"says that it was trained on {trained:.200}" if trained else "does not say which base it was trained on"
        reporter.warn(f"{adapter.source}: {told}; it is taken to be {base or 'this one'}, by its modules' sizes.")
    elif theirs not in names and not _leads_to(trained, base):
        told = f"{adapter.source}: says that it was trained on {trained:.200}; the base here is {base:.200}."
        if not any_base:
            raise ExportError(f"{told} Give an adapter of this base; --any-base takes it, if only the name is another.")
        reporter.warn(told)


def require_one_base(adapters: Iterable[AdapterSpec], base: str, any_base: bool, reporter: Reporter) -> list[str]:
    """Refuse adapters that were trained on different models. Where all name one, which is not what `base` is called
    here, it is said: whoever gives both knows better.

    Returns:
        what the base is called beside `base`: the name on which all agree, or nothing.

    Raises:
        ExportError: see `require_base`; or they name different ones, and what `base` is called says nothing.
    """
    adapters = list(adapters)
    named = {name: each for each in adapters if (name := model_name(each.config.base_model_name_or_path or ""))}
    if len(named) > 1 and model_name(base) is None and not any_base:
        told = ", ".join(f"{each.source} on {each.config.base_model_name_or_path:.200}" for each in named.values())
        raise ExportError(
            f"The adapters say that they were trained on different bases: {told:.1000}. Give adapters of one base; "
            "--any-base takes them, if only the names differ."
        )
    for each in adapters:
        if each.config.base_model_name_or_path or len(adapters) > 1:
            require_base(each, [base], any_base or len(named) == 1, reporter)
    return [str(each.config.base_model_name_or_path) for each in named.values()] if len(named) == 1 else []


def _leads_to(path: str, folder: str) -> bool:
    try:
        return os.path.realpath(os.path.expanduser(path)) == folder
    except ValueError:
        # Characters that no path has.
        return False


def model_name(reference: str) -> str | None:
    """What a model is called, in lower case, wherever it lies: the last part of a folder or of a name on the hub,
    without a revision (`name@revision`). None where that is no name."""
    parts = [part for part in reference.lower().replace("\\", "/").split("/") if part not in ("", ".", "..", "~")]
    for part in parts:
        if cached := _CACHED.fullmatch(part):
            return cached[1]
    if len(parts) > 1 and parts[-2] == "snapshots":
        del parts[-2:]
    if not parts:
        return None
    if _CHECKPOINT.fullmatch(parts[-1]):
        says_something = model_name("/".join(parts[:-1])) and not (len(parts) > 2 and parts[-3] in _HOMES)
        return "/".join(parts[-2:]) if says_something else None
    name = parts[-1].partition("@")[0]
    says_nothing = _COMMIT.fullmatch(name) or set(re.split("[-_]", name)) <= _NO_NAMES
    return None if says_nothing else name or None


def describe_adapter(adapter: AdapterSpec) -> AdapterOrigin:
    return {
        "source": adapter.source,
        "sha256": adapter.sha256,
        "family": adapter.family,
        "r": adapter.config.r,
        "num_experts": max(p.num_experts for p in adapter.projections.values()),
        "modules": len(adapter.projections),
        "parameters": adapter.num_parameters,
        "base": adapter.config.base_model_name_or_path,
    }


def describe_op(nodes: int, form: str, adapter_dtype: str | None, version: int = op.VERSION) -> OpForm:
    made: OpForm = {"domain": op.DOMAIN, "name": op.NAME, "version": version, "nodes": nodes, "form": form}
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


def refuse_cancelled_routing(adapter: AdapterSpec) -> None:
    """Refuse an adapter that the published layer computes no numbers with.

    Raises:
        ExportError: in some module M takes away from every expert what the router gives it.
    """
    raise_findings(
        f"{adapter.source}: the interaction matrix cancels the routing, so that the layer divides by zero for every "
        "token. Is its training whole?",
        [f"{path}: all rows of I + M sum to 0" for path, p in adapter.projections.items() if p.cancels_routing],
    )


def warn_of_kernels(adapter: AdapterSpec, reporter: Reporter) -> None:
    """Say what the CUDA kernels do not take of a graph that is traced with `adapter`."""
    beyond = [
        f"{path} ({p.num_experts} experts of rank {p.expert_rank})"
        for path, p in adapter.projections.items()
        if p.num_experts > op.MOST_EXPERTS_ON_GPU or p.num_experts * p.expert_rank > op.MOST_RANK_ON_GPU
    ]
    if beyond:
        reporter.warn(
            f"{len(beyond)} modules are larger than the CUDA kernels take, which is {op.MOST_EXPERTS_ON_GPU} experts "
            f"and a rank of {op.MOST_RANK_ON_GPU} of all together; the first is {beyond[0]}. Neither the TensorRT "
            "plugin nor the op for ONNX Runtime's CUDA provider runs this bundle."
        )


def warn_of_normalizers(adapter: AdapterSpec, reporter: Reporter) -> None:
    unsafe = list(adapter.unsafe_normalizers().items())
    for path, floor in unsafe[:MOST_WARNINGS]:
        reporter.warn(
            f"{path}: its routing normaliser can fall to {floor:.3g}; a token there divides by zero or flips sign."
        )
    if len(unsafe) > MOST_WARNINGS:
        rest = len(unsafe) - MOST_WARNINGS
        reporter.warn(f"{rest} more modules have such a normaliser; `teamlora-export inspect` lists them.")
