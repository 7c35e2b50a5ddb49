"""The base's parameters that a bundle's file holds as codes, as these say them: what both PyTorch models compute with.

So an export is judged apart from what quantisation costs. That the codes are right is another check: `stored.py` makes
them again from their sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from teamlora_export.graph.quantized import Codes, Scheme
from teamlora_export.graph.weights import Part, Recipe


@dataclass
class _Matrix:
    """A quantised matrix: its parts, side by side along `out`, and the names of what holds it."""

    parts: tuple[Part, ...]
    scheme: Scheme
    names: dict[str, str] = field(default_factory=dict)


class HeldAsCodes:
    """Parameters by name.

    Args:
        model: the graph as it is in the file.
        recipes: of its weights.
        shapes: of all of the base's parameters.
    """

    def __init__(self, model: ir.Model, recipes: Mapping[str, Recipe], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._initializers, self._shapes = model.graph.initializers, shapes
        matrices: dict[tuple[tuple[Part, ...], Scheme], _Matrix] = {}
        for name, recipe in recipes.items():
            if recipe.quantised is not None:
                key = recipe.parts, recipe.quantised.scheme
                matrices.setdefault(key, _Matrix(*key)).names[recipe.quantised.role] = name
        whole = filter(self._is_whole, matrices.values())
        self._matrices = {part.key: (matrix, part) for matrix in whole for part in matrix.parts}

    def __iter__(self) -> Iterator[str]:
        """Names of the parameters. One whose codes are missing, or of another shape, is not among them."""
        return iter(self._matrices)

    def read(self, name: str) -> np.ndarray:
        """The parameter, float64, in the base's own orientation."""
        matrix, part = self._matrices[name]
        start = sum(self._sizes(each)[1] for each in matrix.parts[: matrix.parts.index(part)])
        inputs, outputs = self._sizes(part)
        rows = {role: self._array(name)[start : start + outputs] for role, name in matrix.names.items()}
        codes = Codes(rows["codes"], rows["scales"], rows.get("zeros"))
        meant = codes.dequantised(inputs, matrix.scheme.bits, np.float64)
        return meant.T if part.transposed else meant

    def _is_whole(self, matrix: _Matrix) -> bool:
        if not all(len(self._shapes.get(part.key, ())) == 2 for part in matrix.parts):
            return False
        inputs, outputs = self._sizes(matrix.parts[0])[0], sum(self._sizes(part)[1] for part in matrix.parts)
        scheme = matrix.scheme
        expected = {
            "codes": scheme.codes_shape(inputs, outputs),
            "scales": scheme.scales_shape(inputs, outputs),
            **({"zeros": scheme.zeros_shape(inputs, outputs)} if scheme.zero_points else {}),
        }
        found = {role: self._initializers.get(name) for role, name in matrix.names.items()}
        return expected == {
            role: tuple(value.const_value.shape.numpy())
            for role, value in found.items()
            if value is not None and value.const_value is not None
        }

    def _sizes(self, part: Part) -> tuple[int, int]:
        """in, out"""
        rows, columns = self._shapes[part.key]
        return (columns, rows) if part.transposed else (rows, columns)

    def _array(self, name: str) -> np.ndarray:
        tensor = self._initializers[name].const_value
        assert tensor is not None
        array = np.array(tensor.numpy())
        if isinstance(tensor, ir.ExternalTensor):
            # It would stay mapped, and the whole model with it in the end.
            tensor.release()
        return array
