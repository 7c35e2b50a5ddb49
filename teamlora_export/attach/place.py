"""What a product is by its place in the graph, whatever things are called.

A layer is an attention and what follows it. The queries, keys and values are what the attention reads, the output
projection reads what it gives; `down` reads the product of `up` and of what the activation makes of `gate`; `fc2` reads
what the activation makes of `fc1`. Layers are counted by their caches, or as they follow each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from teamlora_export.attach.names import Key
from teamlora_export.attach.products import Product

ATTENTIONS = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "SparseAttention", "PagedAttention")
_ACTIVATIONS = {
    *("Relu", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Silu", "Swish", "Sigmoid", "Tanh", "Erf", "HardSwish"),
    *("Mish", "Elu", "LeakyRelu", "Softplus", "HardSigmoid"),
}
# What changes no number of what it reads.
_MOVING = ("Cast", "Reshape", "Transpose", "Identity", "Unsqueeze", "Squeeze", "Split", "Slice", "Flatten")
_QUANTISING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
# Several projections in one product, in an order that the graph does not show -> what they are.
UNSPLIT: dict[tuple[str, ...], tuple[str, ...]] = {("qkv",): ("q", "k", "v"), ("gate_up",): ("gate", "up")}
HEAD = Key(None, ("lm_head",))
_CACHE = re.compile(r"past\D*(\d+)")


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from: a product, or a part of its columns."""

    product: Product
    part: int | None = None


@dataclass(frozen=True)
class _Attention:
    """What an attention reads, and the layer that its cache says."""

    queries: _Origin
    keys: _Origin
    values: _Origin
    layer: int | None


def find_places(products: Sequence[Product]) -> dict[Product, Key]:
    """What each of a graph's `products` is, as far as its place is known; layers are counted from 0. What gives the
    logits is `HEAD`."""
    return _Finder(products).find()


class _Finder:
    def __init__(self, products: Sequence[Product]) -> None:
        self._products = products
        self._origins: dict[ir.Value, _Origin] = {}
        for product in products:
            self._origins[product.output] = _Origin(product)
            for index, part in enumerate(product.parts):
                if part.value is not None:
                    self._origins[part.value] = _Origin(product, index)

    def find(self) -> dict[Product, Key]:
        attentions: list[tuple[Product, _Attention]] = []
        blocks: list[dict[Product, tuple[str, ...]]] = []
        for product in self._products:
            attention = self._attention_before(product.x)
            if attention is not None:
                attentions.append((product, attention))
            elif block := self._block_before(product):
                blocks.append(block)
        places: list[tuple[Product, Key]] = []
        for layer, (product, attention) in enumerate(_counted(attentions)):
            places.append((product, Key(layer, ("o",))))
            places += [(each, Key(layer, roles)) for each, roles in _roles_of_inputs(attention)]
        if len(blocks) == len(attentions):
            for layer, block in enumerate(blocks):
                places += [(product, Key(layer, roles)) for product, roles in block.items()]
        for product in self._products:
            if any(value.name == "logits" and value.is_graph_output() for value in self._moved_from(product.output)):
                places.append((product, HEAD))
        # What stands at two places is known by neither.
        times = Counter(product for product, _ in places)
        return {product: key for product, key in places if times[product] == 1}

    def _attention_before(self, x: ir.Value) -> _Attention | None:
        """The attention whose result is `x`."""
        for node in self._nodes_before(x):
            if node.op_type in ATTENTIONS:
                return self._operator(node)
            if self._is_of_values(node):
                shares = self._nodes_before(node.inputs[0])
                scores = next((each for each in shares if self._is_of_values(each)), None)
                softmax = next((each for each in shares if each.op_type == "Softmax"), None)
                factors = _queries_and_keys(scores) if scores is not None else None
                if factors is None or softmax is None or not _is_over_last(softmax):
                    return None
                return self._read_by([*factors, node.inputs[1]], node)
        return None

    def _operator(self, node: ir.Node) -> _Attention | None:
        given = [*node.inputs[:3], None, None][:3]
        packed = self._single(given[0])
        if given[1] is None and given[2] is None and packed is not None and len(packed.product.parts) == 3:
            parts = [_Origin(packed.product, index) for index in range(3)]
            return _Attention(parts[0], parts[1], parts[2], _layer_of(node.inputs))
        return self._read_by(given, node)

    def _read_by(self, values: Sequence[ir.Value | None], node: ir.Node) -> _Attention | None:
        queries, keys, numbers = (self._single(value) for value in values)
        if queries is None or keys is None or numbers is None:
            return None
        read = [value for each in (node, *self._nodes_before(values[1])) for value in each.inputs]
        return _Attention(queries, keys, numbers, _layer_of(read))

    def _block_before(self, product: Product) -> dict[Product, tuple[str, ...]] | None:
        """The feed-forward block whose last projection is `product`."""
        inner = self._single(product.x)
        if inner is None:
            return self._gated(product)
        between = {each.op_type for each in self._nodes_before(product.x)}
        if inner.part is not None or not between & _ACTIVATIONS or "Softmax" in between:
            return None
        # A classifier behind a pooler has the same form, but gives another width than it began with.
        if inner.product.in_features != product.out_features:
            return None
        if inner.product.out_features == 2 * product.in_features:
            return {inner.product: ("gate_up",), product: ("down",)}
        fits = inner.product.out_features == product.in_features
        return {inner.product: ("fc1",), product: ("fc2",)} if fits else None

    def _gated(self, product: Product) -> dict[Product, tuple[str, ...]] | None:
        """down(activation(gate) * up)."""
        node = self._maker(product.x)
        if node is None or node.op_type != "Mul":
            return None
        straight = [self._straight(value) for value in node.inputs]
        if straight.count(None) != 1:
            return None
        up = next(each for each in straight if each is not None)
        activated = node.inputs[straight.index(None)]
        gate = self._single(activated)
        between = {each.op_type for each in self._nodes_before(activated)}
        if gate is None or gate == up or not between & _ACTIVATIONS or up.product.in_features != product.out_features:
            return None
        if gate.product is not up.product:
            whole = gate.part is None and up.part is None
            return {gate.product: ("gate",), up.product: ("up",), product: ("down",)} if whole else None
        roles = {gate.part: "gate", up.part: "up"}
        if len(up.product.parts) != 2 or set(roles) != {0, 1}:
            return None
        return {up.product: (roles[0], roles[1]), product: ("down",)}

    def _moved_from(self, value: ir.Value) -> Iterator[ir.Value]:
        """A value, and what it is moved to at most."""
        yield value
        for node in value.consumers():
            if node.op_type in _MOVING and node.inputs[0] is value:
                yield from (each for made in node.outputs for each in self._moved_from(made))

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """The node that made the numbers of a value."""
        node = value.producer()
        while node is not None and node.op_type in (*_MOVING, *_QUANTISING) and value not in self._origins:
            value = node.inputs[0]  # type: ignore[assignment]
            node = value.producer() if value is not None else None
        return node

    def _straight(self, value: ir.Value | None) -> _Origin | None:
        """The product that a value is, moved at most."""
        while value is not None and value not in self._origins:
            node = value.producer()
            if node is None or node.op_type not in (*_MOVING, *_QUANTISING):
                return None
            value = node.inputs[0]
        return self._origins.get(value) if value is not None else None

    def _single(self, value: ir.Value | None) -> _Origin | None:
        """The one product that a value is computed of, none other in between; None where there are several."""
        found = {self._origins[each] for each in self._values_before(value) if each in self._origins}
        return found.pop() if len(found) == 1 else None

    def _is_of_values(self, node: ir.Node) -> bool:
        """Whether a node multiplies two values that are computed, as attention does."""
        if node.op_type not in ("MatMul", "FusedMatMul", "Einsum") or len(node.inputs) < 2:
            return False
        return all(any(each in self._origins for each in self._values_before(value)) for value in node.inputs[:2])

    def _nodes_before(self, value: ir.Value | None) -> list[ir.Node]:
        """The nodes between a value and the products that it is computed of, the nearest first."""
        found = (each.producer() for each in self._values_before(value) if each not in self._origins)
        return list(dict.fromkeys(node for node in found if node is not None))

    def _values_before(self, value: ir.Value | None) -> Iterator[ir.Value]:
        """What a value is computed of, back to products, the nearest first."""
        waiting = [value] if value is not None else []
        seen = set(waiting)
        for each in waiting:
            yield each
            node = each.producer()
            # What reads a size alone is not computed of the numbers.
            if each in self._origins or node is None or node.op_type in ("Shape", "Size"):
                continue
            for read in node.inputs:
                if read is not None and read not in seen:
                    seen.add(read)
                    waiting.append(read)


