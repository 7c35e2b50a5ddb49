"""Runs an engine for a validation, through polygraphy, which binds a cache in place to both of its ends (0.53.6 does).

Not yet run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teamlora_export.bundle import Bundle
from teamlora_export.engine.facts import EngineFacts
from teamlora_export.engine.load import load_engine, open_engine_runtime
from teamlora_export.engine.profiles import ShapeProfile, capacity_of
from teamlora_export.errors import ExportError, first_line
from teamlora_export.ports import ADAPTER_NAME
from teamlora_export.progress import Reporter
from teamlora_export.validate.cases import Case, Feeds
from teamlora_export.validate.in_place import in_place_call


class EngineRunner:
    """An engine on this machine's GPU.

    Raises:
        ExportError: the engine's package or a GPU is missing, or the engine is refused.
    """

    def __init__(self, path: Path, facts: EngineFacts, bundle: Bundle, plugin: Path | None, reporter: Reporter) -> None:
        runtime = open_engine_runtime(path, facts)
        import polygraphy.config

        # polygraphy decides with its first import of TensorRT which of the two packages it drives.
        polygraphy.config.USE_TENSORRT_RTX = facts.runtime == "rtx"
        from polygraphy.backend.trt import TrtRunner
        from polygraphy.datatype import DataType
        from polygraphy.logger import G_LOGGER

        G_LOGGER.severity = G_LOGGER.ERROR
        engine = load_engine(path, facts, runtime, plugin, bundle, reporter)
        self._facts, self._path = facts, path
        self._types = {
            port.name: DataType.from_dtype(engine.get_tensor_dtype(port.name), "tensorrt").torch()
            for port in bundle.manifest.inputs
        }
        self._outputs = [port.name for port in bundle.manifest.outputs]
        self._runner: Any = TrtRunner(engine, allocation_strategy="profile")
        self._runner.activate()
        self._profile: int | None = None
        # Of an engine that takes adapters.
        self._slots: dict[str, Any] = {}
        self._rows: np.ndarray | None = None

    def bind(self, slots: Mapping[str, SlotTensor]) -> None:
        """From now on the engine reads its adapters there. polygraphy hands over the addresses of what is on the GPU
        (0.53.6 does)."""
        self._slots = {name: memory.view for name, memory in slots.items()}

    def seat(self, rows: np.ndarray) -> None:
        """From now on the rows of a batch have the adapters in these slots, int32; of one number, all of them."""
        self._rows = rows

    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name. A cache grows here, whatever form the engine keeps it in."""
        if self._facts.capacity is None:
            return self._run(feeds)
        call = in_place_call(feeds, capacity=self._facts.capacity)
        return call.present(self._run(call.feeds))

    def _run(self, feeds: Feeds) -> Feeds:
        index = self._choose_profile({name: feeds[name].shape for name in self._types})
        if index != self._profile:
            self._runner.set_profile(index)
            self._profile = index
        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(feeds[name])).to(kind) for name, kind in self._types.items()
        }
        if self._rows is not None:
            batch = len(feeds["input_ids"])
            rows = np.repeat(self._rows, batch) if len(self._rows) == 1 else self._rows
            inputs |= {**self._slots, ADAPTER_NAME: torch.from_numpy(np.ascontiguousarray(rows, np.int32))}
        outputs = self._runner.infer(inputs, check_inputs=False)
        return {name: _to_numpy(outputs[name]) for name in self._outputs}

    def _choose_profile(self, shapes: dict[str, tuple[int, ...]]) -> int:
        # The last one is the narrowest: with a cache in place, one token is a prompt's last part as well.
        for index, profile in reversed(list(enumerate(self._facts.profiles))):
            if profile.accepts(shapes):
                return index
        refusals = [profile.refusal(shapes) for profile in self._facts.profiles]
        raise ExportError(f"{self._path}: takes no such input: {'; '.join(filter(None, refusals))}.")


class SlotTensor:
    """The slots of a weight in the GPU's memory, [slots, ..], of zeros: at one address, written to a slot at a time.

    Args:
        kind: of its numbers; uint16 is bfloat16 by its bits.

    Raises:
        ExportError: there is not so much memory.
    """

    def __init__(self, shape: tuple[int, ...], kind: type) -> None:
        from polygraphy.cuda import DeviceArray, DeviceView
        from polygraphy.datatype import DataType
        from polygraphy.exception import PolygraphyException

        types: dict[type, Any] = {
            np.float32: DataType.FLOAT32,
            np.float16: DataType.FLOAT16,
            np.uint16: DataType.BFLOAT16,
        }
        self.shape, self.dtype = shape, np.dtype(kind)
        size = math.prod(shape) * self.dtype.itemsize
        try:
            self._held = DeviceArray.raw((size,)).copy_from(np.zeros(size, np.uint8))
        except PolygraphyException as error:
            raise ExportError(f"The GPU has no {size >> 20} MiB for slots of adapters ({first_line(error)}).") from None
        self.view = DeviceView(self._held.ptr, shape, types[kind])

    def __setitem__(self, slot: int, numbers: np.ndarray) -> None:
        from polygraphy.cuda import MemcpyKind, wrapper

        if not 0 <= slot < self.shape[0] or numbers.shape != self.shape[1:] or numbers.dtype != self.dtype:
            raise ValueError(f"{numbers.dtype} {list(numbers.shape)} is no entry {slot} of {list(self.shape)}")
        source = np.ascontiguousarray(numbers)
        place = self.view.ptr + slot * source.nbytes
        wrapper().memcpy(place, source.ctypes.data, source.nbytes, MemcpyKind.HostToDevice)


def cases_within(cases: Sequence[Case], profiles: Sequence[ShapeProfile]) -> list[Case]:
    """The cases whose prompt and decoding steps some profile takes."""

    def fits(case: Case) -> bool:
        batch, length = case.mask.shape
        begun = case.part or case.past
        first, last = profiles[0].inputs["input_ids"], profiles[-1].inputs["attention_mask"]
        return (
            (not begun or capacity_of(profiles) is not None)
            and first[0][0] <= batch <= first[2][0]
            and last[0][1] <= case.past + (case.part or length)
            and length <= first[2][1]
            and case.past + length + case.steps <= last[2][1]
        )

    return [case for case in cases if fits(case)]


def _to_numpy(output: Any) -> np.ndarray:
    """A copy: what polygraphy gives is a buffer that its next call resizes and writes to (0.53.6 does), which PyTorch
    refuses where an array has ever looked at it."""
    if isinstance(output, torch.Tensor):
        copied = output.to("cpu", torch.float32 if output.dtype == torch.bfloat16 else output.dtype, copy=True)
        return copied.numpy()
    return np.array(output)
