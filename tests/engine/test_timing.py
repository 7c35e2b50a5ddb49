"""The clock of `trt --plugin auto`, on stand-ins for TensorRT's engine and memory, and what is decided by it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from teamlora_export.engine import build
from teamlora_export.engine.profiles import ShapeProfile
from teamlora_export.engine.runtime import TensorRT, open_runtime
from teamlora_export.engine.timing import time_engine
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter

TRT = SimpleNamespace(
    TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
    ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE="on profile change"),
)
SHAPES = {"ids": (1, 1), "past_key_values.0.key": (1, 2, 64, 8)}
PROFILES = tuple(ShapeProfile(name, {key: (s, s, s) for key, s in SHAPES.items()}) for name in ("prefill", "decode"))


class Held:
    """Device memory, or a stream; says when it is freed."""

    freed = 0

    def __init__(self, size: int = 0) -> None:
        self.size, self.ptr = size, id(self)

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        Held.freed += 1

    def synchronize(self) -> None:
        pass


class Engine:
    """Of a step that fails after `steps`; its cache is in place, or grows by one."""

    num_io_tensors = 4

    def __init__(self, steps: int = 10**6, grows: bool = False, refuses: str = "") -> None:
        self.steps, self.refuses, self.profile, self.addresses = steps, refuses, None, {}
        self.shapes = {**SHAPES, "logits": (1, 1, 384), "present.0.key": (1, 2, 64 + grows, 8)}

    def create_execution_context(self, strategy):
        assert strategy == "on profile change"
        return self

    def set_optimization_profile_async(self, index, _stream):
        self.profile = index
        return self.refuses != "profile"

    def get_tensor_name(self, index):
        return list(self.shapes)[::-1][index]

    def get_tensor_mode(self, name):
        return "in" if name in SHAPES else "out"

    def get_tensor_dtype(self, _name):
        return SimpleNamespace(itemsize=2)

    def get_tensor_shape(self, name):
        return self.shapes[name]

    def set_input_shape(self, name, shape):
        assert shape == SHAPES[name]
        return self.refuses != "shape"

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer

    def execute_async_v3(self, _stream):
        self.steps -= 1
        return self.steps >= 0


def test_a_step_of_the_last_profile_is_timed_with_memory_that_is_freed():
    sizes = []

    def allocate(size):
        sizes.append(size)
        return Held(size)

    engine, before = Engine(), Held.freed
    assert time_engine(engine, TRT, PROFILES, allocate, Held) > 0
    assert engine.profile == 1
    assert sorted(sizes) == [2, 2 * 384, 2 * 1024]
    assert engine.addresses["present.0.key"] == engine.addresses["past_key_values.0.key"], "a cache in place"
    assert Held.freed - before == len(sizes) + 1
    growing = Engine(grows=True)
    time_engine(growing, TRT, PROFILES, Held, Held)
    assert len(set(growing.addresses.values())) == 4


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine(refuses="profile"), "makes no context"),
        (Engine(refuses="shape"), "refuses the shape of"),
        (Engine(steps=20), "refuses a step"),
    ],
)
def test_an_engine_that_cannot_be_timed_is_an_error_and_frees_its_memory(engine, message):
    before = Held.freed
    with pytest.raises(ExportError, match=message):
        time_engine(engine, TRT, PROFILES, Held, Held)
    assert Held.freed > before


@pytest.fixture
def runtime() -> TensorRT:
    """One whose engines are their own serialisations."""
    trt = SimpleNamespace(Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda engine: engine))
    runtime = TensorRT("tensorrt", trt, "10.14", None)
    return dataclasses.replace(runtime)


@pytest.mark.parametrize(("plugin", "inlined"), [(1e-3, 2e-3), (3e-3, 2e-3)])
def test_both_engines_are_timed_and_told(plugin, inlined, runtime, monkeypatch, capsys):
    monkeypatch.setattr(TensorRT, "logger", lambda *_: None)
    monkeypatch.setattr(build, "time_engine", lambda engine, *_: {"with": plugin, "without": inlined}[engine])
    times = build._compare(runtime, PROFILES, Reporter(), "with", "without")
    assert times == {"plugin": plugin, "inlined": inlined}
    assert f"{1e6 * plugin:.0f} us with the plugin" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["with", None])
def test_what_cannot_be_timed_keeps_the_plugin_and_says_so(engine, runtime, monkeypatch, capsys):
    def fails(*_: object) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr(TensorRT, "logger", lambda *_: None)
    monkeypatch.setattr(build, "time_engine", fails)
    assert build._compare(runtime, PROFILES, Reporter(), engine, "without") is None
    assert "the plugin is kept, since the two were not timed" in capsys.readouterr().err


def test_outputs_may_alias_inputs_where_tensorrt_can_do_that():
    """TensorRT-RTX's configuration stands in for TensorRT's."""
    trt = open_runtime("rtx").trt
    config = trt.Builder(trt.Logger()).create_builder_config()
    feature = trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03
    assert not config.get_preview_feature(feature)
    build._let_outputs_alias_inputs(trt, config)
    assert config.get_preview_feature(feature)
    build._let_outputs_alias_inputs(SimpleNamespace(PreviewFeature=SimpleNamespace()), None)
