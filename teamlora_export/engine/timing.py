"""How long an engine takes for one step, on the GPU that it is for: `trt --plugin auto` decides by it.

Not yet run on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import numpy as np

from teamlora_export.engine.profiles import ShapeProfile
from teamlora_export.errors import ExportError

_WARM_UPS, _ROUNDS, _STEPS = 5, 7, 20
_PAST, _PRESENT = "past_key_values.", "present."


class Memory(Protocol):
    """Of the device: zeros."""

    @property
    def ptr(self) -> int: ...


class Stream(Protocol):
    @property
    def ptr(self) -> int: ...

    def synchronize(self) -> None: ...


def time_engine(
    engine: Any,
    trt: Any,
    profiles: Sequence[ShapeProfile],
    allocate: Callable[[int], AbstractContextManager[Memory]] | None = None,
    open_stream: Callable[[], AbstractContextManager[Stream]] | None = None,
) -> float:
    """Seconds of a step at the best shapes of the last profile, which is decode's in a text generator: the median of
    rounds of steps that follow each other without a wait.

    Args:
        engine: an ICudaEngine of `trt`.
        allocate: so many bytes. Default, as of `open_stream`: polygraphy's.

    Raises:
        ExportError: TensorRT refuses shapes or a step.
    """
    with ExitStack() as held:
        stream = held.enter_context((open_stream or _open_stream)())
        context = _bound_context(
            engine, trt, profiles, stream, lambda size: held.enter_context((allocate or _allocate)(size))
        )
        for _ in range(_WARM_UPS):
            _step(context, stream)
        stream.synchronize()
        return statistics.median(_round(context, stream) for _ in range(_ROUNDS))


def _bound_context(
    engine: Any, trt: Any, profiles: Sequence[ShapeProfile], stream: Stream, allocate: Callable[[int], Memory]
) -> Any:
    """A context in which a step can be made: its shapes set, every tensor at an address of its own."""
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE)
    if context is None or not context.set_optimization_profile_async(len(profiles) - 1, stream.ptr):
        raise ExportError("The engine cannot be timed: TensorRT makes no context for it.")
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for name in names:
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and not context.set_input_shape(
            name, profiles[-1].inputs[name][1]
        ):
            raise ExportError(f"The engine cannot be timed: TensorRT refuses the shape of {name}.")
    held: dict[str, Memory] = {}
    # Inputs first: a cache in place is bound to both of its ends.
    for name in sorted(names, key=lambda name: engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT):
        size = engine.get_tensor_dtype(name).itemsize * int(np.prod(context.get_tensor_shape(name), dtype=np.int64))
        twin = name.replace(_PRESENT, _PAST, 1)
        shared = name.startswith(_PRESENT) and _same_shape(context, name, twin)
        held[name] = held[twin] if shared else allocate(max(size, 1))
        context.set_tensor_address(name, held[name].ptr)
    return context


def _round(context: Any, stream: Stream) -> float:
    begin = time.perf_counter()
    for _ in range(_STEPS):
        _step(context, stream)
    stream.synchronize()
    return (time.perf_counter() - begin) / _STEPS


def _step(context: Any, stream: Stream) -> None:
    if not context.execute_async_v3(stream.ptr):
        raise ExportError("The engine cannot be timed: TensorRT refuses a step.")


def _same_shape(context: Any, name: str, twin: str) -> bool:
    return tuple(context.get_tensor_shape(name)) == tuple(context.get_tensor_shape(twin))


def _allocate(size: int) -> AbstractContextManager[Memory]:
    from polygraphy.cuda import DeviceArray

    return DeviceArray.raw((size,)).copy_from(np.zeros(size, np.uint8))


def _open_stream() -> AbstractContextManager[Stream]:
    from polygraphy.cuda import Stream

    return Stream()
