"""What is in a foreign graph, and what of it an adapter could be attached to."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.attach.claims import adds_to
from teamlora_export.attach.fused import fused_findings
from teamlora_export.attach.interface import COUNTING
from teamlora_export.attach.names import ROLES, Key, keys_of
from teamlora_export.attach.place import ATTENTIONS, UNSPLIT, find_places
from teamlora_export.attach.products import Product, find_products
from teamlora_export.attach.read import Foreign
from teamlora_export.graph import op


@dataclass(frozen=True)
class Contents:
    """What is in a foreign graph.

    Attributes:
        operators: number of nodes of each, the most frequent first.
        products: number of products with a stored weight, by their form.
        attention: operators of attention. cache: how keys and values are kept, in words.
        modules: each kind of projection -> its layers, and what says so.
        unknown: products that neither a name nor a place says anything of.
        obstacles: why no adapter, or not every one, can be attached.
    """

    producer: str
    opset: int
    operators: dict[str, int]
    products: dict[str, int]
    attention: dict[str, int]
    cache: str
    modules: dict[str, str]
    unknown: int
    obstacles: list[str]


def describe(foreign: Foreign) -> Contents:
    """What is in `foreign`."""
    graph = foreign.graph
    products = find_products(graph)
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph)
    modules, unknown = _modules(products)
    opset = graph.opset_imports.get("", 0)
    obstacles = fused_findings(graph)
    if opset < op.OLDEST_OPSET:
        obstacles.append(f"opset {opset}: the op's definition needs {op.OLDEST_OPSET} at least")
    if not products:
        obstacles.append("no product with a stored weight")
    return Contents(
        producer=" ".join(filter(None, (foreign.model.producer_name, foreign.model.producer_version))) or "unknown",
        opset=opset,
        operators=dict(operators.most_common()),
        products=dict(Counter(_form(product) for product in products).most_common()),
        attention={name: count for name, count in operators.items() if name.rpartition(":")[2] in ATTENTIONS},
        cache=_cache(graph),
        modules=modules,
        unknown=unknown,
        obstacles=obstacles,
    )


def _form(product: Product) -> str:
    block = product.node.attributes.get_int("block_size", 0)
    zero_points = product.node.op_type == "MatMulNBits" and len(product.node.inputs) > 3 and product.node.inputs[3]
    parts = [product.form, *([f"blocks of {block}"] if block else []), *(["zero points"] if zero_points else [])]
    return ", ".join([*parts, product.dtype.name.lower()])


def _cache(graph: ir.Graph) -> str:
    caches = [value for value in graph.inputs if (value.name or "").startswith("past_key_values.")]
    if not caches:
        return "none"
    dtype = caches[0].dtype.name.lower() if caches[0].dtype is not None else "unknown"
    text = f"{len(caches)} inputs in {dtype}; growing"
    if any(node.op_type in COUNTING for node in graph):
        text += ", or one buffer that the runtime shares; rows of a batch are of one length"
    return text


def _modules(products: Sequence[Product]) -> tuple[dict[str, str], int]:
    """Kinds of projections with their layers, and how many products are none."""
    places = find_places(products)
    layers: dict[str, list[int]] = defaultdict(list)
    evidence: dict[str, set[str]] = defaultdict(set)
    unknown = 0
    for product in products:
        named = {key for key in keys_of(product.names) if set(key.roles) <= set(ROLES)}
        placed = places.get(product)
        key = placed if placed is not None and placed.roles not in UNSPLIT else next(iter(named), placed)
        if key is None or key.layer is None:
            unknown += key is None
            continue
        kind = "+".join(key.roles)
        layers[kind].append(key.layer)
        evidence[kind].add(_evidence(named, placed))
    return {kind: f"{_ranges(found)} ({', '.join(sorted(evidence[kind]))})" for kind, found in layers.items()}, unknown


def _evidence(named: set[Key], placed: Key | None) -> str:
    said = {key for key in named if placed is None or not adds_to(key, placed)}
    if len(said) > 1 or (said and placed is not None and placed.roles not in UNSPLIT and said != {placed}):
        return "CONTRADICTED"
    return " and ".join([*(["name"] if named else []), *(["place"] if placed is not None else [])])


def _ranges(numbers: Iterable[int]) -> str:
    """`0 - 3, 5`; a number that occurs twice is told."""
    counts = Counter(numbers)
    parts: list[list[int]] = []
    for number in sorted(counts):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    text = ", ".join(f"{start}" if start == end else f"{start} - {end}" for start, end in parts)
    doubled = [number for number, count in counts.items() if count > 1]
    return f"layers {text}" + (f"; DOUBLED in {', '.join(map(str, sorted(doubled)))}" if doubled else "")
