"""Stands in for a GPU: an engine is the graph that it is built of, in ONNX Runtime, and its memory is the host's."""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import polygraphy.config
import pytest
import tensorrt_rtx as trt
import torch

from teamlora_export.bundle import ENGINES_NAME, Bundle
from teamlora_export.engine.facts import EngineFacts, write_engine
from teamlora_export.engine.prepare import prepared_model, slot_inputs
from teamlora_export.engine.profiles import ShapeProfile, capacity_of, make_profiles
from teamlora_export.ports import ADAPTER_NAME, BATCH, SEQUENCE, Port
from teamlora_export.progress import Reporter

# Before polygraphy decides which of the two packages it drives.
polygraphy.config.USE_TENSORRT_RTX = True
TYPES = {
    "int64": (np.int64, trt.DataType.INT64),
    "int32": (np.int32, trt.DataType.INT32),
    "float": (np.float32, trt.DataType.FLOAT),
    "float16": (np.float16, trt.DataType.HALF),
}
# What is in its file.
CONTENT = b"engine"
Arrays = dict[str, np.ndarray]
# What an engine does wrong: with what it is fed; in place.
Fault = Callable[[Arrays], None]


def write_stand_in(bundle: Bundle, shapes: str, name: str = "tiny") -> tuple[Path, EngineFacts]:
    """The files of an engine of `bundle` in its dtype, as `trt` writes them but for what is in the engine."""
    profiles = make_profiles(bundle, shapes, slot_inputs(bundle))
    shelf = bundle.manifest.shelf
    facts = EngineFacts(
        runtime="rtx",
        runtime_version=trt.__version__,
        targets=("compute capability 8.9",),
        task=bundle.manifest.task,
        dtype=bundle.manifest.dtype,
        profiles=profiles,
        plugin=None,
        model_sha256=dict(bundle.manifest.sha256),
        adapter_sha256=bundle.manifest.adapter["sha256"],
        refit_weights=None,
        stripped=False,
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        tool_version="0.1.0",
        slots=None if shelf is None else shelf["slots"],
        format_version=1 if shelf is None else 2,
    )
    path = bundle.folder / ENGINES_NAME / f"{name}.engine"
    path.parent.mkdir(exist_ok=True)
    write_engine(CONTENT, facts, path)
    return path, facts


class EngineGraph:
    """An engine of a bundle with such profiles: its inputs and outputs, and what it computes."""

    def __init__(self, bundle: Bundle, profiles: tuple[ShapeProfile, ...], fault: Fault | None = None) -> None:
        self.profiles, self.fault = profiles, fault
        self.inputs = {port.name: port for port in (*bundle.manifest.inputs, *slot_inputs(bundle))}
        self.outputs = {port.name: port for port in bundle.manifest.outputs}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        capacity, place = capacity_of(profiles), bundle.folder / "graph"
        reporter = Reporter(quiet=True)
        with prepared_model(
            bundle, bundle.manifest.dtype, place, for_plugin=False, reporter=reporter, capacity=capacity
        ) as path:
            self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])

    @property
    def ports(self) -> dict[str, Port]:
        return {**self.inputs, **self.outputs}

    def run(self, profile: int, feeds: Mapping[str, np.ndarray]) -> Arrays:
        assert feeds.keys() == self.inputs.keys()
        refusal = self.profiles[profile].refusal({name: array.shape for name, array in feeds.items()})
        assert refusal is None, refusal
        for name, array in feeds.items():
            assert array.dtype == TYPES[self.inputs[name].dtype][0], name
        given = dict(feeds)
        if self.fault is not None:
            self.fault(given)
        return dict(zip(self.outputs, self._session.run(list(self.outputs), given), strict=True))

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[self.ports[name].dtype][1]


def at(address: int, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """The numbers at an address."""
    count = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * count).from_address(address), kind).reshape(shape)


def off_by_one(slots: int) -> Fault:
    def fault(given: Arrays) -> None:
        rows = given[ADAPTER_NAME]
        given[ADAPTER_NAME] = np.where(rows < 0, rows, (rows + 1) % slots).astype(np.int32)

    return fault


