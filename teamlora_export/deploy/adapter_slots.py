"""The adapters of a model that takes one for each row of a batch: files beside it, and slots in memory.

    shelf = session.adapters
    held = shelf.find("support")            what that name stands for now; an unknown one is an error
    slot = shelf.reserve(held)              in one of the slots, or read into it by a thread of the shelf's own
    shelf.is_filled(slot)                   whether it is there; `take` waits until it is
    shelf.give(slot)                        needed no more

What describes the model's folder lists its adapters, and is looked at again whenever it has changed: one that is added,
replaced or removed while the model serves is so for the requests that come. Those that are at work keep theirs: the
slot of an adapter that is reserved is not written to. Of the others, the one that was given back first makes room.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.device_tensor import DeviceTensor
    from teamlora_export.deploy.failure import DeviceError, ModelError
else:
    # Deployed: the files lie beside one another.
    from device_tensor import DeviceTensor
    from failure import DeviceError, ModelError

# Of the input that has each row's slot, and what it is where a row has no adapter.
ADAPTER, NO_ADAPTER = "adapter", -1
# NumPy has no bfloat16: by its bits.
_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_LARGEST_HEADER = 64 << 20
# Threads that read adapters, at most: one that waits for a slow disk does not keep the next from being read.
READERS = 2
# By the input's name, on the host or on a device.
Memory = Mapping[str, np.ndarray | DeviceTensor]


@dataclass(frozen=True, eq=False)
class Shelved:
    """An adapter as it was on the shelf when it was asked for.

    Attributes:
        file: its file, open: it can be read when it is on the shelf no more. sha256: of it.
    """

    name: str
    path: Path
    sha256: str
    file: BufferedReader

    @property
    def key(self) -> tuple[Path, str]:
        """What tells its content in memory from all others'."""
        return self.path, self.sha256


@dataclass(eq=False)
class _Load:
    """An adapter that is read into a slot.

    Attributes:
        before: what is in the slot until the first number is written, by its key.
        failure: why it cannot be read; empty while that is not known. error: what that is.
    """

    adapter: Shelved
    before: tuple[Path, str] | None
    failure: str = ""
    error: type[ModelError] = ModelError


