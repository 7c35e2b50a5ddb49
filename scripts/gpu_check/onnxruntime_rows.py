"""The op of ONNX Runtime's CUDA provider, for rows with adapters of their own; see `rows.judge`.
`python -m gpu_check.onnxruntime_rows build CAPABILITY`, then `... judge LIBRARY`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from gpu_check import rows
from gpu_check.adapters import Batch
from gpu_check.engines import LEFT_OUT
from gpu_check.machine import Gpu, Machine
from teamlora_export.engine.onnxruntime_library import build_cuda_library, find_include
from teamlora_export.graph import op

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_TYPES = {"mix": np.float32, "adapter": np.int32}


def build(capability: str) -> None:
    """Prints where the op's library is, in one line."""
    if _CUDA not in ort.get_available_providers():
        print(f"{LEFT_OUT}this onnxruntime has no {_CUDA}")
        return
    if find_include() is None:
        print(f"{LEFT_OUT}no headers of ONNX Runtime; set ONNXRUNTIME_INCLUDE_DIR")
        return
    print(build_cuda_library((capability,)).path)


def judge(library: str) -> None:
    """Prints one line; ends with 1 where something is wrong."""
    import torch

    machine = Gpu(torch)
    sessions = Sessions(machine, Path(library), _CUDA)
    print(f"ONNX Runtime {ort.__version__}: {rows.judge(torch, machine, sessions.of_slots, sessions.of_one)}")


class Sessions:
    """Sessions of one node on a batch's memory. `library`: of the op."""

    def __init__(self, machine: Machine, library: Path, provider: str) -> None:
        self._machine, self._library, self._provider = machine, library, provider

    def of_slots(self, batch: Batch, adapter: Any) -> rows.Node:
        memory = {name: getattr(batch, name) for name in op.INPUTS} | {"adapter": adapter}
        captured = None
        if self._provider == _CUDA:
            # The provider's own graph, which its first runs capture.
            captured = self._bound(batch, None, memory, {"enable_cuda_graph": "1"})
        return rows.Node(self._bound(batch, None, memory, {}), captured)

    def of_one(self, batch: Batch, slot: int) -> Callable[[], None]:
        return self._bound(batch, slot, {name: getattr(batch, name) for name in ("x", "base")}, {})

    def _bound(
        self, batch: Batch, slot: int | None, memory: dict[str, Any], settings: dict[str, str]
    ) -> Callable[[], None]:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(self._library))
        providers = [(self._provider, settings), *([_CPU] if self._provider != _CPU else [])]
        session = ort.InferenceSession(rows.model(batch, slot), options, providers=providers)
        if session.get_providers()[0] != self._provider:
            raise RuntimeError(f"the session runs on {session.get_providers()}, not on {self._provider}")
        count, device = batch.sizes.batch, "cuda" if self._provider == _CUDA else "cpu"
        binding = session.io_binding()
        for name, tensor in memory.items():
            shape = rows.shape_of(batch, name, count)
            binding.bind_input(name, device, 0, _TYPES.get(name, np.float16), shape, tensor.data_ptr())
        binding.bind_output("y", device, 0, np.float16, rows.shape_of(batch, "y", count), batch.y.data_ptr())

        def run() -> None:
            # The provider has a stream of its own, and waits for it at the end.
            self._machine.synchronize()
            session.run_with_iobinding(binding)

        return run


if __name__ == "__main__":
    {"build": build, "judge": judge}[sys.argv[1]](sys.argv[2])
