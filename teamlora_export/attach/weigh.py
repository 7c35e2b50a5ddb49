"""Compares products with a base's weights: exactly, or as closely as quantised weights are.

A sample of the columns of each is compared, spread over all of them: it tells every two projections of a model apart,
and a model of many GB is compared in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from teamlora_export.attach.products import Product, Span, constant_of, release
from teamlora_export.errors import ExportError
from teamlora_export.graph.quantized import dequantised
from teamlora_export.model.checkpoint import SafetensorsWeights, read_extents
from teamlora_export.model.source import BaseSource

_SAMPLE = 16
# Four bits in blocks of 32 leave 0.99 of Gaussian weights; two bits 0.9. Different projections have none in common.
_LEAST = 0.85


class Weigher:
    """A base's weights, and those of the products that were compared so far.

    Raises:
        ExportError: the base's weights are not in safetensors.
    """

    def __init__(self, source: BaseSource) -> None:
        extents = read_extents(source)
        if not extents:
            raise ExportError(f"{source.name}: is compared with the graph, for which it must be in safetensors.")
        self._names = set(extents)
        self._weights = SafetensorsWeights(extents)
        self._samples: dict[tuple[Product, int, int], np.ndarray | None] = {}

    def problem(self, path: str, spans: Sequence[Span], products: Sequence[Product]) -> str | None:
        """What speaks against the module's being these products side by side; None: nothing does."""
        width = sum(span.end - span.start for span in spans)
        start = 0
        for span in spans:
            theirs = self._sample(span)
            ours = self._module(path, width, start + _chosen(span.end - span.start))
            start += span.end - span.start
            if not ours:
                return "the base has no weight of that name and shape"
            if theirs is None:
                # A form that is not read: names and places have to do.
                continue
            likeness = _likeness(ours, theirs)
            if not likeness > _LEAST:
                best = self._best(ours, span, products)
                hint = f"; {best} has its weights" if best else ""
                return f"has other weights in the base than {span} (correlation {likeness:.2f}){hint}"
        return None

    def alike(self, path: str, spans: Sequence[Span]) -> list[Span]:
        """Those of `spans` that have the module's weights."""
        found = []
        for span in spans:
            width = span.end - span.start
            ours = self._module(path, width, _chosen(width))
            if _likeness(ours, self._sample(span)) > _LEAST:
                found.append(span)
        return found

    def _best(self, part: Sequence[np.ndarray], span: Span, products: Sequence[Product]) -> str | None:
        """Another product with these weights."""
        size = span.end - span.start
        for product in products:
            borders = [(0, product.out_features), *((each.start, each.end) for each in product.parts)]
            for start, end in borders:
                other = Span(product, start, end)
                fits = end - start == size and product.in_features == span.product.in_features and other != span
                if fits and _likeness(part, self._sample(other)) > _LEAST:
                    return str(other)
        return None

    def _module(self, path: str, width: int, rows: np.ndarray) -> list[np.ndarray]:
        """Rows of the base's weight [out, in] of a module that gives `width` features; none where it has no such
        weight. Conv1D has its weight the other way round, which a square one does not show: both are given."""
        name = next((name for name in self._candidates(path) if name in self._names), None)
        shape = self._weights.shape(name) if name is not None else ()
        if name is None or len(shape) != 2:
            return []
        found = [self._weights.read_rows(name, rows)] if shape[0] == width else []
        return [*found, self._weights.read(name)[:, rows].T] if shape[1] == width else found

    def _candidates(self, path: str) -> list[str]:
        """Names of its weight: a checkpoint may leave the first word out, or have one more."""
        name = f"{path}.weight"
        longer = [each for each in self._names if each.endswith(f".{name}")]
        return [name, name.partition(".")[2], *longer]

    def _sample(self, span: Span) -> np.ndarray | None:
        """Chosen columns of a product's weight, float32 [columns, in]; None where its form is not read."""
        key = (span.product, span.start, span.end)
        if key not in self._samples:
            self._samples[key] = _columns(span.product, span.start + _chosen(span.end - span.start))
        return self._samples[key]


def _chosen(width: int) -> np.ndarray:
    """Which columns are compared."""
    return np.unique(np.linspace(0, width - 1, _SAMPLE).astype(np.int64))


def _columns(product: Product, columns: np.ndarray) -> np.ndarray | None:
    """Columns of a product's weight as it is multiplied by, float32 [columns, in]."""
    weight = _read_columns(product.node, columns)
    if weight is not None and product.scale is not None:
        weight *= product.scale.numpy().reshape(-1)
    release(product)
    return weight


def _read_columns(node: ir.Node, columns: np.ndarray) -> np.ndarray | None:
    tensor = constant_of(node.inputs[1])
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul") and tensor is not None:
        array = tensor.numpy()
        return (array[columns] if node.attributes.get_int("transB", 0) else array[:, columns].T).astype(np.float32)
    if node.op_type == "MatMulNBits":
        few = dequantised(_cut(node, columns))
        return few.T.copy() if few is not None else None
    whole = dequantised(node)
    return whole[:, columns].T.copy() if whole is not None else None


def _cut(node: ir.Node, columns: np.ndarray) -> ir.Node:
    """A MatMulNBits of some columns alone."""
    outputs = node.attributes["N"].as_int()
    inputs: list[ir.Value | None] = []
    for index, value in enumerate(node.inputs):
        tensor = constant_of(value)
        if index not in (1, 2, 3) or tensor is None:
            inputs.append(value if index else None)
            continue
        part = np.ascontiguousarray(tensor.numpy().reshape(outputs, -1)[columns])
        inputs.append(ir.Value(name=value.name, const_value=ir.tensor(part)))  # type: ignore[union-attr]
    attributes = [ir.AttrInt64("N", len(columns)), *(a for a in node.attributes.values() if a.name != "N")]
    return ir.Node(node.domain, node.op_type, inputs[:4], attributes)


def _likeness(ours: Sequence[np.ndarray], theirs: np.ndarray | None) -> float:
    """Of a module's weight, in one way or the other, and a product's."""
    return max((_correlation(each, theirs) for each in ours), default=0.0)


def _correlation(left: np.ndarray, right: np.ndarray | None) -> float:
    """Of two weights, 1 where they are equal."""
    if right is None or left.shape != right.shape:
        return 0.0
    a, b = left.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else float(np.array_equal(a, b))
