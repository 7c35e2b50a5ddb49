"""The kernels from Python: a library with the C functions of plugins/tests/interface.cpp, for a GPU or emulated."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

MOST_SIBLINGS = 4
_MOST_LAUNCHES = 4
# Of teamlora::MixedExpertTensors.
_TENSORS = 7
# In the order of teamlora::DataType.
DTYPES = ("fp32", "fp16", "bf16")
ELEMENT_SIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
_FEW, _MANY = ("few_down", "few_up"), ("many_down", "many_route", "many_up")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call of the op.

    Attributes:
        tokens: rows of x. inputs: columns of x.
        experts: k. expert_rank: c, rows of `up` of one expert.
        outs: widths of the siblings.
        shared_down: every expert reads all of u: a = c instead of a = k c.
        slots: of adapters in `down`, `mix` and `up`; 0: they are one adapter's, and there are no indices.
        batch: rows of the batch, each with an index of its own, where there are slots.
    """

    dtype: str
    tokens: int
    inputs: int
    experts: int
    expert_rank: int
    outs: tuple[int, ...]
    shared_down: bool = False
    slots: int = 0
    batch: int = 0

    @property
    def row_tokens(self) -> int:
        """Tokens of each row that has an index, or 0."""
        return self.tokens // self.batch if self.batch else 0

    @property
    def up_rank(self) -> int:
        return self.experts * self.expert_rank

    @property
    def down_rank(self) -> int:
        return self.expert_rank if self.shared_down else self.up_rank

    @property
    def sibling_rows(self) -> int:
        return self.down_rank + self.experts

    @property
    def rows(self) -> int:
        """Of `down`, and columns of z."""
        return len(self.outs) * self.sibling_rows

    @property
    def out(self) -> int:
        return sum(self.outs)

    @property
    def least_bytes(self) -> int:
        """That a call must move: each input read once, y written once."""
        return ELEMENT_SIZE[self.dtype] * self.tokens * (self.inputs + 2 * self.out) + self.weight_bytes

    @property
    def weight_bytes(self) -> int:
        """Of one adapter."""
        elements = self.rows * self.inputs + self.up_rank * self.out
        return ELEMENT_SIZE[self.dtype] * elements + 4 * len(self.outs) * self.experts**2


@dataclass(frozen=True)
class Tuning:
    """teamlora::Tuning: what decides beside the sizes how a call is cut into blocks."""

    multiprocessors: int
    overlaps: bool = True
    few_tokens: int = 32
    few_slices: int = 16
    blocks_each: int = 2
    split_width: int = 256
    column_tiles: int = 9


@dataclass(frozen=True)
class Launch:
    """One kernel of a call: its grid, threads of a block, and bytes of shared memory."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int

    @property
    def blocks(self) -> int:
        x, y, z = self.grid
        return x * y * z


class _Shape(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("inputs", ctypes.c_int32),
        ("num_experts", ctypes.c_int32),
        ("expert_rank", ctypes.c_int32),
        ("shared_down", ctypes.c_bool),
        ("num_siblings", ctypes.c_int32),
        ("out_splits", ctypes.c_int32 * MOST_SIBLINGS),
        ("slots", ctypes.c_int32),
        ("row_tokens", ctypes.c_int64),
    )


class _Tuning(ctypes.Structure):
    _fields_ = tuple(
        (field.name, ctypes.c_bool if field.name == "overlaps" else ctypes.c_int32) for field in fields(Tuning)
    )


class _Launch(ctypes.Structure):
    _fields_ = (("grid", ctypes.c_int32 * 3), ("threads", ctypes.c_int32), ("shared_bytes", ctypes.c_int64))


class Kernels:
    """A library of the kernels.

    Args:
        path: of what `build.py` or plugins/CMakeLists.txt compiles from plugins/tests/interface.cpp.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.teamlora_workspace_bytes.restype = ctypes.c_size_t
        self._library.teamlora_workspace_bound.restype = ctypes.c_size_t
        self._library.teamlora_unsupported.restype = ctypes.c_char_p

    def tuning(self) -> Tuning:
        """That of the current device.

        Raises:
            RuntimeError: it cannot be asked.
        """
        answer = _Tuning()
        _check(self._library.teamlora_tuning(ctypes.byref(answer)), "the device cannot be asked")
        return Tuning(**{field.name: getattr(answer, field.name) for field in fields(Tuning)})

    def workspace_bytes(self, sizes: Sizes, tuning: Tuning) -> int:
        return self._library.teamlora_workspace_bytes(_shape(sizes), _tuning(tuning))

    def workspace_bound(self, sizes: Sizes, tuning: Tuning) -> int:
        """No less than any number of tokens up to that of `sizes` needs, on any GPU, with the constants of `tuning`."""
        return self._library.teamlora_workspace_bound(_shape(sizes), _tuning(tuning))

    def unsupported(self, sizes: Sizes) -> str | None:
        """Why the kernels cannot take it."""
        reason = self._library.teamlora_unsupported(_shape(sizes))
        return reason and reason.decode()

    def launch(
        self, sizes: Sizes, tuning: Tuning, pointers: Sequence[int], workspace: int, stream: int = 0, schedule: int = 0
    ) -> None:
        """Enqueue the op. `pointers`: x, base, down, mix, up, y, and with slots adapter. `schedule`: of the emulation.

        Raises:
            RuntimeError: it could not be launched.
        """
        if hasattr(self._library, "teamlora_set_schedule"):
            self._library.teamlora_set_schedule(ctypes.c_uint64(schedule))
        tensors = (ctypes.c_void_p * _TENSORS)(*pointers)
        arguments = (_shape(sizes), _tuning(tuning), tensors, ctypes.c_void_p(workspace), ctypes.c_void_p(stream))
        _check(self._library.teamlora_launch(*arguments), f"{sizes} could not be launched")

    def launches(self, sizes: Sizes, tuning: Tuning) -> list[Launch]:
        """What a call of these sizes launches, of an emulated library, which does not run it."""
        found = (_Launch * _MOST_LAUNCHES)()
        count = self._library.teamlora_launches(_shape(sizes), _tuning(tuning), found, _MOST_LAUNCHES)
        names = {len(_FEW): _FEW, len(_MANY): _MANY, 0: ()}[count]
        return [
            Launch(name, tuple(one.grid), one.threads, one.shared_bytes)
            for name, one in zip(names, found[:count], strict=True)
        ]


def _shape(sizes: Sizes) -> ctypes.Array[_Shape]:
    splits = (ctypes.c_int32 * MOST_SIBLINGS)(*sizes.outs)
    shape = _Shape(
        DTYPES.index(sizes.dtype),
        sizes.tokens,
        sizes.inputs,
        sizes.experts,
        sizes.expert_rank,
        sizes.shared_down,
        len(sizes.outs),
        splits,
        sizes.slots,
        sizes.row_tokens,
    )
    return (_Shape * 1)(shape)


def _tuning(tuning: Tuning) -> ctypes.Array[_Tuning]:
    return (_Tuning * 1)(_Tuning(*(getattr(tuning, field.name) for field in fields(Tuning))))


def _check(code: int, what: str) -> None:
    if code != 0:
        raise RuntimeError(f"{what} (CUDA error {code})")
