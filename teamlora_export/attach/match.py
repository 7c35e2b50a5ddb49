"""Which products of a foreign graph are the adapter's modules: by names, by place, by shapes, by weights.

    names     say the layer and the projection; places say the same without them; where both speak they must agree
    shapes    are those of the module, or the sum of several that are packed side by side
    weights   where a base is given and the form is read, are the module's own

Every module has exactly one product, or several that are side by side what it is, or nothing is attached; and no two
have the same columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.claims import NAME, PLACE, Claims, listed, singles
from teamlora_export.attach.fused import fused_findings
from teamlora_export.attach.names import Key, are_apart, key_of, towers_of
from teamlora_export.attach.products import Product, Span, find_products
from teamlora_export.attach.stored import name_of
from teamlora_export.attach.weigh import Weigher
from teamlora_export.errors import raise_findings

WEIGHTS = "weights"


@dataclass(frozen=True)
class Found:
    """A module's product: one span, or whole products side by side; and what says so."""

    spans: tuple[Span, ...]
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class _Module:
    path: str
    in_features: int
    out_features: int


def match(graph: ir.Graph, adapter: AdapterSpec, subject: str, weigher: Weigher | None) -> dict[str, Found]:
    """The product of each of the adapter's modules.

    Args:
        subject: what the graph is, for messages.
        weigher: the base's weights, where they are given.

    Raises:
        ExportError: a module has no product, or several; names, places, shapes or weights contradict each other; all
            are listed.
    """
    sizes = {path: (p.in_features, p.out_features) for path, p in adapter.projections.items()}
    found, problems = find_modules(graph, sizes, weigher)
    findings = [f"{path}: {problem}" for path, problem in problems.items()]
    if findings:
        findings.append(_summary(found, len(sizes)))
        findings += fused_findings(graph)
    raise_findings(f"{subject}: the adapter's modules are not all found in it, and nothing was attached", findings)
    return found


def find_modules(
    graph: ir.Graph, sizes: Mapping[str, tuple[int, int]], weigher: Weigher | None = None
) -> tuple[dict[str, Found], dict[str, str]]:
    """The products of modules of sizes (in, out), as far as they are found; and of each of the rest what is wrong."""
    products = find_products(graph)
    keys = {path: key_of(path) or Key(None, (path,)) for path in sizes}
    claims = Claims(products, {keys[path]: out for path, (_, out) in sizes.items()})
    found: dict[str, Found] = {}
    problems: dict[str, str] = {}
    for path, (ins, outs) in sizes.items():
        answer = _find(keys[path], _Module(path, ins, outs), claims, products, weigher)
        if isinstance(answer, Found):
            found[path] = answer
        else:
            problems[path] = answer
    for path, problem in (*_doubled(found, products), *_overlapping(found)):
        problems.setdefault(path, problem)
    return {path: answer for path, answer in found.items() if path not in problems}, problems


def _find(
    key: Key, module: _Module, claims: Claims, products: Sequence[Product], weigher: Weigher | None
) -> Found | str:
    """The module's product, or what is wrong."""
    dispute = next((claims.disputed[each] for each in (key, *singles(key)) if each in claims.disputed), None)
    if dispute is not None:
        return f"is contradicted by {dispute}"
    said = claims.packed.get(key, []) if len(key.roles) > 1 else claims.spans.get(key, [])
    spans = [span for span in said if not _is_of_another_tower(span, module)]
    if said and not spans:
        return f"is missing: {listed(said)} is of another part of the model, by the words in front of its layer"
    if len(spans) > 1:
        return f"is doubled: {listed(spans)}"
    if not spans and len(key.roles) > 1:
        # The graph has a product for each of what the model packs.
        parts = [claims.spans.get(single, []) for single in singles(key)]
        spans = [part[0] for part in parts] if all(len(part) == 1 and part[0].is_whole for part in parts) else []
    if spans:
        answer = _weighed(_fitting(tuple(spans), module, claims), module, products, weigher)
        if isinstance(answer, Found) and key in claims.unproven and WEIGHTS not in answer.evidence:
            way_out = "give the base with --base" if weigher is None else "the form of its weights is not read"
            return f"is not found: {claims.unproven[key]}: {way_out}"
        return answer
    if key in claims.unsplit:
        return f"is not found: {claims.unsplit[key]}"
    return _by_weights(module, claims, products, weigher)