def _queries_and_keys(scores: ir.Node) -> tuple[ir.Value | None, ir.Value | None] | None:
    """The factors of attention's scores [.., queries, keys]; None where the node does not say which is which."""
    first, second = scores.inputs[:2]
    if scores.op_type != "Einsum":
        return first, second
    equation = scores.attributes["equation"].as_string() if "equation" in scores.attributes else ""
    match = re.fullmatch(r"(\w+),(\w+)->(\w+)", re.sub(r"\s|\.\.\.", "", equation))
    if match is None:
        return None
    has_keys = [match[3][-1] in match[factor] for factor in (1, 2)]
    return {(False, True): (first, second), (True, False): (second, first)}.get((has_keys[0], has_keys[1]))


def _is_over_last(softmax: ir.Node) -> bool:
    """Whether shares sum to one over the last axis."""
    axis, shape = softmax.attributes.get_int("axis", -1), softmax.outputs[0].shape
    return axis == -1 or axis == (len(shape) - 1 if shape is not None else 3)


def _counted(found: Sequence[tuple[Product, _Attention]]) -> list[tuple[Product, _Attention]]:
    """Attentions layer by layer: by the numbers of their caches where all have one of their own, as they follow each
    other elsewhere."""
    layers = [attention.layer for _, attention in found]
    if sorted(layer for layer in layers if layer is not None) == list(range(len(found))):
        return sorted(found, key=lambda each: each[1].layer or 0)
    return list(found)


def _roles_of_inputs(attention: _Attention) -> Iterator[tuple[Product, tuple[str, ...]]]:
    origins: Mapping[str, _Origin] = {"q": attention.queries, "k": attention.keys, "v": attention.values}
    if len(set(origins.values())) == 1:
        # Taken apart head by head, in an order that the graph does not show.
        yield attention.queries.product, ("qkv",)
        return
    if all(origin.part is None for origin in origins.values()):
        for role, origin in origins.items():
            yield origin.product, (role,)
        return
    by_part = {origin.part: role for role, origin in origins.items()}
    one = len({origin.product for origin in origins.values()}) == 1
    if one and set(by_part) == {0, 1, 2} and len(attention.queries.product.parts) == 3:
        yield attention.queries.product, (by_part[0], by_part[1], by_part[2])


def _layer_of(values: Sequence[ir.Value | None]) -> int | None:
    """The layer that the name of a cache says."""
    for value in values:
        match = _CACHE.search(value.name or "") if value is not None and value.is_graph_input() else None
        if match:
            return int(match[1])
    return None