class Adapters:
    """The shelf of one open model; any number of threads may use it.

    Args:
        inputs: the model's inputs for slots: name -> shape of one slot, NumPy type.
        slots: how many adapters are in memory at a time.
        listed: what describes the folder, read anew: name -> file, SHA-256.
        stamp: something that is another when the description is.
        check: compare a file with its hash when it is read.
        make: a tensor of zeros of a shape and a NumPy type, where the slots are to be.

    Attributes:
        memory: the slots of each input, [slots, ..], which stay where they are.
        filled: how often one of them was written to.
        used: when a text last went on, with an adapter or without, by `time.monotonic`.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, tuple[tuple[int, ...], type]],
        slots: int,
        listed: Callable[[], Mapping[str, tuple[str, str]]],
        stamp: Callable[[], object],
        check: bool = True,
        make: Callable[[tuple[int, ...], type], Any] = np.zeros,
    ) -> None:
        self.memory: dict[str, Any] = {name: make((slots, *shape), kind) for name, (shape, kind) in inputs.items()}
        self.filled = 0
        self.used = 0.0
        self._folder, self._listed, self._stamp, self._check = folder, listed, stamp, check
        # Of the list. What it takes to read it holds up nobody who has an adapter.
        self._listing = threading.Lock()
        self._seen: object = None
        self._shelf: Mapping[str, tuple[str, str]] = {}
        # Those that are in use, by key: requests of one adapter share its open file.
        self._opened: weakref.WeakValueDictionary[tuple[str, Path, str], Shelved] = weakref.WeakValueDictionary()
        # Of all that follows. Taken again by the one who has it, where Python frees a text's rows in the middle of a
        # call.
        self._changed = threading.Condition(threading.RLock())
        # In each slot: what, by its key, and how many have reserved it. Free ones in the order in which they became so.
        self._content: list[tuple[Path, str] | None] = [None] * slots
        self._users = [0] * slots
        self._free = list(range(slots))
        # By slot: what is being read, or could not be and has users yet. The reader is one of the slot's users.
        self._loads: dict[int, _Load] = {}
        self._unread: deque[int] = deque()
        self._readers = 0

    @property
    def names(self) -> list[str]:
        """What is on the shelf."""
        with self._listing:
            return sorted(self._current())

    @property
    def slots(self) -> int:
        return len(self._content)

    def take_last_first(self) -> None:
        """From now on, of slots that have had nothing, the last one is the first to be used."""
        with self._changed:
            self._free.sort(key=lambda slot: (self._content[slot] is not None, -slot))

    def find(self, name: str) -> Shelved:
        """The adapter of that name.

        Raises:
            ModelError: there is none, or its file cannot be opened.
        """
        with self._listing:
            before = None
            while True:
                shelf = self._current()
                if name not in shelf:
                    known = sorted(shelf)
                    some = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
                    raise ModelError(f"There is no adapter {name!r:.80}; there are {some or 'none'}.")
                file, sha256 = shelf[name]
                path = self._folder / file
                try:
                    adapter = self._opened.get((name, path, sha256))
                    if adapter is None:
                        adapter = Shelved(name, path, sha256, open_regular(path))
                        self._opened[name, path, sha256] = adapter
                    return adapter
                except OSError as error:
                    # It may have been replaced since the list was read.
                    if self._seen == before:
                        raise ModelError(f"{path}: cannot be read ({error.strerror or error}).") from None
                    before, self._seen = self._seen, None

    def take(self, adapter: Shelved) -> int | None:
        """As `reserve`, when the adapter is there.

        Raises:
            ModelError: its file is not what belongs there; no slot has changed.
        """
        slot = self.reserve(adapter)
        if slot is not None:
            self.wait(slot)
        return slot

    def reserve(self, adapter: Shelved) -> int | None:
        """The slot that it is in, or is read into in the background; None where others are at work in all of them.

        It is the caller's until it is given back.
        """
        with self._changed:
            slot = self._slot_of(adapter)
            if slot is not None:
                self._users[slot] += 1
                if slot in self._free:
                    self._free.remove(slot)
            elif self._free:
                slot = self._free.pop(0)
                # The caller, and the one who reads.
                self._users[slot] = 2
                self._begin(slot, adapter)
            return slot

    def is_filled(self, slot: int) -> bool:
        """Whether the adapter for which a slot is reserved is there.

        Raises:
            ModelError: its file is not what belongs there; the slot is given back, and what was in it is.
            DeviceError: it cannot be written there.
        """
        with self._changed:
            load = self._loads.get(slot)
            if load is None or not load.failure:
                return load is None
            self.give(slot)
            raise load.error(load.failure)

    def wait(self, slot: int) -> None:
        """Until `is_filled`; raises as that does."""
        with self._changed:
            while not self.is_filled(slot):
                self._changed.wait()

    def give(self, slot: int) -> None:
        """One who has reserved a slot needs it no more."""
        with self._changed:
            self._users[slot] -= 1
            if self._users[slot] > 0:
                return
            load = self._loads.pop(slot, None)
            if load is None:
                self._free.append(slot)
            else:
                # Nothing has come of it.
                self._content[slot] = load.before
                self._free.insert(0, slot)

    def _slot_of(self, adapter: Shelved) -> int | None:
        # The same content in another file may be damaged there, or be listed with a hash that is not its own.
        if adapter.key in self._content:
            return self._content.index(adapter.key)
        for slot, load in self._loads.items():
            if load.adapter.key == adapter.key and not load.failure:
                return slot
        return None

    def _begin(self, slot: int, adapter: Shelved) -> None:
        """Called with the lock."""
        self._loads[slot] = _Load(adapter, self._content[slot])
        self._content[slot] = None
        self._unread.append(slot)
        if self._readers == READERS:
            return
        try:
            threading.Thread(target=self._read_on, name="adapters", daemon=True).start()
            self._readers += 1
        except RuntimeError as error:
            if self._readers == 0:
                self._unread.remove(slot)
                self._end(slot, f"{adapter.path}: cannot be read ({error}).")

    def _read_on(self) -> None:
        """What is to be read, one after another, and no longer: an idle thread would keep the memory."""
        while True:
            with self._changed:
                if not self._unread:
                    self._readers -= 1
                    return
                slot = self._unread.popleft()
                load = self._loads[slot]
                if self._users[slot] == 1:
                    self._end(slot, "Nobody wants it any more.")
                    continue
            failure = self._fill(slot, load)
            with self._changed:
                self._end(slot, failure)

    def _fill(self, slot: int, load: _Load) -> str:
        """Read an adapter into its slot; why that cannot be."""
        try:
            # Read and looked at as a whole before the first number is written.
            tensors = read_slot(load.adapter, self.memory, self._check)
            load.before, load.error = None, DeviceError
            for name, array in tensors.items():
                self.memory[name][slot] = array
        except ModelError as error:
            return str(error)
        except Exception as error:
            return f"{load.adapter.path}: cannot be read ({str(error) or type(error).__name__})."
        return ""

    def _end(self, slot: int, failure: str) -> None:
        """The reader is done with a slot. Called with the lock."""
        self._loads[slot].failure = failure
        if not failure:
            self._content[slot] = self._loads.pop(slot).adapter.key
            self.filled += 1
        self.give(slot)
        self._changed.notify_all()

    def _current(self) -> Mapping[str, tuple[str, str]]:
        """By name, the file of each adapter and its SHA-256."""
        stamp = self._stamp()
        if self._seen is None or stamp != self._seen:
            self._shelf, self._seen = self._listed(), stamp
        return self._shelf


def open_regular(path: Path) -> BufferedReader:
    """A regular file for reading; opening a FIFO would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def rows_adapter(slots: Sequence[int]) -> np.ndarray:
    """The model's input for rows whose adapters are in these slots, int32; one number where it is the same for all."""
    return np.array(slots[:1] if len(set(slots)) == 1 else slots, np.int32)


