"""Quantised weights: how a matrix becomes codes of a few bits, and what codes mean.

A matrix [in, out] is cut along `in` into blocks. Each block of a column has a scale of its own, and a zero point where
the scheme has some; a code q stands for (q - zero point) * scale. They are laid out as `com.microsoft.MatMulNBits`
reads them. The rounding is ONNX Runtime's own, so that a model says the same whoever quantised it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

OP_TYPE, DOMAIN = "MatMulNBits", "com.microsoft"
# Columns that are quantised at a time: few enough to be little beside any model.
_STRIP = 256


@dataclass(frozen=True)
class Scheme:
    """How weights are quantised.

    Attributes:
        bits: of a code, 4 or 8.
        zero_points: each block has one, so that its range need not be symmetric around zero.
        block: weights that share a scale.
    """

    bits: int
    zero_points: bool = False
    block: int = 32

    def blocks(self, inputs: int) -> int:
        """Blocks of a column of so many weights; the last may be filled up."""
        return -(-inputs // self.block)

    def codes_shape(self, inputs: int, outputs: int) -> tuple[int, int, int]:
        return outputs, self.blocks(inputs), self.block * self.bits // 8

    def scales_shape(self, inputs: int, outputs: int) -> tuple[int, int]:
        return outputs, self.blocks(inputs)

    def zeros_shape(self, inputs: int, outputs: int) -> tuple[int, int]:
        return outputs, -(-self.blocks(inputs) * self.bits // 8)


@dataclass(frozen=True)
class Codes:
    """A quantised matrix [in, out].

    Attributes:
        codes: uint8 [out, blocks, block * bits / 8], the lowest bits first.
        scales: [out, blocks], floating-point.
        zeros: uint8 [out, ceil(blocks * bits / 8)], packed as the codes are, or floating-point [out, blocks]; None: all
            are half of the range.
        groups: [in], the block whose scale and zero point each row has (GPTQ's order of activations); None: its own.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    groups: np.ndarray | None = None

    def dequantised(self, inputs: int, bits: int, dtype: type[np.floating] = np.float32) -> np.ndarray:
        """The matrix that the codes mean, [in, out]; exact in float64, in float32 as a runtime computes it."""
        outputs, blocks = self.scales.shape
        codes = unpacked(self.codes, bits).astype(dtype)
        zeros: np.ndarray | int = 1 << (bits - 1)
        if self.zeros is not None:
            packed = self.zeros.dtype == np.uint8
            zeros = (unpacked(self.zeros, bits)[:, :blocks] if packed else self.zeros).astype(dtype)[..., None]
        scales = self.scales.astype(dtype)[..., None]
        if self.groups is not None:
            groups = self.groups[:inputs].astype(np.int64)
            codes = codes.reshape(outputs, -1)[:, :inputs, None]
            zeros = zeros if isinstance(zeros, int) else zeros[:, groups]
            scales = scales[:, groups]
        codes -= zeros
        codes *= scales
        return codes.reshape(outputs, -1)[:, :inputs].T


def quantised(matrix: np.ndarray, scheme: Scheme) -> Codes:
    """`matrix` [in, out], floating-point, rounded to codes by ONNX Runtime; scales are float32."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

    quantise = {4: quantize_matmul_4bits, 8: quantize_matmul_8bits}[scheme.bits]
    inputs, outputs = matrix.shape
    codes = np.zeros(scheme.codes_shape(inputs, outputs), np.uint8)
    scales = np.zeros(scheme.scales_shape(inputs, outputs), np.float32)
    zeros = np.zeros(scheme.zeros_shape(inputs, outputs), np.uint8)
    for start in range(0, outputs, _STRIP):
        strip = np.ascontiguousarray(matrix[:, start : start + _STRIP], np.float32)
        ends = (array[start : start + _STRIP] for array in (codes, scales, zeros))
        part, scale, zero = (array.reshape(-1) for array in ends)
        quantise(part, strip, scale, zero, scheme.block, strip.shape[1], inputs, not scheme.zero_points)
    return Codes(codes, scales, zeros if scheme.zero_points else None)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of `bits` from the bytes along the last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return numbers.reshape(*packed.shape[:-1], -1)


def is_quantised(node: ir.Node) -> bool:
    """Whether a node is a product with codes."""
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


def keep_activations(model: ir.Model) -> bool:
    """Let products with codes take their activations as they are, not rounded to 8 bits, in place; whether there are
    any."""
    nodes = list(filter(is_quantised, model.graph))
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return bool(nodes)


def dequantised(
    node: ir.Node, dtype: type[np.floating] = np.float32, columns: np.ndarray | None = None
) -> np.ndarray | None:
    """The weight that a product multiplies by, [in, out]; exact in float64, in float32 as a runtime computes it. None
    where the node is no product with a stored 2-D weight in a known form.

    Known are MatMul, Gemm and FusedMatMul (of a first input that is not transposed; alpha is part of the weight) and
    `com.microsoft.MatMulNBits` of 2, 4 or 8 bits and `MatMulBnb4`. The weight of the former may come through
    DequantizeLinear (for a tensor, an axis, or in blocks), Transpose and Cast.

    Args:
        columns: those alone are made; None: all.
    """
    if is_quantised(node):
        return _of_blocks(node, dtype, columns)
    if (node.domain, node.op_type) == (DOMAIN, "MatMulBnb4"):
        return _of_bnb4(node, dtype, columns)
    is_plain = (node.domain, node.op_type) in (("", "MatMul"), ("", "Gemm"), (DOMAIN, "FusedMatMul"))
    is_turned = any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if not is_plain or is_turned or len(node.inputs) < 2:
        return None
    is_transposed = node.attributes.get_int("transB", 0) != 0
    weight = read_stored(node.inputs[1], dtype, None if columns is None else (0 if is_transposed else 1, columns))
    if weight is None or weight.ndim != 2:
        return None
    if is_transposed:
        weight = weight.T
    return weight.astype(dtype) * dtype(node.attributes.get_float("alpha", 1.0))


def _of_blocks(node: ir.Node, dtype: type[np.floating], columns: np.ndarray | None) -> np.ndarray | None:
    given = [*node.inputs, None, None, None][1:5]
    codes, scales, zeros, groups = (read_stored(value, dtype) for value in given)
    if (
        codes is None
        or scales is None
        or any(a is None and v is not None for a, v in ((zeros, given[2]), (groups, given[3])))
    ):
        return None
    inputs, outputs, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    scheme = Scheme(node.attributes.get_int("bits", 4), zeros is not None, block)
    if zeros is not None:
        is_packed = zeros.dtype == np.uint8
        zeros = zeros.reshape(
            scheme.zeros_shape(inputs, outputs) if is_packed else scheme.scales_shape(inputs, outputs)
        )
    codes, scales = (
        codes.reshape(scheme.codes_shape(inputs, outputs)),
        scales.reshape(scheme.scales_shape(inputs, outputs)),
    )
    if columns is not None:
        codes, scales, zeros = (None if each is None else each[columns] for each in (codes, scales, zeros))
    assert codes is not None
    assert scales is not None
    return Codes(codes, scales, zeros, groups).dequantised(inputs, scheme.bits, dtype)


# What bitsandbytes' codes of 4 bits stand for, times a block's largest size: FP4, whose fourth bit is a sign, and NF4.
_FP4 = (0.0, 0.00520833333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_BNB4 = {0: (*_FP4, *(-number for number in _FP4)), 1: _NF4}


def _of_bnb4(node: ir.Node, dtype: type[np.floating], columns: np.ndarray | None) -> np.ndarray | None:
    """Blocks of the flattened weight [out, in], two codes a byte, the first in the upper half."""
    codes, sizes = (read_stored(value, dtype) for value in node.inputs[1:3])
    table = _BNB4.get(node.attributes.get_int("quant_type", 1))
    if codes is None or sizes is None or table is None or not node.attributes.get_int("transB", 1):
        return None
    inputs, outputs, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    places = (np.arange(outputs) if columns is None else columns)[:, None] * inputs + np.arange(inputs)
    packed = codes.reshape(-1).view(np.uint8)[places // 2]
    numbers = np.array(table, np.float32).astype(dtype)[np.where(places % 2, packed & 15, packed >> 4)]
    return (numbers * sizes.reshape(-1).astype(dtype)[places // block]).T


def read_stored(
    value: ir.Value | None, dtype: type[np.floating], some: tuple[int, np.ndarray] | None = None
) -> np.ndarray | None:
    """The numbers of a value that is stored, or computed of stored ones in a way that is known; None for any other.

    Args:
        dtype: that codes are dequantised in. What is stored as numbers stays in its own.
        some: an axis, and the indices along it that are read; None: all are.
    """
    if value is None:
        return None
    if value.is_initializer() or value.const_value is not None:
        return _taken(value.const_value.numpy(), some) if value.const_value is not None else None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Constant":
        tensor = node.attributes.get("value")
        return _taken(tensor.as_tensor().numpy(), some) if tensor is not None else None
    if node.op_type in ("Identity", "Cast"):
        # To another floating-point type: what that rounds, the runtime rounds as well.
        return read_stored(node.inputs[0], dtype, some)
    if node.op_type == "Transpose":
        order = list(node.attributes.get_ints("perm", ()))
        inner = some and ((order[some[0]] if order else 1 - some[0]), some[1])
        array = read_stored(node.inputs[0], dtype, inner)
        return array.transpose(order or None) if array is not None else None
    return _dequantise_linear(node, dtype, some) if node.op_type == "DequantizeLinear" else None


def _taken(array: np.ndarray, some: tuple[int, np.ndarray] | None) -> np.ndarray:
    return array if some is None else array.take(some[1], some[0])


def _dequantise_linear(
    node: ir.Node, dtype: type[np.floating], some: tuple[int, np.ndarray] | None
) -> np.ndarray | None:
    """(x - zero point) * scale, both for the whole tensor, along an axis, or in blocks of an axis."""
    given = [*node.inputs, None, None][:3]
    codes = read_stored(given[0], dtype, some)
    scales, zeros = (read_stored(value, dtype) for value in given[1:])
    if codes is None or scales is None or (given[2] is not None and zeros is None):
        return None
    axis, block = node.attributes.get_int("axis", 1) % codes.ndim, node.attributes.get_int("block_size", 0)
    numbers = codes.astype(dtype)
    if zeros is not None:
        numbers -= _spread(zeros, codes.shape, axis, block, some).astype(dtype)
    return numbers * _spread(scales, codes.shape, axis, block, some).astype(dtype)


def _spread(
    array: np.ndarray, shape: tuple[int, ...], axis: int, block: int, some: tuple[int, np.ndarray] | None
) -> np.ndarray:
    """Scales or zero points in a form that fits beside codes of `shape`, of which `some` were read."""
    if array.size == 1:
        return array.reshape(())
    is_cut = some is not None and some[0] == axis
    if block:
        if is_cut:
            return array.take(some[1] // block, axis)  # type: ignore[index]
        return np.repeat(_taken(array, some), block, axis).take(range(shape[axis]), axis)
    array = array.reshape(-1)
    return (array[some[1]] if is_cut else array).reshape([-1 if index == axis else 1 for index in range(len(shape))])  # type: ignore[index]
