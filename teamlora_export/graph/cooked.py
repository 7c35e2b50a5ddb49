"""The arrays that recipes give: read from the base or folded from the adapter, transposed, joined, rounded, cast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache

import ml_dtypes
import numpy as np
import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.quantized import Codes, Scheme, quantised
from teamlora_export.graph.weights import OP_SOURCES, BaseWeights, Part, Quantised, Recipe, WeightTensor

# Of a transposed copy: rows at a time, and what lies between two of them beside their width.
_STRIP, _LINE = 128, 64


def adapter_weights(
    recipes: Mapping[str, Recipe], adapter: AdapterSpec, dtype: ir.DataType
) -> Iterator[tuple[str, np.ndarray]]:
    """The weights that an adapter alone decides, by name, made one at a time. An array is valid until the next but one.

    Raises:
        ExportError: a recipe needs a weight of the base.
    """
    kinds = {name: ir.DataType.FLOAT if recipe.parts[0].source == "mix" else dtype for name, recipe in recipes.items()}
    return make_weights(recipes, NoBase(), adapter, kinds)


def make_weights(
    recipes: Mapping[str, Recipe], base: BaseWeights, adapter: AdapterSpec, dtypes: Mapping[str, ir.DataType]
) -> Iterator[tuple[str, np.ndarray]]:
    """What each recipe gives in its dtype, by name, made one at a time. An array is valid until the next but one."""
    cook = Cook(base, adapter)
    for name, recipe in recipes.items():
        yield name, cook.make(recipe, dtypes[name])


class NoBase:
    def read(self, name: str) -> np.ndarray:
        raise ExportError(f"{name}: is the base's, and the adapter does not replace it. Export and build again.")


class Cook:
    """Makes arrays of recipes."""

    def __init__(self, base: BaseWeights, adapter: AdapterSpec) -> None:
        self._base = base
        self._adapter = adapter
        # A projection's three inputs are written one after the other.
        self._fold = lru_cache(maxsize=8)(lambda path: op.fold(adapter.projections[path]))
        # So are codes, scales and zero points.
        self._quantise = lru_cache(maxsize=1)(self._quantise_parts)
        # One is written to disk while the other is filled.
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def cook(self, tensor: WeightTensor) -> np.ndarray:
        """The tensor's values, contiguous. Valid until the call after the next."""
        array = self.make(tensor.recipe, tensor.dtype)
        given, shape = array.shape, tuple(tensor.shape.numpy())
        if given != shape:
            keys = ", ".join(part.key for part in tensor.recipe.parts)
            raise ExportError(
                f"{keys}: the checkpoint gives {list(given)}, the model's code expects {list(shape)}. "
                "Does config.json belong to these weights?"
            )
        return array

    def make(self, recipe: Recipe, dtype: ir.DataType) -> np.ndarray:
        """What a recipe gives, contiguous. Valid until the call after the next."""
        if recipe.quantised is not None:
            return self._make_quantised(recipe.parts, recipe.quantised, dtype)
        parts = [self._part(part, dtype) for part in recipe.parts]
        if len(parts) == 1 and parts[0].flags.c_contiguous:
            return parts[0]
        axis, first = recipe.axis, parts[0].shape
        others = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
        if len(others) > 1:
            sizes = ", ".join(
                f"{part.key} {list(array.shape)}" for part, array in zip(recipe.parts, parts, strict=True)
            )
            raise ExportError(f"{sizes}: do not fit beside each other. Does config.json belong to these weights?")
        shape = (*first[:axis], sum(part.shape[axis] for part in parts), *first[axis + 1 :])
        array = self._scratch(shape, parts[0].dtype)
        start = 0
        for part in parts:
            end = start + part.shape[axis]
            _copy(part, array[(slice(None),) * axis + (slice(start, end),)])
            start = end
        return array

    def _scratch(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Uninitialised memory, used again and again: fresh pages cost more than the copy into them."""
        size = math.prod(shape) * dtype.itemsize
        self._buffers.reverse()
        if self._buffers[0].size < size:
            self._buffers[0] = np.empty(size, np.uint8)
        return self._buffers[0][:size].view(dtype).reshape(shape)

    def _make_quantised(self, parts: tuple[Part, ...], rounding: Quantised, dtype: ir.DataType) -> np.ndarray:
        """Codes or zero points as they are; scales in `dtype`."""
        made = [getattr(codes, rounding.role) for codes in self._quantise(parts, rounding.scheme)]
        array = made[0] if len(made) == 1 else np.concatenate(made)
        return cast_weight(array, dtype, parts[0].key) if rounding.role == "scales" else array

    def _quantise_parts(self, parts: tuple[Part, ...], scheme: Scheme) -> list[Codes]:
        return [quantised(self._source(part).T if part.transposed else self._source(part), scheme) for part in parts]

    def _part(self, part: Part, dtype: ir.DataType) -> np.ndarray:
        array = cast_weight(self._source(part), dtype, part.key)
        return array.T if part.transposed else array

    def _source(self, part: Part) -> np.ndarray:
        if part.source in OP_SOURCES:
            return getattr(self._fold(part.key), part.source)
        if part.key in self._adapter.overrides:
            return self._adapter.overrides[part.key]
        return self._base.read(part.key)


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy; a transposed view in strips that stay in cache.

    A strip is first copied to rows of an odd number of cache lines: rows that lie a power of two apart, as a model's
    do, share so few places in the cache that reading across them is four times as slow.
    """
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    rows = source.T
    width = rows.shape[1]
    strip = np.empty((_STRIP, width + _LINE // source.itemsize), source.dtype)
    for start in range(0, len(rows), _STRIP):
        part = rows[start : start + _STRIP]
        strip[: len(part), :width] = part
        target[:, start : start + _STRIP] = strip[: len(part), :width].T


def cast_weight(array: np.ndarray, dtype: ir.DataType, name: str) -> np.ndarray:
    """`array` in `dtype`.

    Raises:
        ExportError: it holds a number beyond float16's range.
    """
    target = np.dtype(ml_dtypes.bfloat16) if dtype == ir.DataType.BFLOAT16 else dtype.numpy()
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    if dtype == ir.DataType.FLOAT16 and not np.isfinite(cast).all():
        worst = float(np.abs(array.astype(np.float64)).max())
        raise ExportError(
            f"{name}: holds {worst:g}, beyond float16's largest number 65504. Export with --dtype bf16 or fp32 "
            "(and without --adapter-dtype fp16)."
        )
    return cast
