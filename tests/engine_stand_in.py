"""Stands in for a GPU: an engine is the graph that it is built of, in ONNX Runtime, and its memory is the host's."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import polygraphy.config
import pytest
import tensorrt_rtx as trt
import torch

from teamlora_export.bundle import ADAPTER_NAME, ENGINES_NAME, Bundle, Port
from teamlora_export.engine.facts import EngineFacts, write_engine
from teamlora_export.engine.prepare import prepared_model, slot_inputs
from teamlora_export.engine.profiles import ShapeProfile, capacity_of, make_profiles
from teamlora_export.progress import Reporter

# Before polygraphy decides which of the two packages it drives.
polygraphy.config.USE_TENSORRT_RTX = True
TYPES = {
    "int64": (np.int64, trt.DataType.INT64),
    "int32": (np.int32, trt.DataType.INT32),
    "float": (np.float32, trt.DataType.FLOAT),
    "float16": (np.float16, trt.DataType.HALF),
}
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
        size=6,
        sha256=hashlib.sha256(b"engine").hexdigest(),
        tool_version="0.1.0",
        slots=None if shelf is None else shelf["slots"],
        format_version=1 if shelf is None else 2,
    )
    path = bundle.folder / ENGINES_NAME / f"{name}.engine"
    path.parent.mkdir(exist_ok=True)
    write_engine(b"engine", facts, path)
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
    """polygraphy's `TrtRunner`: what is on the GPU is at one address in all calls of all of them."""

    def __init__(self, engine: EngineGraph, allocation_strategy: str) -> None:
        self._engine, self._profile, self.addresses = engine, 0, dict[str, int]()

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
        return {name: torch.from_numpy(found) for name, found in self._engine.run(self._profile, given).items()}


def stand_in_for_polygraphy(engine: EngineGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever engine is opened to be judged is this one."""
    import polygraphy.backend.trt
    import polygraphy.cuda.cuda

    runner = "teamlora_export.validate.engine_runner"
    monkeypatch.setattr(f"{runner}.open_engine_runtime", lambda *_: None)
    monkeypatch.setattr(f"{runner}.load_engine", lambda *_: engine)
    monkeypatch.setattr(polygraphy.backend.trt, "TrtRunner", StandInRunner)
    monkeypatch.setattr(polygraphy.cuda.cuda, "G_CUDA", HostCuda())
