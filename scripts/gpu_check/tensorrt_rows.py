"""The plugin in engines of one node that TensorRT builds here, for rows with adapters of their own; see `rows.judge`.
`python -m gpu_check.tensorrt_rows build CAPABILITY`, then `... judge LIBRARY`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check import rows
from gpu_check.adapters import Batch
from gpu_check.engines import LEFT_OUT
from gpu_check.machine import Gpu, Machine
from teamlora_export.engine.plugin import build_plugin, load_plugin, read_plugin
from teamlora_export.engine.runtime import Messages, open_runtime
from teamlora_export.engine.toolchain import find_tensorrt_include


def build(capability: str) -> None:
    """Prints where the plugin is, in one line."""
    if find_tensorrt_include() is None:
        print(f"{LEFT_OUT}no headers of this TensorRT; set TENSORRT_INCLUDE_DIR")
        return
    print(build_plugin((capability,)).path)


def judge(library: str) -> None:
    """Prints one line; ends with 1 where something is wrong."""
    import torch

    # PyTorch first: the context of CUDA is then its own.
    machine = Gpu(torch)
    torch.zeros(1, device=machine.device)
    runtime = open_runtime("tensorrt")
    load_plugin(read_plugin(Path(library)), runtime)
    engines = Engines(torch, machine, runtime.trt, runtime.logger)
    print(f"TensorRT {runtime.version}: {rows.judge(torch, machine, engines.of_slots, engines.of_one)}")


class Engines:
    """Engines of one node on a batch's memory. `trt`: the module."""

    def __init__(self, torch: Any, machine: Machine, trt: Any, logger: Callable[[Messages], Any]) -> None:
        self._torch, self._machine, self._trt = torch, machine, trt
        self._messages = Messages()
        self._logger = logger(self._messages)
        # An engine is gone with its runtime.
        self._runtime = trt.Runtime(self._logger)

    def of_slots(self, batch: Batch, adapter: Any) -> rows.Node:
        run = self._bound(batch, len(adapter), None, {"adapter": adapter})
        return rows.Node(run, self._machine.captured(run))

    def of_one(self, batch: Batch, slot: int) -> Callable[[], None]:
        return self._bound(batch, batch.sizes.batch, slot, {})

    def _bound(self, batch: Batch, count: int, slot: int | None, more: dict[str, Any]) -> Callable[[], None]:
        engine = self._build(batch, count, slot)
        context = self._made(engine.create_execution_context(), "makes no context")
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                shape = rows.shape_of(batch, name, count)
                self._made(context.set_input_shape(name, shape), f"refuses the shape of {name}")
            tensor = more.get(name, getattr(batch, name, None))
            self._made(context.set_tensor_address(name, tensor.data_ptr()), f"refuses the address of {name}")

        def run() -> None:
            # The engine is held as long as its context.
            assert engine is not None
            self._made(context.execute_async_v3(self._machine.stream()), "does not run")

        return run

    def _build(self, batch: Batch, count: int, slot: int | None) -> Any:
        trt = self._trt
        builder = trt.Builder(self._logger)
        flags = trt.NetworkDefinitionCreationFlag
        network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
        parser = trt.OnnxParser(network, self._logger)
        if not parser.parse(rows.model(batch, slot)):
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            raise RuntimeError(f"TensorRT cannot take the node: {'; '.join(errors) or self._messages.reason()}")
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            most = rows.shape_of(batch, name, count)
            least = {"x": (1, 1, most[-1]), "base": (1, 1, most[-1]), "adapter": (1,)}.get(name, most)
            profile.set_shape(name, least, most, most)
        config.add_optimization_profile(profile)
        serialized = self._made(builder.build_serialized_network(network, config), "builds no engine")
        return self._made(self._runtime.deserialize_cuda_engine(serialized), "does not read its own engine")

    def _made(self, answer: Any, refusal: str) -> Any:
        if answer is None or answer is False:
            raise RuntimeError(f"TensorRT {refusal}: {self._messages.reason()}")
        return answer


if __name__ == "__main__":
    {"build": build, "judge": judge}[sys.argv[1]](sys.argv[2])
