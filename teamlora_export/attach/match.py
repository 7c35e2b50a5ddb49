"""Which products of a foreign graph are the adapter's modules: by names, by place, by shapes, by weights.

    names     say the layer and the projection; places say the same without them; where both speak they must agree
    shapes    are those of the module, or the sum of several that are packed side by side
    weights   where a base is given, are the module's own, and no other product's are closer

Every module has exactly one product, or several that are side by side what it is, or nothing is attached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.attach.names import ROLES, Key, key_of, keys_of
from teamlora_export.attach.place import UNSPLIT, find_places
from teamlora_export.attach.products import Product, Span, find_products
from teamlora_export.attach.weigh import Weigher
from teamlora_export.errors import raise_findings

NAME, PLACE, WEIGHTS = "name", "place", "weights"
_MOST_SHOWN = 4


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


class _Claims:
    """What products are said to be.

    Attributes:
        spans: of each projection of a layer. packed: of several that are packed into one product.
        evidence: what says so, of each product.
        disputed: what is wrong with a product that is said to be two things, by each of these.
        unsplit: why it is not known where in a packed product a projection is.
    """

    def __init__(self, products: Sequence[Product], widths: Mapping[Key, int], proven: bool) -> None:
        self.spans: dict[Key, list[Span]] = defaultdict(list)
        self.packed: dict[Key, list[Span]] = defaultdict(list)
        self.evidence: dict[Product, tuple[str, ...]] = {}
        self.disputed: dict[Key, str] = {}
        self.unsplit: dict[Key, str] = {}
        self._widths, self._proven = widths, proven
        places = find_places(products)
        for product in products:
            self._add(product, places.get(product))

    def _add(self, product: Product, placed: Key | None) -> None:
        named = {key for each in keys_of(product.names) if (key := self._known(each)) is not None}
        if placed is not None and placed.layer is None and named:
            # A head has a name of each architecture's own.
            placed = None
        if placed is not None and placed.roles in UNSPLIT:
            self._add_unsplit(product, placed, named)
            return
        said = named | ({placed} if placed is not None else set())
        if len(said) > 1:
            text = f"its names say {_listed(named)}"
            text += f" and its place {placed}" if placed is not None else ""
            for key in said:
                for single in (key, *_singles(key)):
                    self.disputed[single] = f"{_title(product)}: {text}"
        elif said:
            key = said.pop()
            self.evidence[product] = (*([NAME] if named else []), *([PLACE] if placed is not None else []))
            if len(key.roles) > 1:
                self.packed[key].append(Span(product, 0, product.out_features))
                self._split(product, key, placed is not None)
            else:
                self.spans[key].append(Span(product, 0, product.out_features))

    def _add_unsplit(self, product: Product, placed: Key, named: set[Key]) -> None:
        """Several in one: a module that has them in one as well may be it, whatever their order."""
        kinds = [placed, Key(placed.layer, UNSPLIT[placed.roles])]
        if not named <= set(kinds):
            for key in (*named, *kinds, *_singles(kinds[1])):
                self.disputed[key] = f"{_title(product)}: its names say {_listed(named)} and its place {placed}"
            return
        self.evidence[product] = (*([NAME] if named else []), PLACE)
        self.spans[kinds[0]].append(Span(product, 0, product.out_features))
        self.packed[kinds[1]].append(Span(product, 0, product.out_features))
        self._split(product, kinds[1], placed=False)

    def _known(self, key: Key) -> Key | None:
        """What a name says, if that is a projection; a module outside of the layers may have more words in front."""
        if key in self._widths or set(key.roles) <= set(ROLES):
            return key
        words = key.roles[0].split(".")
        shorter = (Key(None, (".".join(words[start:]),)) for start in range(1, len(words)))
        return next((each for each in shorter if each in self._widths), None) if key.layer is None else None

    def _split(self, product: Product, key: Key, placed: bool) -> None:
        """Where in a packed product each projection is."""
        sizes = [part.end - part.start for part in product.parts]
        if len(sizes) != len(key.roles):
            sizes = [self._widths.get(single, 0) for single in _singles(key)]
        problem = None
        if sum(sizes) != product.out_features or 0 in sizes:
            problem = "does not show where each begins"
        elif not placed and not self._proven and len(set(sizes)) < len(sizes):
            problem = "has parts of one size, whose order nothing proves: give the base with --base"
        start = 0
        for single, size in zip(_singles(key), sizes, strict=True):
            if problem is not None:
                self.unsplit[single] = f"{_title(product)} packs {key}, and {problem}"
            else:
                self.spans[single].append(Span(product, start, start + size))
                start += size


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
    found, findings = find_modules(graph, sizes, weigher)
    if findings:
        findings.append(_summary(found, len(sizes)))
        findings += fused_findings(graph)
    raise_findings(f"{subject}: the adapter's modules are not all found in it, and nothing was attached", findings)
    return found


def find_modules(
    graph: ir.Graph, sizes: Mapping[str, tuple[int, int]], weigher: Weigher | None = None
) -> tuple[dict[str, Found], list[str]]:
    """The products of modules of sizes (in, out), as far as they are found; and what is wrong with the rest."""
    products = find_products(graph)
    keys = {path: key_of(path) or Key(None, (path,)) for path in sizes}
    claims = _Claims(products, {keys[path]: out for path, (_, out) in sizes.items()}, weigher is not None)
    found: dict[str, Found] = {}
    findings = []
    for path, (ins, outs) in sizes.items():
        answer = _find(keys[path], _Module(path, ins, outs), claims, products, weigher)
        if isinstance(answer, Found):
            found[path] = answer
        else:
            findings.append(f"{path}: {answer}")
    return found, findings + _doubled(found, products)


def _find(
    key: Key, module: _Module, claims: _Claims, products: Sequence[Product], weigher: Weigher | None
) -> Found | str:
    """The module's product, or what is wrong."""
    dispute = next((claims.disputed[each] for each in (key, *_singles(key)) if each in claims.disputed), None)
    if dispute is not None:
        return f"is contradicted by {dispute}"
    spans = claims.packed.get(key, []) if len(key.roles) > 1 else claims.spans.get(key, [])
    if len(spans) > 1:
        return f"is doubled: {_listed(spans)}"
    if not spans and len(key.roles) > 1:
        # The graph has a product for each of what the model packs.
        parts = [claims.spans.get(single, []) for single in _singles(key)]
        spans = [part[0] for part in parts] if all(len(part) == 1 and part[0].is_whole for part in parts) else []
    if spans:
        return _weighed(_fitting(tuple(spans), module, claims), module, products, weigher)
    if key in claims.unsplit:
        return f"is not found: {claims.unsplit[key]}"
    return _by_weights(module, claims, products, weigher)