def exchange_rows(given: Arrays) -> None:
    given[ADAPTER_NAME] = np.ascontiguousarray(given[ADAPTER_NAME][::-1])


def clip_to_first(given: Arrays) -> None:
    given[ADAPTER_NAME] = np.minimum(given[ADAPTER_NAME], 0)


class StaleSlots:
    """A slot is as it was when its first numbers came."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, int], np.ndarray] = {}

    def __call__(self, given: Arrays) -> None:
        for name in [name for name in given if name.endswith(("down", "mix", "up"))]:
            given[name] = held = given[name].copy()
            for slot, numbers in enumerate(held):
                if np.isfinite(numbers).all() and numbers.any():
                    held[slot] = self._first.setdefault((name, slot), numbers.copy())


class HostRuntime:
    """`cuda.bindings.runtime` on the host's memory: what is begun in a stream happens when that is waited for.

    Attributes:
        held: by its address, memory that is there.
    """

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamNonBlocking = 1

    def __init__(self, room: int = 1 << 30) -> None:
        self.held: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Callable[[], object]]] = {}
        self._room, self._streams = room, 0
        self._device = threading.local()

    def cudaSetDevice(self, number: int) -> tuple[int]:
        self._device.is_set = True
        return (0 if number == 0 else 101,)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {2: b"out of memory", 101: b"invalid device ordinal", 700: b"an illegal memory access"}[error]

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        assert self._device.is_set
        if sum(map(len, self.held.values())) + size > self._room:
            return 2, None
        # What was there before; aligned as CUDA's is.
        memory = np.full(size + 256, 0xAB, np.uint8)
        memory = memory[-memory.ctypes.data % 256 :][:size]
        self.held[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cudaFree(self, address: int) -> tuple[int]:
        if address:
            del self.held[address]
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        self._streams += 1
        self.streams[self._streams] = []
        return 0, self._streams

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        assert not self.streams.pop(stream), "something was not waited for"
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        begun, self.streams[stream] = self.streams[stream], []
        for work in begun:
            work()
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:
        self.require(to if kind == 1 else source, size)
        self.streams[stream].append(lambda: ctypes.memmove(to, source, size))
        return (0,)

    def cudaMemsetAsync(self, to: int, value: int, size: int, stream: int) -> tuple[int]:
        self.require(to, size)
        self.streams[stream].append(lambda: ctypes.memset(to, value, size))
        return (0,)

    def require(self, address: int, size: int) -> None:
        """It is the GPU's memory."""
        assert any(start <= address and address + size <= start + len(held) for start, held in self.held.items())


