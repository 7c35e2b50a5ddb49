"""Weights as recipes while the graph is made, as bytes only when it is written.

A traced graph never holds a number of the model. Each of its weights is a `WeightTensor`: dtype, shape, and a
`Recipe` that says how to make it from the base checkpoint and the adapter (transpose, concatenate, fold). Passes
rewrite recipes (`transposed`, `joined`); `write_external_data` follows them, one tensor in memory at a time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.errors import ExportError
from teamlora_export.graph import op
from teamlora_export.graph.quantized import Codes, Scheme, quantised

# Large tensors start at multiples of the largest page size in use, so that every runtime can map them; small ones at
# multiples of a cache line. Constants that the code computed stay inside the model while they are small.
_PAGE, _LINE = 65536, 64
_LARGE, _SMALL = 1 << 20, 1024
_STRIP = 128
_BLOCK = 8 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)
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


def write_external_data(
    values: Iterable[ir.Value],
    base: BaseWeights,
    adapter: AdapterSpec,
    path: Path,
    progress: Callable[[int], None],
) -> str:
    """Write the weights of `values`, initializers of a model, to `path` and point them there. Those that share bytes in
    the file that they are in share them here.

    Args:
        progress: called with the number of bytes after each tensor.

    Returns:
        The SHA-256 of the file.

    Raises:
        ExportError: a weight is missing, has another shape than the graph, or does not fit the graph's dtype.
    """
    cook = _Cook(base, adapter)
    with _HashingWriter(path) as writer, ThreadPoolExecutor(1) as pool:
        pending: Future[int] | None = None
        written: dict[tuple[object, ...], int] = {}
        for value in values:
            tensor = value.const_value
            kept_inside = not isinstance(tensor, (WeightTensor, ir.ExternalTensor))
            if tensor is None or (kept_inside and tensor.nbytes < _SMALL):
                continue
            key = (tensor.path, tensor.offset, tensor.nbytes) if isinstance(tensor, ir.ExternalTensor) else None
            if key in written:
                progress(tensor.nbytes)
                value.const_value = _placed(tensor, path, written[key], tensor.nbytes)
                continue
            # Numbers of fewer than 8 bits stay packed.
            array = cook.cook(tensor) if isinstance(tensor, WeightTensor) else np.frombuffer(tensor.tobytes(), np.uint8)
            # The next tensor is made while this one is written: two in memory, both cores at work.
            if pending is not None:
                progress(pending.result())
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            offset = writer.place(data.nbytes)
            pending = pool.submit(writer.write, offset, data)
            if key is not None:
                written[key] = offset
            value.const_value = _placed(tensor, path, offset, data.nbytes)
        if pending is not None:
            progress(pending.result())
        return writer.finish()


def _placed(tensor: ir.TensorProtocol, path: Path, offset: int, size: int) -> ir.ExternalTensor:
    """What a tensor is in the file `path`."""
    shape, name = ir.Shape(tensor.shape.numpy()), tensor.name or ""
    return ir.ExternalTensor(path.name, offset, size, tensor.dtype, shape=shape, name=name, base_dir=path.parent)


def copy_hashed(source: BinaryIO, path: Path, progress: Callable[[int], None]) -> str:
    """Copy a file to the new file `path`, a block in memory at a time; its SHA-256."""
    with _HashingWriter(path) as writer:
        block = np.empty(_BLOCK, np.uint8)
        offset = 0
        while count := source.readinto(block.data):  # type: ignore[attr-defined]
            progress(writer.write(offset, block[:count]))
            offset += count
        return writer.finish()


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
    cook = _Cook(base, adapter)
    for name, recipe in recipes.items():
        yield name, cook.make(recipe, dtypes[name])


class NoBase:
    def read(self, name: str) -> np.ndarray:
        raise ExportError(f"{name}: is the base's, and the adapter does not replace it. Export and build again.")


class _HashingWriter:
    """Appends to a new file at aligned offsets, and hashes all of it on the way.

    Bytes go through one block that is hashed while it is written, past the page cache where the file system allows it:
    a cache would cost more than everything else here, and push the checkpoint out that is being read.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open_direct(path)
        self._digest = hashlib.sha256()
        self._end = 0
        self._flushed = 0
        self._block = mmap.mmap(-1, _BLOCK)
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> _HashingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        os.close(self._file)

    def place(self, size: int) -> int:
        """The offset for the next `size` bytes."""
        alignment = _PAGE if size >= _LARGE else _LINE
        offset = self._end + -self._end % alignment
        self._end = offset + size
        return offset

    def write(self, offset: int, data: np.ndarray) -> int:
        """Write bytes at `offset`, which `place` gave last; return their number."""
        for chunk in (memoryview(bytes(offset - self._written())), data.data):
            start = 0
            while start < len(chunk):
                at = self._block.tell()
                count = min(_BLOCK - at, len(chunk) - start)
                self._block[at : at + count] = chunk[start : start + count]
                self._block.seek(at + count)
                start += count
                if at + count == _BLOCK:
                    self._flush()
        return data.nbytes

    def finish(self) -> str:
        """Write what is left; the SHA-256 of the file."""
        size = self._written()
        self._flush()
        os.ftruncate(self._file, size)
        return self._digest.hexdigest()

    def _written(self) -> int:
        return self._flushed + self._block.tell()

    def _flush(self) -> None:
        """Write the block. A last one that is not full is written with what lies behind it; the file is cut later."""
        filled = self._block.tell()
        with memoryview(self._block) as block:
            written = self._pool.submit(_write_all, self._file, block[: filled + -filled % _PAGE])
            self._digest.update(block[:filled])
            written.result()
        self._flushed += filled
        self._block.seek(0)


def _open_direct(path: Path) -> int:
    """A new file to write past the page cache, or through it where the file system offers nothing else."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_all(file: int, data: memoryview) -> None:
    with data:
        done = 0
        while done < len(data):
            try:
                done += os.write(file, data[done:])
            except OSError as error:
                flags = fcntl.fcntl(file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                # The file system promised more than it does, or it is so full that only part of a page fits.
                fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)


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


class _Cook:
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