def _fitting(spans: tuple[Span, ...], module: _Module, claims: _Claims) -> Found | str:
    ins = {span.product.in_features for span in spans}
    width = sum(span.end - span.start for span in spans)
    if ins != {module.in_features} or width != module.out_features:
        return (
            f"maps {module.in_features} to {module.out_features} features, and {_listed(spans)} "
            f"{_listed(sorted(ins))} to {width}. Was it trained on another model?"
        )
    if len({span.product.x for span in spans}) > 1:
        return f"is several products that read different values: {_listed(spans)}"
    evidence = [claims.evidence[span.product] for span in spans]
    return Found(spans, tuple(kind for kind in (NAME, PLACE) if all(kind in each for each in evidence)))


def _by_weights(module: _Module, claims: _Claims, products: Sequence[Product], weigher: Weigher | None) -> Found | str:
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
            return f"is doubled: {_listed(alike)} have its weights"
        if alike:
            return Found((alike[0],), (WEIGHTS,))
    return f"is missing: no product of [{module.in_features}, {module.out_features}] has its name or its place"


def _weighed(answer: Found | str, module: _Module, products: Sequence[Product], weigher: Weigher | None) -> Found | str:
    """The answer, if the base's weights do not speak against it."""
    if weigher is None or isinstance(answer, str):
        return answer
    problem = weigher.problem(module.path, answer.spans, products)
    return problem or Found(answer.spans, (*answer.evidence, WEIGHTS))


def _doubled(found: Mapping[str, Found], products: Sequence[Product]) -> list[str]:
    """Modules whose weights another product multiplies by as well."""
    owners = {span.product: path for path, answer in found.items() for span in answer.spans}
    by_weight: dict[ir.Value, list[Product]] = defaultdict(list)
    for product in products:
        by_weight[product.weight].append(product)
    findings = []
    for product, path in owners.items():
        others = [other for other in by_weight[product.weight] if other is not product]
        if others:
            findings.append(f"{path}: is doubled: its weights are those of {_listed(map(_title, others))}")
    return findings


def _summary(found: Mapping[str, Found], wanted: int) -> str:
    kinds: dict[str, int] = defaultdict(int)
    for answer in found.values():
        kinds[" and ".join(answer.evidence)] += 1
    by = f" ({', '.join(f'{count} by {kind}' for kind, count in kinds.items())})" if kinds else ""
    return f"found: {len(found)} of {wanted} modules{by}"


# Operators that hold the weights of projections, and how to have these as products of their own.
_SWALLOWING = {
    **dict.fromkeys(
        ("Attention", "QAttention", "PackedAttention", "DecoderMaskedSelfAttention", "LongformerAttention"),
        "optimise without fusing attention (onnxruntime.transformers: FusionOptions.enable_attention = False; "
        "--disable_attention), or build with GroupQueryAttention",
    ),
    **dict.fromkeys(
        ("MoE", "QMoE"), "experts of a mixture are packed in it; adapt modules outside of the mixture alone"
    ),
    **dict.fromkeys(
        ("MatMulNBitsMlp", "MatMulNBitsQkv"),
        "switch the fusions of the execution provider off (save the model with optimisation level basic at most)",
    ),
    **dict.fromkeys(("FusedGemm", "GemmFastGelu", "FusedMatMulActivation"), "save the model unoptimised"),
}


def fused_findings(graph: ir.Graph) -> list[str]:
    """Operators of the graph that hold projections inside, with the option that avoids each."""
    held: dict[str, list[str]] = defaultdict(list)
    for node in graph:
        if node.op_type in _SWALLOWING and node.domain == "com.microsoft":
            held[node.op_type].append(node.name or "")
    return [
        f"com.microsoft.{kind} holds projections inside of it ({len(names)} nodes, the first is {names[0]:.120}): "
        f"{_SWALLOWING[kind]}"
        for kind, names in held.items()
    ]


def _title(product: Product) -> str:
    return f"{product.node.name or product.output.name:.120}"


def _singles(key: Key) -> list[Key]:
    return [Key(key.layer, (role,)) for role in key.roles]


def _listed(items: Iterable[object]) -> str:
    shown = [str(item) for item in items]
    rest = len(shown) - _MOST_SHOWN
    return ", ".join(shown[:_MOST_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