class StandInContext:
    def __init__(self, engine: EngineGraph, runtime: HostRuntime) -> None:
        self._engine, self._cuda, self._profile = engine, runtime, -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream in self._cuda.streams
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return self._engine.profiles[self._profile].accepts({name: shape})

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine.inputs:
            return self._shapes.get(name, (-1,) * len(self._engine.inputs[name].shape))
        if name.startswith("present."):
            return self._shapes[name.replace("present.", "past_key_values.")]
        sizes = dict(zip((BATCH, SEQUENCE), self._shapes["input_ids"], strict=True))
        return tuple(sizes[size] if isinstance(size, str) else size for size in self._engine.outputs[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{name} is not aligned"
        self.addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self.addresses.get(name, 0)

    def execute_async_v3(self, stream: int) -> bool:
        arrays = {name: self._array(name) for name in self._engine.ports}
        for name in self._engine.inputs:
            if name.startswith("past_key_values."):
                assert self.addresses[name] == self.addresses[name.replace("past_key_values.", "present.")]

        def step() -> None:
            found = self._engine.run(self._profile, {name: arrays[name] for name in self._engine.inputs})
            for name, array in found.items():
                np.copyto(arrays[name], array)

        self._cuda.streams[stream].append(step)
        return True

    def _array(self, name: str) -> np.ndarray:
        kind, shape = TYPES[self._engine.ports[name].dtype][0], self.get_tensor_shape(name)
        self._cuda.require(self.addresses[name], int(np.prod(shape)) * np.dtype(kind).itemsize)
        return at(self.addresses[name], shape, kind)


class StandInEngine:
    """TensorRT's `ICudaEngine`, as far as a session asks it."""

    def __init__(self, engine: EngineGraph, runtime: HostRuntime) -> None:
        self._engine, self._cuda, self._names = engine, runtime, list(engine.ports)
        self.num_io_tensors, self.num_optimization_profiles = len(self._names), len(engine.profiles)
        self.get_tensor_name = self._names.__getitem__
        self.get_tensor_dtype = engine.get_tensor_dtype
        self.contexts: list[StandInContext] = []

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in self._engine.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[trt.Dims]:
        return [trt.Dims(shape) for shape in self._engine.profiles[index].inputs[name]]

    def create_execution_context(self, strategy: Any) -> StandInContext:
        self.contexts.append(StandInContext(self._engine, self._cuda))
        return self.contexts[-1]


def stand_in_for_packages(engine: EngineGraph, monkeypatch: pytest.MonkeyPatch) -> HostRuntime:
    """Whoever opens an engine finds this one, and a GPU."""
    runtime = HostRuntime()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, trt.ILogger)

        def deserialize_cuda_engine(self, data: bytes) -> StandInEngine:
            assert data == CONTENT
            return StandInEngine(engine, runtime)

    # One that loads no plugin.
    registry = SimpleNamespace(all_creators=[], load_library=lambda _: None)
    module = SimpleNamespace(Runtime=Runtime, get_plugin_registry=lambda: registry)
    for name in ("ILogger", "TensorIOMode", "ExecutionContextAllocationStrategy", "__version__"):
        setattr(module, name, getattr(trt, name))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=runtime))
    return runtime


class HostCuda:
    """polygraphy's wrapper of CUDA."""

    def __init__(self) -> None:
        self._held: dict[int, np.ndarray] = {}

    def malloc(self, size: int) -> int:
        # What was there before.
        memory = np.full(max(size, 1), 0xAB, np.uint8)
        self._held[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        self._held.pop(address, None)

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int | None = None) -> None:
        ctypes.memmove(dst, src, nbytes)


class StandInRunner:
    """polygraphy's `TrtRunner`: what is on the GPU is at one address in all calls of all of them, and what a call gives
    is in buffers of which the next one makes use."""

    def __init__(self, engine: EngineGraph, allocation_strategy: str) -> None:
        self._engine, self._profile, self.addresses = engine, 0, dict[str, int]()
        self._buffers: dict[str, torch.Tensor] = {}

    def activate(self) -> None: ...

    def set_profile(self, index: int) -> None:
        self._profile = index

    def infer(self, feeds: Mapping[str, Any], check_inputs: bool) -> dict[str, torch.Tensor]:
        given = {}
        for name, value in feeds.items():
            if isinstance(value, torch.Tensor):
                given[name] = value.numpy()
                continue
            assert self.addresses.setdefault(name, value.ptr) == value.ptr, "bound again"
            given[name] = at(value.ptr, value.shape, TYPES[self._engine.inputs[name].dtype][0])
        return {name: self._given(name, found) for name, found in self._engine.run(self._profile, given).items()}

    def _given(self, name: str, found: np.ndarray) -> torch.Tensor:
        held = self._buffers.setdefault(name, torch.empty(0, dtype=torch.from_numpy(found).dtype))
        # Refused where an array of NumPy's looks at it.
        return held.resize_(found.shape).copy_(torch.from_numpy(found))


def stand_in_for_polygraphy(engine: EngineGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever engine is opened to be judged is this one."""
    import polygraphy.backend.trt
    import polygraphy.cuda.cuda

    runner = "teamlora_export.validate.engine_runner"
    monkeypatch.setattr(f"{runner}.open_engine_runtime", lambda *_: None)
    monkeypatch.setattr(f"{runner}.load_engine", lambda *_: engine)
    monkeypatch.setattr(polygraphy.backend.trt, "TrtRunner", StandInRunner)
    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", HostCuda())
