"""Compares products with a base's weights: exactly, or as closely as quantised weights are.

A sample of the columns of each is compared, spread over all of them: it tells every two projections of a model apart,
and a model of many GB is compared in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from teamlora_export.attach.likeness import likeness
from teamlora_export.attach.numbers import weight_of
from teamlora_export.attach.products import Product, Span
from teamlora_export.errors import ExportError
from teamlora_export.model.checkpoint import SafetensorsWeights, read_extents
from teamlora_export.model.source import BaseSource

_SAMPLE = 16


@dataclass(frozen=True)
class Weighed:
    """What a comparison of a module with products says.

    Attributes:
        spans: the products, read as the weights say; none where something speaks against them.
        problem: what speaks against the module's being these products.
        is_proven: weights were compared, and are the module's.
    """

    spans: tuple[Span, ...] = ()
    problem: str | None = None
    is_proven: bool = False


class Weigher:
    """A base's weights, and those of the products that were compared so far.

    Args:
        aliases: names of tensors -> names of those that they are tied to.

    Raises:
        ExportError: the base's weights are not in safetensors.
    """

    def __init__(self, source: BaseSource, aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        extents = read_extents(source)
        if not extents:
            raise ExportError(f"{source.name}: is compared with the graph, for which it must be in safetensors.")
        self._names = sorted(extents)
        self._aliases = aliases or {}
        self._weights = SafetensorsWeights(extents)
        self._samples: dict[tuple[object, ...], np.ndarray | None] = {}

    def knows(self, path: str) -> bool:
        """Whether the base has a weight of the module's name."""
        return self._name(path) is not None

    def weigh(self, path: str, spans: Sequence[Span], products: Sequence[Product]) -> Weighed:
        """Compare a module with products side by side; a factor ahead of one is taken for what the weights say it is.

        Args:
            products: all of the graph's, to say whose weights a module has.

        Raises:
            ExportError: several weights of the base may be the module's.
        """
        width = sum(span.end - span.start for span in spans)
        start, read, is_proven = 0, [], True
        for span in spans:
            ours = self._module(path, width, start + _chosen(span.end - span.start))
            start += span.end - span.start
            if not ours:
                return Weighed(problem="the base has no weight of that name and shape")
            if self._sample(span) is None:
                # A form that is not read: names and places have to do.
                read.append(span)
                is_proven = False
                continue
            same = next((each for each in _readings(span) if self._is_same(ours, each)), None)
            if same is None:
                return Weighed(problem=self._difference(ours, span, products))
            read.append(same)
        return Weighed(tuple(read), None, is_proven)

    def alike(self, path: str, spans: Sequence[Span]) -> list[Span]:
        """Those of `spans` that have the module's weights, read as these say."""
        found = []
        for span in spans:
            width = span.end - span.start
            ours = self._module(path, width, _chosen(width))
            found += [each for each in _readings(span) if self._is_same(ours, each)][:1]
        return found

    def _is_same(self, ours: Sequence[np.ndarray], span: Span) -> bool:
        theirs = self._sample(span)
        return theirs is not None and likeness(ours, theirs).is_same

    def _difference(self, ours: Sequence[np.ndarray], span: Span, products: Sequence[Product]) -> str:
        theirs = self._sample(span)
        assert theirs is not None
        found = likeness(ours, theirs)
        if found.problem is not None:
            return (
                f"has other weights in the base than {span}: there they are {found.problem} (as AWQ, SmoothQuant or a "
                "folded scale leaves them), and experts beside them would not be what they were trained to be"
            )
        best = self._best(ours, span, products)
        hint = f"; {best} has its weights" if best else ""
        return f"has other weights in the base than {span} (correlation {found.correlation:.2f}){hint}"

    def _best(self, part: Sequence[np.ndarray], span: Span, products: Sequence[Product]) -> str | None:
        """Another product with these weights."""
        size = span.end - span.start
        for product in products:
            borders = [(0, product.out_features), *((each.start, each.end) for each in product.parts)]
            for start, end in borders:
                other = Span(product, start, end)
                fits = end - start == size and product.in_features == span.product.in_features and other != span
                if fits and any(self._is_same(part, each) for each in _readings(other)):
                    return str(other)
        return None

    def _module(self, path: str, width: int, rows: np.ndarray) -> list[np.ndarray]:
        """Rows of the base's weight [out, in] of a module that gives `width` features; none where it has no such
        weight. Conv1D has its weight the other way round, which a square one does not show: both are given."""
        name = self._name(path)
        shape = self._weights.shape(name) if name is not None else ()
        if name is None or len(shape) != 2:
            return []
        found = [self._weights.read_rows(name, rows)] if shape[0] == width else []
        return [*found, self._weights.read(name)[:, rows].T] if shape[1] == width else found

    def _name(self, path: str) -> str | None:
        """Of its weight: a checkpoint may leave the first word out, or have one more.

        Raises:
            ExportError: several have one more.
        """
        for wanted in (f"{path}.weight", *self._aliases.get(f"{path}.weight", ())):
            for name in (wanted, wanted.partition(".")[2]):
                if name in self._weights:
                    return name
            longer = [each for each in self._names if each.endswith(f".{wanted}")]
            if len(longer) > 1:
                raise ExportError(
                    f"{path}: may be {longer[0]:.120} or {longer[1]:.120} of the base. Give another base."
                )
            if longer:
                return longer[0]
        return None

    def _sample(self, span: Span) -> np.ndarray | None:
        """Chosen columns of a product's weight, float32 [columns, in]; None where its form is not read."""
        product = span.product
        key = (product.node, product.x, span.start, span.end)
        if key not in self._samples:
            few = weight_of(product, columns=span.start + _chosen(span.end - span.start))
            self._samples[key] = few.T.copy() if few is not None else None
        return self._samples[key]


def _readings(span: Span) -> list[Span]:
    """A span as it seems to be, and with the factor ahead of it taken for the other of what it may be."""
    otherwise = span.product.read_otherwise()
    return [span, *([Span(otherwise, span.start, span.end)] if otherwise is not None else [])]


def _chosen(width: int) -> np.ndarray:
    """Which columns are compared."""
    return np.unique(np.linspace(0, width - 1, _SAMPLE).astype(np.int64))
