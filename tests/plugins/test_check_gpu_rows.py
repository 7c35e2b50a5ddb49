"""`scripts/check_gpu`: rows with adapters of their own in TensorRT and ONNX Runtime, on stand-ins for a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gpu_check import onnxruntime_rows, rows, tensorrt_rows
from gpu_check.adapters import Batch
from gpu_check.kernels import Kernels, Sizes, Tuning
from gpu_check.machine import Emulated
from gpu_check.operation import definition
from gpu_check.shapes import Projection

from teamlora_export.engine.runtime import open_runtime

TINY = Projection("tiny", "q/k", 64, (24, 16), 16)
ON_CPU = Emulated(torch)
RIGHT = re.compile(r"right \(0\.\d+\), alone the same to 0\.00\d+ of the largest, swaps are seen(; no graph)?")


@pytest.fixture(scope="module")
def sessions(programs) -> onnxruntime_rows.Sessions:
    """On ONNX Runtime's CPU provider, with the emulated kernels."""
    library = programs / "onnxruntime" / "libteamlora_onnxruntime_emulated.so"
    return onnxruntime_rows.Sessions(ON_CPU, library, "CPUExecutionProvider")


def test_rows_are_judged_in_onnx_runtime(sessions):
    assert RIGHT.fullmatch(rows.judge(torch, ON_CPU, sessions.of_slots, sessions.of_one, TINY))


def test_what_is_wrong_is_found_out_and_named(sessions):
    # Memory that sessions are bound to.
    held = []

    def keeps_slots(batch, adapter):
        """As they were when the session was opened."""
        held.append({name: getattr(batch, name).clone() for name in ("down", "mix", "up")})
        return sessions.of_slots(SimpleNamespace(**{**vars(batch), **held[-1]}), adapter)

    def keeps_indices(batch, adapter):
        held.append(adapter.clone())
        return sessions.of_slots(batch, held[-1])

    def exchanges_rows(batch, adapter):
        held.append(adapter.flip(0))
        return sessions.of_slots(batch, held[-1])

    for opened, message in (
        (keeps_slots, r"3 rows of 1 tokens, a swap: wrong"),
        (keeps_indices, r"3 rows of 1 tokens, a swap: wrong"),
        (exchanges_rows, r"3 rows of 1 tokens, \[0, -1, 1\]: wrong"),
    ):
        with pytest.raises(RuntimeError, match=message):
            rows.judge(torch, ON_CPU, opened, sessions.of_one, TINY)

    def graph_keeps_slots(batch, adapter):
        return rows.Node(sessions.of_slots(batch, adapter).run, keeps_slots(batch, adapter).run)

    with pytest.raises(RuntimeError, match="a swap in a graph: wrong"):
        rows.judge(torch, ON_CPU, graph_keeps_slots, sessions.of_one, TINY)
    with pytest.raises(RuntimeError, match="row 0 is not what adapter 0 gives alone"):
        rows.judge(torch, ON_CPU, sessions.of_slots, lambda batch, slot: lambda: write_of_another_x(batch, slot), TINY)


def write_of_another_x(batch: Batch, slot: int) -> None:
    """Right by itself."""
    batch.x.mul_(0.5)
    sizes = replace(batch.sizes, slots=0, batch=0)
    batch.y.copy_(definition(torch, sizes, batch.x, batch.base, batch.down[slot], batch.mix[slot], batch.up[slot]))