def _is_of_another_tower(span: Span, module: _Module) -> bool:
    return are_apart(towers_of([module.path]), towers_of(span.product.names))


def _fitting(spans: tuple[Span, ...], module: _Module, claims: Claims) -> Found | str:
    ins = {span.product.in_features for span in spans}
    width = sum(span.end - span.start for span in spans)
    if ins != {module.in_features} or width != module.out_features:
        return (
            f"maps {module.in_features} to {module.out_features} features, and {listed(spans)} "
            f"{listed(sorted(ins))} to {width}. Was it trained on another model?"
        )
    evidence = [claims.evidence[span.product] for span in spans]
    return Found(spans, tuple(kind for kind in (NAME, PLACE) if all(kind in each for each in evidence)))


def _by_weights(module: _Module, claims: Claims, products: Sequence[Product], weigher: Weigher | None) -> Found | str:
    """A module that names and places do not show: a product with its weights that is nothing else."""
    if weigher is not None:
        free = [
            Span(product, 0, product.out_features)
            for product in products
            if product not in claims.evidence
            and (product.in_features, product.out_features) == (module.in_features, module.out_features)
        ]
        alike = weigher.alike(module.path, free)
        if len(alike) > 1:
            return f"is doubled: {listed(alike)} have its weights"
        if alike:
            return Found((alike[0],), (WEIGHTS,))
    return f"is missing: no product of [{module.in_features}, {module.out_features}] has its name or its place"


def _weighed(answer: Found | str, module: _Module, products: Sequence[Product], weigher: Weigher | None) -> Found | str:
    """The answer, if the base's weights do not speak against it, and its products read one value."""
    if isinstance(answer, str):
        return answer
    spans, evidence = answer.spans, answer.evidence
    if weigher is not None:
        weighed = weigher.weigh(module.path, spans, products)
        if weighed.problem is not None:
            return weighed.problem
        spans, evidence = weighed.spans, (*evidence, *([WEIGHTS] if weighed.is_proven else []))
    if len({span.product.x for span in spans}) > 1:
        return f"is several products that read different values: {listed(spans)}"
    return Found(spans, evidence)


def _doubled(found: Mapping[str, Found], products: Sequence[Product]) -> Iterator[tuple[str, str]]:
    """Modules whose weights another product multiplies by as well."""
    by_weight: dict[ir.Value, list[Product]] = defaultdict(list)
    for product in products:
        by_weight[product.weight].append(product)
    for path, answer in found.items():
        for span in answer.spans:
            others = [each.node for each in by_weight[span.product.weight] if each.node is not span.product.node]
            if others:
                yield path, f"is doubled: its weights are those of {listed(map(name_of, others))}"


def _overlapping(found: Mapping[str, Found]) -> Iterator[tuple[str, str]]:
    """Modules that were found in the same columns."""
    by_node: dict[ir.Node, list[tuple[int, int, str]]] = defaultdict(list)
    for path, answer in found.items():
        for span in answer.spans:
            by_node[span.product.node].append((span.start, span.end, path))
    for node, columns in by_node.items():
        for start, end, path in columns:
            others = [each for first, last, each in columns if each != path and first < end and start < last]
            if others:
                yield path, f"is found in {name_of(node)}, and so is {listed(others)}: names do not tell them apart"


def _summary(found: Mapping[str, Found], wanted: int) -> str:
    kinds: dict[str, int] = defaultdict(int)
    for answer in found.values():
        kinds[" and ".join(answer.evidence)] += 1
    by = f" ({', '.join(f'{count} by {kind}' for kind, count in kinds.items())})" if kinds else ""
    return f"found: {len(found)} of {wanted} modules{by}"
