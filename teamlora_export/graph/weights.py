"""Weights as recipes while the graph is made, as bytes only when it is written.

A traced graph never holds a number of the model. Each of its weights is a `WeightTensor`: dtype, shape, and a
`Recipe` that says how to make it from the base checkpoint and the adapter (transpose, concatenate, fold). Passes
rewrite recipes (`transposed`, `joined`); `cooked.py` follows them, and `external_data.py` writes what they give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from typing import NoReturn, Protocol

import numpy as np
import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.graph.quantized import Scheme

OP_SOURCES = ("down", "mix", "up")


class BaseWeights(Protocol):
    """Where base weights come from; `model/checkpoint.py` has the implementations."""

    def read(self, name: str) -> np.ndarray:
        """The parameter `name`, in the dtype it is stored in."""
        ...


@dataclass(frozen=True)
class Part:
    """One source tensor: a parameter of the base (`source="base"`), or an op input folded from an adapter's projection
    (`"down"`, `"mix"`, `"up"`; `key` is then the module path)."""

    source: str
    key: str
    transposed: bool = False


@dataclass(frozen=True)
class Quantised:
    """What of a quantised matrix a weight is: its `"codes"`, its `"scales"` or its `"zeros"`."""

    role: str
    scheme: Scheme


@dataclass(frozen=True)
class Recipe:
    """Parts concatenated along `axis`.

    Attributes:
        quantised: each part, a matrix [in, out], is rounded to codes first; `axis` is 0, that of `out`.
    """

    parts: tuple[Part, ...]
    axis: int = 0
    quantised: Quantised | None = None

    def to_json(self) -> str:
        fields: dict[str, object] = {
            "axis": self.axis,
            "parts": [[p.source, p.key, p.transposed] for p in self.parts],
        }
        if self.quantised is not None:
            fields["quantised"] = [self.quantised.role, *astuple(self.quantised.scheme)]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        fields = json.loads(text)
        role, *scheme = fields.get("quantised") or [""]
        rounding = Quantised(role, Scheme(*scheme)) if role else None
        return cls(tuple(Part(*part) for part in fields["parts"]), fields["axis"], rounding)

    def renamed(self, rename: Callable[[str], str]) -> Recipe:
        return replace(self, parts=tuple(replace(part, key=rename(part.key)) for part in self.parts))


class WeightTensor(ir.LazyTensor):
    """A tensor that is known by dtype, shape and recipe only; asking for its values is a programming error."""

    def __init__(self, name: str, dtype: ir.DataType, shape: tuple[int, ...], recipe: Recipe) -> None:
        super().__init__(self._refuse, dtype=dtype, shape=ir.Shape(shape), name=name)
        self.recipe = recipe

    def _refuse(self) -> NoReturn:
        raise RuntimeError(f"{self.name}: has no values before the external data is written")


class Zeros(ir.LazyTensor):
    """Nothing but zeros. In a file all of them share the same bytes."""

    def __init__(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
        def make() -> ir.TensorProtocol:
            return ir.tensor(np.zeros(shape, np.uint8), dtype=dtype, name=name)

        super().__init__(make, dtype=dtype, shape=ir.Shape(shape), name=name)


def recipe_of(value: ir.Value | None) -> Recipe | None:
    """The recipe behind an initializer, or None where it holds numbers or is no initializer."""
    tensor = value.const_value if value is not None else None
    return tensor.recipe if isinstance(tensor, WeightTensor) else None


def static_type(value: ir.Value) -> tuple[ir.DataType, tuple[int, ...]]:
    """dtype and shape of a value whose sizes are all known."""
    assert value.dtype is not None
    assert value.shape is not None
    return value.dtype, tuple(int(str(size)) for size in value.shape)


def bind(value: ir.Value, recipe: Recipe) -> None:
    """Make `value` (its type and static shape known) stand for what `recipe` gives."""
    value.const_value = WeightTensor(value.name or "", *static_type(value), recipe)


def new_weight(name: str, dtype: ir.DataType, shape: tuple[int, ...], recipe: Recipe) -> ir.Value:
    """An initializer value that is not yet part of a graph."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    bind(value, recipe)
    return value


def transposed(value: ir.Value) -> ir.Value | None:
    """The 2-D weight `value` with its axes exchanged, or None where its recipe cannot say that."""
    recipe = recipe_of(value)
    if recipe is None or len(recipe.parts) != 1 or value.shape is None or len(value.shape) != 2:
        return None
    part = recipe.parts[0]
    dtype, (rows, columns) = static_type(value)
    flipped = Recipe((replace(part, transposed=not part.transposed),), recipe.axis)
    return new_weight(f"{value.name}.T", dtype, (columns, rows), flipped)


def joined(name: str, values: list[ir.Value], axis: int) -> ir.Value | None:
    """The weights `values` concatenated along `axis`, or None where a recipe cannot say that."""
    recipes = [recipe_of(value) for value in values]
    parts: list[Part] = []
    for recipe in recipes:
        if recipe is None or (len(recipe.parts) > 1 and recipe.axis != axis):
            return None
        parts.extend(recipe.parts)
    dtype, sizes = static_type(values[0])
    total = sum(static_type(value)[1][axis] for value in values)
    return new_weight(name, dtype, (*sizes[:axis], total, *sizes[axis + 1 :]), Recipe(tuple(parts), axis))


def total_bytes(values: Iterable[ir.Value]) -> int:
    """Bytes of all weights among `values` that are recipes."""
    return sum(
        math.ceil(math.prod(t.shape.numpy()) * t.dtype.itemsize)
        for t in (value.const_value for value in values)
        if isinstance(t, WeightTensor)
    )


def base_names(model: ir.Model, adapter: AdapterSpec) -> set[str]:
    """The base's parameters that the weights of `model` are made of, without those that `adapter` replaces."""
    recipes = [recipe_of(value) for value in model.graph.initializers.values()]
    parts = [part for recipe in recipes if recipe for part in recipe.parts]
    return {part.key for part in parts if part.source not in OP_SOURCES and part.key not in adapter.overrides}