class Context:
    """Of an engine: runs the node on the emulated kernels, by the addresses that it was given."""

    def __init__(self, kernels: Kernels, model: onnx.ModelProto) -> None:
        self._kernels, self._model = kernels, model
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._constants = {one.name: onnx.numpy_helper.to_array(one).copy() for one in model.graph.initializer}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        [node] = self._model.graph.node
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        batch, each, inputs = self._shapes["x"]
        slots = self._shapes["down"][0] if "adapter" in self._addresses else 0
        up_rank = self._shapes["up"][1] if slots else self._constants["up"].shape[0]
        k = attributes["num_experts"]
        outs = tuple(attributes["out_splits"])
        sizes = Sizes("fp16", batch * each, inputs, k, up_rank // k, outs, slots=slots, batch=batch if slots else 0)
        places = self._addresses | {name: array.ctypes.data for name, array in self._constants.items()}
        names = ("x", "base", "down", "mix", "up", "y", *(["adapter"] if slots else []))
        workspace = np.zeros(self._kernels.workspace_bytes(sizes, Tuning(16)) + 64, np.uint8)
        aligned = workspace[-workspace.ctypes.data % 64 :]
        self._kernels.launch(sizes, Tuning(16), [places[name] for name in names], aligned.ctypes.data, stream)
        return True


class Engine:
    def __init__(self, make_context: Callable[[], Context], model: onnx.ModelProto) -> None:
        self.create_execution_context = make_context
        self._inputs = [one.name for one in model.graph.input]
        self.num_io_tensors = len(self._inputs) + 1

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, "y"][index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._inputs else "output"


def stand_in(kernels: Kernels) -> Any:
    """For TensorRT's module: a network is a model, and so is an engine's file."""

    class Network:
        num_inputs = property(lambda self: len(self.model.graph.input))

        def get_input(self, index):
            return SimpleNamespace(name=self.model.graph.input[index].name)

    class Parser:
        def __init__(self, network, logger):
            self._network = network

        def parse(self, model):
            self._network.model = onnx.load_from_string(model)
            return True

    def read(data):
        model = onnx.load_from_string(data)
        return Engine(lambda: Context(kernels, model), model)

    builder = SimpleNamespace(
        create_network=lambda flags: Network(),
        create_builder_config=lambda: SimpleNamespace(add_optimization_profile=lambda profile: 0),
        create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda name, least, best, most: None),
        build_serialized_network=lambda network, config: network.model.SerializeToString(),
    )
    return SimpleNamespace(
        Builder=lambda logger: builder,
        OnnxParser=Parser,
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=read),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        TensorIOMode=SimpleNamespace(INPUT="input"),
    )


def test_rows_are_judged_in_tensorrt_and_in_a_graph(programs):
    """On a stand-in whose engines run the emulated kernels."""
    trt = stand_in(Kernels(programs / "libteamlora_emulated.so"))
    engines = tensorrt_rows.Engines(torch, ON_CPU, trt, lambda messages: messages)
    said = rows.judge(torch, ON_CPU, engines.of_slots, engines.of_one, TINY)
    assert RIGHT.fullmatch(said) and "no graph" not in said


def test_tensorrt_s_own_interface_takes_what_is_asked_of_it_before_a_gpu_is_needed(monkeypatch):
    """TensorRT-RTX's, which is the same and builds without one, with another node: it takes no plugins."""
    trt = pytest.importorskip("tensorrt_rtx")
    batch = Batch(torch, ON_CPU, None, TINY, "fp16", 3, 3)
    model = onnx.load_from_string(rows.model(batch))
    del model.graph.node[:]
    model.graph.node.append(onnx.helper.make_node("Add", ["base", "base"], ["y"]))
    monkeypatch.setattr(rows, "model", lambda *_: model.SerializeToString())
    runtime = open_runtime("rtx")
    engines = tensorrt_rows.Engines(torch, ON_CPU, trt, runtime.logger)
    with pytest.raises(RuntimeError, match="TensorRT does not read its own engine: "):
        engines.of_slots(batch, batch.indices([0, -1, 1]))
    monkeypatch.setattr(rows, "model", lambda *_: b"no model")
    with pytest.raises(RuntimeError, match="TensorRT cannot take the node: "):
        engines.of_one(batch, 1)
    # What comes behind it.
    used = {
        trt.ICudaEngine: ("create_execution_context", "num_io_tensors", "get_tensor_name", "get_tensor_mode"),
        trt.IExecutionContext: ("set_input_shape", "set_tensor_address", "execute_async_v3"),
        trt.Runtime: ("deserialize_cuda_engine",),
    }
    assert [name for kind, names in used.items() for name in names if not hasattr(kind, name)] == []


def test_a_library_is_built_or_left_out(monkeypatch, capsys):
    onnxruntime_rows.build("90")
    assert capsys.readouterr().out.startswith("left out: this onnxruntime has no CUDAExecutionProvider")
    monkeypatch.setattr(tensorrt_rows, "build_plugin", lambda chosen: SimpleNamespace(path="_".join(chosen)))
    monkeypatch.setattr(tensorrt_rows, "find_tensorrt_include", lambda: "here")
    tensorrt_rows.build("90")
    assert capsys.readouterr().out == "90\n"
    monkeypatch.setattr(tensorrt_rows, "find_tensorrt_include", lambda: None)
    tensorrt_rows.build("90")
    assert capsys.readouterr().out.startswith("left out: no headers of this TensorRT")
