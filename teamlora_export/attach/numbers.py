"""The numbers of a product's weight, whatever its form: of the whole, or of the columns that are asked for."""

from __future__ import annotations

import numpy as np

from teamlora_export.attach.products import Integers, Product, release
from teamlora_export.graph.quantized import dequantised, read_stored


def weight_of(
    product: Product, dtype: type[np.floating] = np.float32, columns: np.ndarray | None = None
) -> np.ndarray | None:
    """The projection's weight in the model, [in, out]: with what was taken out of its rows. None where its form is not
    read.

    Args:
        columns: those alone are read, [in, columns]; None: all.
    """
    if product.integers is not None:
        weight = _of_integers(product.integers, dtype, columns)
    else:
        weight = dequantised(product.node, dtype, columns)
    release(product)
    if weight is None or weight.shape[0] != product.in_features:
        return None
    scaling = product.taken_out
    return weight if scaling is None else weight * scaling.numbers().astype(dtype)[:, None]


def _of_integers(integers: Integers, dtype: type[np.floating], columns: np.ndarray | None) -> np.ndarray | None:
    """(codes - zero point) * scale, one of each for all or for a column."""
    codes = read_stored(integers.codes, dtype, None if columns is None else (1, columns))
    scale, zero = read_stored(integers.scale, dtype), read_stored(integers.zero_point, dtype)
    if codes is None or scale is None or (zero is None and integers.zero_point is not None):
        return None
    numbers = codes.astype(dtype)
    if zero is not None:
        numbers -= _of_columns(zero, columns).astype(dtype)
    return numbers * _of_columns(scale, columns).astype(dtype)


def _of_columns(array: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    row = array.reshape(-1)
    return row if row.size == 1 or columns is None else row[columns]