def read_slot(adapter: Shelved, memory: Memory, check: bool = True) -> dict[str, np.ndarray]:
    """The tensors of an adapter's file, which fit the slots in `memory`. Nothing is run of what is in it.

    Raises:
        ModelError: it cannot be read, is another file than it was, or does not fit.
    """
    slot_bytes = sum(math.prod(slots.shape[1:]) * slots.dtype.itemsize for slots in memory.values())
    try:
        size = os.fstat(adapter.file.fileno()).st_size
        # What is larger may not fit into memory.
        if size > slot_bytes + _LARGEST_HEADER:
            raise ModelError(f"{adapter.path}: is no file of an adapter ({size:,} bytes for a slot of {slot_bytes:,}).")
        adapter.file.seek(0)
        data = adapter.file.read()
    except OSError as error:
        raise ModelError(f"{adapter.path}: cannot be read ({error.strerror}).") from None
    if check and hashlib.sha256(data).hexdigest() != adapter.sha256:
        raise ModelError(f"{adapter.path}: is not the file that belongs here (its SHA-256 differs). Copy it again.")
    try:
        header, body = _split(data)
        found = {name: _tensor(fields, body) for name, fields in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{adapter.path}: is no file of an adapter ({error}).") from None
    for name, slots in memory.items():
        array = found.get(name)
        if array is None or array.shape != slots.shape[1:] or array.dtype != slots.dtype:
            what = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise ModelError(
                f"{adapter.path}: has {what} for {name}, expected {slots.dtype} {list(slots.shape[1:])}. Is it of "
                "another model?"
            )
    if len(found) != len(memory):
        raise ModelError(f"{adapter.path}: has more than the model takes. Is it of another model?")
    return found


def _split(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header and the numbers of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_LARGEST_HEADER, len(data) - 8):
        raise ValueError("its header is not in it")
    header = json.loads(data[8 : 8 + length].decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, memoryview(data)[8 + length :]


def _tensor(fields: Any, body: memoryview) -> np.ndarray:
    kind = _TYPES[fields["dtype"]]
    shape, (start, end) = fields["shape"], fields["data_offsets"]
    if not all(type(size) is int and size >= 0 for size in (*shape, start, end)):
        raise ValueError("a size is no whole number")
    if not start <= end <= len(body) or end - start != math.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError("a tensor is not where it should be")
    return np.frombuffer(body[start:end], kind).reshape(shape)
