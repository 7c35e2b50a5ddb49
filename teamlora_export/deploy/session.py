"""A model in a folder, opened in ONNX Runtime: its device, its threads, its inputs and outputs, and its calls.

It needs onnxruntime and numpy alone; so do the files beside it, which are deployed with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.adapter_slots import ADAPTER, Adapters, Memory
    from teamlora_export.deploy.cores import usable_cores
    from teamlora_export.deploy.device_tensor import DeviceTensor, DeviceTensors
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.model_folder import check_files, open_adapters, read_bytes, read_settings
    from teamlora_export.deploy.model_session import (
        NUMBERS,
        NUMPY,
        RESULTS,
        SLOT_TYPES,
        ModelSession,
        Place,
        present_of,
    )
    from teamlora_export.deploy.pages import start_large_pages
else:
    # Deployed: the files lie beside one another.
    from adapter_slots import ADAPTER, Adapters, Memory
    from cores import usable_cores
    from device_tensor import DeviceTensor, DeviceTensors
    from failure import ModelError, brief
    from model_folder import check_files, open_adapters, read_bytes, read_settings
    from model_session import NUMBERS, NUMPY, RESULTS, SLOT_TYPES, ModelSession, Place, present_of
    from pages import start_large_pages

# Programs import these from here; some are of other modules.
__all__ = ["ModelError", "Session", "bind_inputs", "brief", "ort_value", "read_bytes", "run_once"]

# As ONNX Runtime is told of a type that NumPy lacks.
_BFLOAT16 = 16
_MOST_THREADS = 1024
_CUDA = "CUDAExecutionProvider"
_CPU_LIBRARY = "libteamlora_onnxruntime.so"
_SPIN_MICROSECONDS = "20"


class Session(ModelSession):
    """The model, which holds no state of a request: many threads may run it at once.

    Args:
        library: a native library with the op, to be used in place of the definition inside the model.
        check: compare the files with their hashes first.
        check_adapters: the same of each adapter of a shelf, when it is read; None: as `check`.
        threads: of ONNX Runtime; 0: one for each core that may be used.
        spinning: threads that wait for work keep their cores for a moment, which is faster where nothing else runs.
        device: "cpu", or "cuda" or "cuda:1": a GPU, with onnxruntime-gpu. Has not yet run on one.

    Attributes:
        onnx: ONNX Runtime's own session.
        inputs: by their names, as ONNX Runtime describes them.
    """

    runtime = "ONNX Runtime"

    def __init__(
        self,
        folder: Path,
        library: Path | None = None,
        check: bool = True,
        threads: int = 0,
        spinning: bool = True,
        device: str = "cpu",
        check_adapters: bool | None = None,
    ) -> None:
        import onnxruntime as ort

        self.device = _device(device)
        if library is not None and self.device[0] != "cpu" and Path(library).name == _CPU_LIBRARY:
            raise ModelError(
                f"{library}: has the op for a CPU, and --device {device} is a GPU. Build the other one: "
                "teamlora-export plugins build --onnxruntime --cuda"
            )
        if not 0 <= threads <= _MOST_THREADS:
            raise ModelError(f"{threads} threads: give 0 to {_MOST_THREADS}.")
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        if check:
            check_files(self.folder, self.settings.own_hashes)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # A number of its own: left to itself, ONNX Runtime binds each thread to a core, busy or not. Threads that spin
        # for as long as it lets them take the core from those that they wait for, as soon as anything else runs on the
        # machine; threads that do not spin at all wake too late for the next kernel.
        options.intra_op_num_threads = threads or usable_cores()
        if spinning:
            options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            if library is not None:
                # A bare name would be looked for in the system's folders.
                options.register_custom_ops_library(str(Path(library).resolve()))
        except Exception as error:
            raise ModelError(f"{library}: cannot be loaded as a library of ops ({brief(error)}).") from None
        self._providers: list[Any] = ["CPUExecutionProvider"]
        if self.device[0] != "cpu":
            self._providers.insert(0, (_CUDA, {"device_id": self.device[1], "use_tf32": 0}))
        try:
            self.onnx = ort.InferenceSession(self.folder / "model.onnx", options, self._providers)
        except Exception as error:
            raise ModelError(
                f"{self.folder}: ONNX Runtime {ort.__version__} cannot load the model ({brief(error)})."
            ) from None
        # Where a provider cannot start, ONNX Runtime goes on without it.
        if self.device[0] != "cpu" and _CUDA not in self.onnx.get_providers():
            raise ModelError(
                f"--device {device}: ONNX Runtime {ort.__version__} cannot use it: no GPU, or not its CUDA."
            )
        self.inputs = {value.name: value for value in self.onnx.get_inputs()}
        self.outputs = [value.name for value in self.onnx.get_outputs()]
        self.caches = [value for name, value in self.inputs.items() if name.startswith("past_key_values.")]
        self._check_interface()
        self._tensors: DeviceTensors | None = None
        self.adapters = self._open_adapters(
            check if check_adapters is None else check_adapters, on_device=self.device[0] != "cpu"
        )
        if self.device[0] == "cpu":
            start_large_pages()

    def _open_adapters(self, check: bool, on_device: bool) -> Adapters | None:
        defaults = {value.name: value for value in self.onnx.get_overridable_initializers()}
        if (ADAPTER in defaults) != (self.settings.shelf is not None):
            raise ModelError(f"{self.folder}: its model and its shelf of adapters do not belong together.")
        if self.settings.shelf is None:
            return None
        slots = {name: value for name, value in defaults.items() if name != ADAPTER}
        for name, value in slots.items():
            if value.type not in SLOT_TYPES or not all(isinstance(size, int) for size in value.shape[1:]):
                raise ModelError(f"{self.folder}: its model's slots {name!r:.80} are not of a kind that is known here.")

        inputs = {name: (tuple(value.shape[1:]), SLOT_TYPES[value.type]) for name, value in slots.items()}
        if not on_device:
            return open_adapters(self.folder, self.settings, inputs, check)
        return open_adapters(self.folder, self.settings, inputs, check, self._on_device, self.device[0])

    def _on_device(self, shape: tuple[int, ...], kind: type) -> DeviceTensor:
        if self._tensors is None:
            self._tensors = DeviceTensors(self.device, self._providers)
        return self._tensors(shape, kind)

    def cache_memory(self, shape: tuple[int, ...], kind: type) -> DeviceTensor:
        kind_of_device, number = self.device
        named = {"cpu": "Cpu", "cuda": "Cuda"}[kind_of_device]
        places = zip(self.onnx.get_inputs(), self.onnx.get_input_memory_infos(), strict=True)
        for value, memory in places:
            # What is bound once would be copied once.
            if value.name.startswith("past_key_values.") and (memory.name, memory.device_id) != (named, number):
                raise ModelError(
                    f"{self.folder}: ONNX Runtime's provider for {kind_of_device} leaves {value.name} to the CPU. Use "
                    "a newer one, or a model with a growing cache."
                )
        return self._on_device(shape, kind)

    def bound(self, caches: Mapping[str, Place]) -> BoundCall:
        return BoundCall(self, caches)

    def run(self, output: str, feeds: Mapping[str, np.ndarray], names: Sequence[str | None]) -> np.ndarray:
        with self.rows_of(names) as rows:
            try:
                binding = self.onnx.io_binding()
                for name, value in feeds.items():
                    binding.bind_cpu_input(name, value)
                bind_inputs(binding, {**self.slot_memory, **rows})
                binding.bind_output(output)
                self.onnx.run_with_iobinding(binding)
                found: np.ndarray = binding.get_outputs()[0].numpy()
            except Exception as error:
                raise ModelError(f"{self.folder}: ONNX Runtime cannot run the model ({brief(error)}).") from None
        return found

    def _check_interface(self) -> None:
        """Refuse a model that is not one of ours before anything is asked of it."""
        for name, value in self.inputs.items():
            if name not in NUMBERS and value not in self.caches:
                raise ModelError(f"{self.folder}: its model has an input {name!r:.80}, which is unknown here.")
        for cache in self.caches:
            if cache.type not in NUMPY:
                raise ModelError(
                    f"{self.folder}: has inputs of {cache.type}, which NumPy does not know: use fp16 or fp32."
                )
            sizes = [cache.shape[axis] for axis in (1, 3)] if len(cache.shape) == 4 else [None]
            if not all(isinstance(size, int) for size in sizes) or present_of(cache.name) not in self.outputs:
                raise ModelError(f"{self.folder}: its model's cache {cache.name!r:.80} is not one that is known here.")
        if not any(name in self.outputs for name in (("logits",) if self.caches else RESULTS)):
            raise ModelError(f"{self.folder}: its model gives no {' or '.join(RESULTS)}.")


class BoundCall:
    """Calls of a model with caches at places of their own; see `ModelSession.bound`."""

    def __init__(self, session: Session, caches: Mapping[str, Place]) -> None:
        self._session = session
        self.binding = session.onnx.io_binding()
        self.binding.bind_output("logits")
        for name, (address, shape, kind) in caches.items():
            for bind, end in ((self.binding.bind_input, name), (self.binding.bind_output, present_of(name))):
                bind(end, *session.device, kind, shape, address)
        bind_inputs(self.binding, session.slot_memory)

    def __call__(self, feeds: Mapping[str, np.ndarray], adapters: Memory) -> np.ndarray:
        for name, value in feeds.items():
            self.binding.bind_cpu_input(name, value)
        bind_inputs(self.binding, adapters)
        self._session.onnx.run_with_iobinding(self.binding)
        # The first of the outputs, since it was bound first. Bound anew, it is not kept until the next call.
        logits: np.ndarray = self.binding.get_outputs()[0].numpy()
        self.binding.bind_output("logits")
        return logits


def bind_inputs(binding: Any, inputs: Memory) -> None:
    """Where they are, which must outlive the call. `bind_cpu_input` does not know inputs that have a default (ONNX
    Runtime 1.32)."""
    for name, value in inputs.items():
        device, address = (
            (value.device, value.address) if isinstance(value, DeviceTensor) else (("cpu", 0), value.ctypes.data)
        )
        binding.bind_input(name, *device, element_type(value), value.shape, address)


def _device(name: str) -> tuple[str, int]:
    """The kind and the number of a device, where this ONNX Runtime knows one of its kind."""
    import onnxruntime as ort

    found = re.fullmatch(r"(cpu|cuda)(?::(\d{1,3}))?", name)
    if found is None or name.startswith("cpu:"):
        raise ModelError(f"--device {name!r:.40}: give cpu, cuda, or cuda:1 and so on.")
    if found[1] == "cuda" and _CUDA not in ort.get_available_providers():
        raise ModelError(
            f"--device {name}: ONNX Runtime {ort.__version__} here is for CPUs. Install onnxruntime-gpu[cuda,cudnn] in "
            "its place."
        )
    if found[1] == "cuda" and hasattr(ort, "preload_dlls"):
        # CUDA from packages, which the loader does not find by itself.
        ort.preload_dlls()
    return found[1], int(found[2] or 0)


def element_type(array: np.ndarray | DeviceTensor) -> Any:
    """What ONNX Runtime calls the type of an array that a model is given; `uint16` is bfloat16 by its bits."""
    return _BFLOAT16 if array.dtype == np.uint16 else array.dtype


def ort_value(array: np.ndarray) -> Any:
    """ONNX Runtime's value on a contiguous array, which must outlive it; `uint16` is bfloat16 by its bits."""
    import onnxruntime as ort

    if array.dtype == np.uint16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def run_once(session: Any, wanted: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs `wanted` of a session of ONNX Runtime, whose inputs may be bfloat16 by its bits."""
    if not any(array.dtype == np.uint16 for array in feeds.values()):
        found: list[np.ndarray] = session.run(list(wanted), dict(feeds))
        return found
    held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    values = {name: ort_value(array) for name, array in held.items()}
    return [value.numpy() for value in session.run_with_ort_values(list(wanted), values)]
