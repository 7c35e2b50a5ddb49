"""Does this adapter belong to this base model? Everything that says no, at once.

A `BaseSignature` holds what an adapter can be compared with; `model/base.py` makes one without loading a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.errors import raise_findings


@dataclass(frozen=True)
class LinearShape:
    """One linear layer of a base. `transposed`: its weight is stored as [in, out] (`Conv1D`)."""

    in_features: int
    out_features: int
    has_bias: bool
    transposed: bool


@dataclass(frozen=True)
class BaseSignature:
    """Names and sizes of a base model: linear layers by module path, all parameters by name, and the attribute under
    which a model with a head keeps its body (`model`, `transformer`, `bert`)."""

    name: str
    linears: Mapping[str, LinearShape]
    parameters: Mapping[str, tuple[int, ...]]
    body_prefix: str


def align_with_base(adapter: AdapterSpec, base: BaseSignature) -> AdapterSpec:
    """The adapter with its paths as `base` names them, checked.

    An adapter trained on a model with a head names its modules `model.layers...`; the body alone calls them
    `layers...`, and the other way round. The variant that fits is taken.

    Raises:
        ExportError: modules that the base does not have, sizes of another model, targets without weights; all listed.
    """
    renamed = max(_variants(adapter, base), key=lambda variant: _count_known(variant, base))
    findings = [
        *_check_projections(renamed, base),
        *_check_targets(renamed, base),
        *_check_overrides(renamed, base),
    ]
    raise_findings(f"The adapter {adapter.source} does not fit the base {base.name}", findings)
    return renamed


def _variants(adapter: AdapterSpec, base: BaseSignature) -> list[AdapterSpec]:
    prefix = f"{base.body_prefix}." if base.body_prefix else ""
    without_head = {path.split(".", 1)[0] for path in adapter.projections}
    variants = [adapter]
    if prefix:
        variants.append(_rename(adapter, lambda name: prefix + name))
        variants.append(_rename(adapter, lambda name: name.removeprefix(prefix)))
    variants.extend(_rename(adapter, lambda name, h=head: name.removeprefix(f"{h}.")) for head in sorted(without_head))  # type: ignore[misc]
    return variants


def _rename(adapter: AdapterSpec, rename) -> AdapterSpec:  # type: ignore[no-untyped-def]
    projections = {rename(path): replace(p, path=rename(path)) for path, p in adapter.projections.items()}
    overrides = {rename(name): value for name, value in adapter.overrides.items()}
    return replace(adapter, projections=projections, overrides=overrides)


def _count_known(adapter: AdapterSpec, base: BaseSignature) -> int:
    return sum(path in base.linears for path in adapter.projections)


def _check_projections(adapter: AdapterSpec, base: BaseSignature) -> list[str]:
    findings = []
    for path, projection in adapter.projections.items():
        linear = base.linears.get(path)
        if linear is None:
            packed = _packed_owner(path, base)
            findings.append(
                f"{path}: the base keeps {packed}'s weights of all experts packed in one tensor, and adapters on these "
                "are not supported"
                if packed
                else f"{path}: the base has no linear layer of that name"
            )
            continue
        found = (projection.in_features, projection.out_features)
        if found != (linear.in_features, linear.out_features):
            findings.append(
                f"{path}: the adapter maps {found[0]} to {found[1]} features, "
                f"the base {linear.in_features} to {linear.out_features}. Was it trained on another model?"
            )
    return findings


def _packed_owner(path: str, base: BaseSignature) -> str | None:
    """The module at or above `path` whose parameters hold a mixture's experts together, [experts, .., ..]."""
    owners = {name.rpartition(".")[0] for name, shape in base.parameters.items() if len(shape) == 3}
    return next((owner for owner in owners if path == owner or path.startswith(f"{owner}.")), None)


def _check_targets(adapter: AdapterSpec, base: BaseSignature) -> list[str]:
    targets = adapter.config.target_modules
    if not targets or targets == "all-linear" or not any(path in base.linears for path in adapter.projections):
        return []
    missing = [p for p in base.linears if adapter.config.targets(p) and p not in adapter.projections]
    return [f"{path}: target_modules names it, but the checkpoint has no weights for it" for path in missing]


def _check_overrides(adapter: AdapterSpec, base: BaseSignature) -> list[str]:
    findings = []
    for name, value in adapter.overrides.items():
        shape = base.parameters.get(name)
        if shape is None:
            findings.append(f"{name}: the base has no parameter of that name")
        elif shape != value.shape:
            findings.append(f"{name}: is {list(value.shape)}, expected {list(shape)} as in the base")
    return findings
