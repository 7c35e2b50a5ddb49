"""One interface for everything that can run a model: PyTorch in any precision, ONNX Runtime.

`run` takes and gives arrays by the graph's own names, so that a comparison needs to know no framework. With `taps`,
it also
gives what each module returned, by module path, in the order in which modules finish.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from teamlora_export.adapter.spec import AdapterSpec
from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.graph.passes import inline_bodies
from teamlora_export.graph.passes.module_outputs import MODULES_KEY
from teamlora_export.graph.tasks import encoder_forward
from teamlora_export.model.base import BaseModel
from teamlora_export.model.checkpoint import SafetensorsWeights
from teamlora_export.model.inject import inject
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.model.streaming import stream_weights
from teamlora_export.validate.bfloat16 import emulate_bfloat16
from teamlora_export.validate.cases import Feeds

Taps = dict[str, np.ndarray]
_PAST = re.compile(r"^past_key_values\.(\d+)\.key$")


class Runner(Protocol):
    def run(self, feeds: Feeds) -> Feeds:
        """Outputs by name."""
        ...

    def run_with_taps(self, feeds: Feeds) -> tuple[Feeds, Taps]:
        """Outputs by name, and module outputs by module path."""
        ...


class TorchRunner:
    """The adapted model in PyTorch, in `dtype`; with `weights`, each module's are read from there while it runs."""

    def __init__(
        self, base: BaseModel, adapter: AdapterSpec, dtype: torch.dtype, weights: SafetensorsWeights | None = None
    ) -> None:
        if weights is None:
            self._model = base.load(dtype)
            inject(self._model, adapter)
        else:
            self._model = base.skeleton(dtype)
            inject(self._model, replace(adapter, overrides={}))
            stream_weights(self._model, weights, adapter.overrides)
        self._forward = None if base.task == "text-generation" else encoder_forward(base, self._model)
        self._dtype = dtype

    def run(self, feeds: Feeds) -> Feeds:
        with torch.no_grad(), _Float64Islands() if self._dtype == torch.float64 else nullcontext():
            return self._run_encoder(feeds) if self._forward else self._run_decoder(feeds)

    def run_with_taps(self, feeds: Feeds) -> tuple[Feeds, Taps]:
        taps: Taps = {}

        def hook(path: str):  # type: ignore[no-untyped-def]
            def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
                value = output[0] if type(output) is tuple and output else output
                if isinstance(value, Tensor) and value.is_floating_point():
                    taps[path] = _to_numpy(value)

            return keep

        handles = [m.register_forward_hook(hook(path)) for path, m in self._model.named_modules() if path]
        try:
            return self.run(feeds), taps
        finally:
            for handle in handles:
                handle.remove()

    def expert_use(self) -> dict[str, np.ndarray]:
        """Share of each expert in the last run, by module path; each is [.., k] and sums to one."""
        return {
            path: _to_numpy(module.last_routing / module.routing_sum)
            for path, module in self._model.named_modules()
            if isinstance(module, ExpertLinear) and module.last_routing is not None
        }

    def _run_encoder(self, feeds: Feeds) -> Feeds:
        assert self._forward is not None
        outputs = self._forward(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {name: _to_numpy(value) for name, value in outputs.items()}

    def _run_decoder(self, feeds: Feeds) -> Feeds:
        # Without a configuration the cache keeps all tokens in sliding-window layers too; the mask applies the window.
        cache = DynamicCache()
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items() if not name.startswith("past_")}
        for name, key in feeds.items():
            if match := _PAST.match(name):
                value = feeds[f"past_key_values.{match[1]}.value"]
                cache.update(_to_torch(key, self._dtype), _to_torch(value, self._dtype), int(match[1]))
        outputs = self._model(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        arrays = {"logits": _to_numpy(outputs.logits)}
        for index, layer in enumerate(outputs.past_key_values.layers):
            arrays[f"present.{index}.key"] = _to_numpy(layer.keys)
            arrays[f"present.{index}.value"] = _to_numpy(layer.values)
        return arrays


class OnnxRunner:
    """A bundle's model in ONNX Runtime, on the CPU.

    bfloat16 models run in float32 with every node's result rounded to bfloat16, because the runtime has no CPU
    kernels for it.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session: ort.InferenceSession | None = None
        self._tapped: ort.InferenceSession | None = None
        self._taps: dict[str, list[str]] = {}

    def run(self, feeds: Feeds) -> Feeds:
        if self._session is None:
            emulate = self._bundle.manifest.dtype == "bf16"
            self._session = self._open_edited([]) if emulate else _open_session(self._bundle.model)
        return run_session(self._session, feeds)

    def run_with_taps(self, feeds: Feeds) -> tuple[Feeds, Taps]:
        if self._tapped is None:
            model = ir.load(self._bundle.model)
            self._taps = module_values(model)
            self._tapped = self._open_edited(list(self._taps))
        outputs = run_session(self._tapped, feeds)
        taps = {module: outputs[value] for value, modules in self._taps.items() for module in modules}
        return {port.name: outputs[port.name] for port in self._bundle.manifest.outputs}, taps

    def producer_of(self, module_or_output: str) -> str:
        """Name of the node that makes a module's output, or an output of the model."""
        model = ir.load(self._bundle.model)
        for node in model.graph:
            for value in node.outputs:
                modules = value.metadata_props.get(MODULES_KEY, "").split(",")
                if value.name == module_or_output or module_or_output in modules:
                    return node.name or node.op_type
        return "an input of the model"

    def _open_edited(self, extra_outputs: list[str]) -> ort.InferenceSession:
        """A session on the bundle's model with some of its values as outputs."""
        model = ir.load(self._bundle.model)
        present = {value.name for value in model.graph.outputs}
        values = {value.name: value for node in model.graph for value in node.outputs}
        model.graph.outputs.extend(values[name] for name in extra_outputs if name not in present)
        return open_model(model, self._bundle)


def open_model(model: ir.Model, bundle: Bundle) -> ort.InferenceSession:
    """A session on a model derived from a bundle's, with the bundle's weights; bfloat16 is emulated."""
    if bundle.manifest.dtype == "bf16":
        inline_bodies(model)
        emulate_bfloat16(model)
        common.RemoveUnusedNodesPass()(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        return _open_session(path, bundle.folder)


def module_values(model: ir.Model) -> dict[str, list[str]]:
    """Value name -> paths of the modules that returned it, in the order of the graph."""
    return {
        value.name: value.metadata_props[MODULES_KEY].split(",")
        for node in model.graph
        for value in node.outputs
        if value.name and MODULES_KEY in value.metadata_props
    }


def _open_session(path: Path, weights_folder: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    try:
        if weights_folder is None:
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"{path.name}: ONNX Runtime {ort.__version__} cannot load it ({error}).") from None


_NUMPY_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def run_session(session: ort.InferenceSession, feeds: Feeds) -> Feeds:
    """Feed a session what it takes of `feeds`, cast to its types; every output by name."""
    types = {value.name: _NUMPY_TYPES[value.type] for value in session.get_inputs()}
    with np.errstate(over="ignore"):
        inputs = {name: feeds[name].astype(kind) for name, kind in types.items()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class _Float64Islands(TorchFunctionMode):
    """Keeps a float64 model in float64 where its code asks for float32 (norms, softmax).

    Models upcast half precision that way; on float64 the same code would cut the reference down to float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def _to_torch(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
