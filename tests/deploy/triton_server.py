"""Stands in for a Triton server: reads a repository by its rules, and runs the models in it.

The rules are those of triton-inference-server's core and back ends (2.71), as far as our repositories meet them: names
and versions, pairs of platform and back end, inputs and outputs against the model's, batches, states of sequences and
how they start, warm-up, ensembles, Python models with the interface that they import. `triton_front.py` adds HTTP and
gRPC.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2 as pb

from teamlora_export.deploy.python import OPENING, SCHEDULING

_ORT_TYPES = {"tensor(int64)": pb.TYPE_INT64, "tensor(float)": pb.TYPE_FP32, "tensor(float16)": pb.TYPE_FP16}
_NUMPY = {
    pb.TYPE_INT64: np.int64,
    pb.TYPE_INT32: np.int32,
    pb.TYPE_FP32: np.float32,
    pb.TYPE_FP16: np.float16,
    pb.TYPE_BOOL: np.bool_,
    pb.TYPE_STRING: np.object_,
}
_PAIRS = {("onnxruntime", ""), ("onnxruntime", "onnxruntime_onnx"), ("tensorrt", "tensorrt_plan"), ("python", "")}
Tensors = dict[str, np.ndarray]


class LoadError(Exception):
    """The server would not load the model."""


class RequestError(Exception):
    """The server would refuse the request."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise LoadError(what)


class Server:
    """The models of a repository, loaded."""

    def __init__(self, repository: Path) -> None:
        self.models: dict[str, Model] = {}
        # By their clients, over gRPC. What was answered already must not be: a real server keeps the model then.
        self.cancelled_streams = 0
        # What Python models count: by the metric's name and its labels.
        self.metrics: Counter[tuple[str, ...]] = Counter()
        configs = {}
        for folder in sorted(repository.iterdir()):
            config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
            require(config.name == folder.name, f"{folder.name}: its configuration is of {config.name}")
            versions = [path.name for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
            require(versions == ["1"], f"{folder.name}: has the versions {versions}")
            require(config.HasField("version_policy"), f"{folder.name}: no version policy")
            configs[folder.name] = config
        # Ensembles and Python models may call others, so they come last.
        order = sorted(
            configs, key=lambda name: (configs[name].platform == "ensemble", configs[name].backend == "python")
        )
        for name in order:
            config = configs[name]
            kind = Ensemble if config.platform == "ensemble" else _KINDS[config.backend]
            require(
                config.platform == "ensemble" or (config.backend, config.platform) in _PAIRS,
                f"{name}: back end {config.backend} and platform {config.platform}",
            )
            self.models[name] = kind(self, repository / name, config)

    def infer(self, name: str, inputs: Tensors, sequence: int = 0, start: bool = False, end: bool = False) -> Tensors:
        return self.infer_together(name, [(inputs, sequence, start, end)])[0]

    def infer_together(self, name: str, requests: Sequence[tuple[Tensors, int, bool, bool]]) -> list[Tensors]:
        """Requests that the scheduler puts into one batch."""
        model = self.models[name]
        for inputs, *_ in requests:
            model.check_request(inputs)
        return model.run(requests)

    def stream(self, name: str, inputs: Tensors) -> Iterator[Tensors]:
        """The answers of a model that sends several."""
        self.models[name].check_request(inputs)
        yield from self.models[name].stream(inputs)


class Model:
    def __init__(self, server: Server, folder: Path, config: Any) -> None:
        self.server, self.folder, self.config = server, folder, config
        self.load()

    def load(self) -> None: ...

    def run(self, requests: Sequence[tuple[Tensors, int, bool, bool]]) -> list[Tensors]:
        raise RequestError(f"{self.config.name}: sends answers as a stream only")

    def check_request(self, inputs: Tensors) -> None:
        known = {value.name: value for value in self.config.input}
        for name in inputs:
            if name not in known:
                raise RequestError(f"unexpected inference input '{name}'")
        for name, value in known.items():
            if name not in inputs:
                if not value.optional:
                    raise RequestError(f"expected input '{name}'")
                continue
            array = inputs[name]
            if array.dtype != _NUMPY[value.data_type]:
                raise RequestError(f"input '{name}' is {array.dtype}")
            shape = list(array.shape)
            if self.config.max_batch_size > 0:
                if shape[0] > self.config.max_batch_size:
                    raise RequestError(f"batch-size must be <= {self.config.max_batch_size}")
                shape = shape[1:]
            fits = len(shape) == len(value.dims) and all(
                expected in (-1, size) for expected, size in zip(value.dims, shape, strict=True)
            )
            if not fits:
                raise RequestError(f"unexpected shape for input '{name}': {shape}, expected {list(value.dims)}")


class OnnxModel(Model):
    """The ONNX Runtime back end, with implicit state and warm-up."""

    def load(self) -> None:
        config = self.config
        options = ort.SessionOptions()
        options.log_severity_level = 3
        require(not config.model_operations.op_library_filename, "a library of ops is named, and there is none here")
        self.session = ort.InferenceSession(
            self.folder / "1" / config.default_model_filename, options, ["CPUExecutionProvider"]
        )
        self.states: dict[int, Tensors] = {}
        inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        states = config.sequence_batching.state
        require(len(config.input) + len(states) == len(inputs), "configuration expects other inputs than the model has")
        for value in config.input:
            require(not (value.optional and config.max_batch_size), "optional inputs and batches exclude each other")
            self._check(value, value.dims, inputs, exact=False)
        for value in config.output:
            self._check(value, value.dims, outputs, exact=True)
        require(bool(config.output), "no output")
        for state in states:
            for name, ports in ((state.input_name, inputs), (state.output_name, outputs)):
                port = pb.ModelInput(name=name, data_type=state.data_type)
                self._check(port, state.dims, ports, exact=True)
            self._check_start(state)
        if states:
            require(not config.HasField("dynamic_batching"), "dynamic and sequence batching exclude each other")
            require(config.max_batch_size > 0, "sequences need a batch dimension here")
        self._warm_up()

    def _check(self, value: Any, dims: Sequence[int], ports: Mapping[str, Any], exact: bool) -> None:
        require(value.name in ports, f"the model has no '{value.name}'")
        port = ports[value.name]
        require(_ORT_TYPES[port.type] == value.data_type, f"'{value.name}' is {port.type}")
        shape = [size if isinstance(size, int) else -1 for size in port.shape]
        if self.config.max_batch_size > 0:
            require(shape[0] == -1, f"'{value.name}': the model's first axis is no batch")
            shape = shape[1:]
        same = len(shape) == len(dims) and all(
            (a == b) or (not exact and a == -1) for a, b in zip(shape, dims, strict=True)
        )
        require(same, f"'{value.name}': the model has {shape}, the configuration {list(dims)}")

    def _check_start(self, state: Any) -> None:
        if not state.initial_state:
            # The server loads it, and fails at the first request.
            return
        (start,) = state.initial_state
        require(start.data_type == state.data_type and start.name != "" and start.zero_data, "initial_state")
        fits = len(start.dims) == len(state.dims) and all(
            size >= 0 and fixed in (-1, size) for size, fixed in zip(start.dims, state.dims, strict=True)
        )
        require(fits, f"initial_state of '{state.input_name}': {list(start.dims)} for {list(state.dims)}")

    def _warm_up(self) -> None:
        for sample in self.config.model_warmup:
            require(not self.config.sequence_batching.state, "a warm-up request has no state to write to")
            rows = {}
            for name, value in sample.inputs.items():
                require(all(size > 0 for size in value.dims), "warm-up needs fixed sizes")
                count, kind = int(np.prod(value.dims)), _NUMPY[value.data_type]
                data = np.zeros(count, kind)
                if value.input_data_file:
                    data = np.fromfile(self.folder / "warmup" / value.input_data_file, kind, count)
                    require(len(data) == count, f"warm-up: {value.input_data_file} is too short")
                rows[name] = data.reshape(1, *value.dims)
            self.run([(rows, 0, False, False)] * sample.batch_size)

    def run(self, requests: Sequence[tuple[Tensors, int, bool, bool]]) -> list[Tensors]:
        states = self.config.sequence_batching.state
        rows = []
        for inputs, sequence, start, _ in requests:
            if not states:
                rows.append(inputs)
                continue
            if sequence == 0:
                raise RequestError("inference request must specify a non-zero correlation ID")
            if start:
                self.states[sequence] = {state.input_name: _start(state) for state in states}
            elif sequence not in self.states:
                raise RequestError(f"sequence {sequence} must start with the START flag")
            if len(inputs["input_ids"]) != 1:
                raise RequestError("a request of a sequence has a batch of one")
            rows.append({**inputs, **self.states[sequence]})
        if len({tuple(row[value.name].shape[1:] for value in self.config.input) for row in rows}) != 1:
            raise RequestError("requests of different shapes are not batched")
        if sum(len(row["input_ids"]) for row in rows) > self.config.max_batch_size:
            raise RequestError("more than max_batch_size")
        names = [value.name for value in self.config.output] + [state.output_name for state in states]
        together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        outputs = dict(zip(names, self.session.run(names, together), strict=True))
        answers, at = [], 0
        for row, (_, sequence, _, end) in zip(rows, requests, strict=True):
            mine = slice(at, at + len(row["input_ids"]))
            at = mine.stop
            for state in states:
                self._keep(state, self.states[sequence], outputs[state.output_name][mine])
            if end:
                self.states.pop(sequence, None)
            answers.append({value.name: outputs[value.name][mine] for value in self.config.output})
        return answers

    def _keep(self, state: Any, held: Tensors, given: np.ndarray) -> None:
        """One buffer at both ends stays the sequence's own; else what the model gave takes its place."""
        if not state.use_same_buffer_for_input_output:
            held[state.input_name] = given
            return
        if held[state.input_name].shape != given.shape:
            raise RequestError(f"state '{state.output_name}' is {given.shape}")
        held[state.input_name][...] = given


def _start(state: Any) -> np.ndarray:
    """Every variable size is 1, whatever initial_state says, unless that is 0 or missing."""
    if not state.initial_state or 0 in state.initial_state[0].dims:
        raise RequestError(f"the state '{state.input_name}' has no memory to start with")
    shape = [1, *(1 if size == -1 else size for size in state.dims)]
    return np.zeros(shape, _NUMPY[state.data_type])


class Ensemble(Model):
    def load(self) -> None:
        known = {value.name: value.data_type for value in self.config.input}
        for step in self.config.ensemble_scheduling.step:
            require(step.model_name in self.server.models, f"no model {step.model_name}")
            part = self.server.models[step.model_name].config
            require(part.max_batch_size >= self.config.max_batch_size, f"{part.name} takes smaller batches")
            require(set(step.input_map) == {value.name for value in part.input}, f"inputs of {part.name}")
            for value in part.input:
                source = step.input_map[value.name]
                require(known.get(source) == value.data_type, f"{source} is not what {part.name} takes")
            given = {value.name: value.data_type for value in part.output}
            for name, target in step.output_map.items():
                require(name in given, f"{part.name} has no {name}")
                require(target not in known, f"{target} is given twice")
                known[target] = given[name]
        for value in self.config.output:
            require(known.get(value.name) == value.data_type, f"nothing gives {value.name}")

    def run(self, requests: Sequence[tuple[Tensors, int, bool, bool]]) -> list[Tensors]:
        answers = []
        for inputs, *_ in requests:
            values = dict(inputs)
            for step in self.config.ensemble_scheduling.step:
                given = {name: values[source] for name, source in step.input_map.items()}
                found = self.server.infer(step.model_name, given)
                values.update({target: found[name] for name, target in step.output_map.items()})
            answers.append({value.name: values[value.name] for value in self.config.output})
        return answers


class PythonModel(Model):
    def load(self) -> None:
        sys.modules["triton_python_backend_utils"] = _backend_utils(self.server)
        path = self.folder / "1" / "model.py"
        # As the back end does: the version's folder is where it imports from.
        for name in ("opened", "chat", *(Path(file).stem for file in (*OPENING, *SCHEDULING))):
            sys.modules.pop(name, None)
        sys.path.insert(0, str(path.parent))
        try:
            spec = importlib.util.spec_from_file_location(f"model_of_{self.config.name}", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        self.utils = module.pb_utils
        self.model = module.TritonPythonModel()
        config = json_format.MessageToDict(self.config, preserving_proto_field_name=True)
        try:
            self.model.initialize(
                {
                    "model_config": json.dumps(config),
                    "model_name": self.config.name,
                    "model_instance_name": f"{self.config.name}_0_0",
                    "model_instance_kind": "CPU",
                    "model_instance_device_id": "0",
                }
            )
        except self.utils.TritonModelException as error:
            raise LoadError(str(error)) from None

    def run(self, requests: Sequence[tuple[Tensors, int, bool, bool]]) -> list[Tensors]:
        if self.config.model_transaction_policy.decoupled:
            return super().run(requests)
        answers = self.model.execute([_Request(self.utils, inputs) for inputs, *_ in requests])
        return [self._outputs(answer) for answer in answers]

    def stream(self, inputs: Tensors) -> Iterator[Tensors]:
        request = _Request(self.utils, inputs)
        self.model.execute([request])
        try:
            # Its answers may come from a thread of its own.
            while (answer := request.sender.answers.get(timeout=120)) is not None:
                yield self._outputs(answer)
        finally:
            request.sender.cancelled = True

    def unload(self) -> None:
        self.model.finalize()

    def _outputs(self, answer: Any) -> Tensors:
        if answer.has_error():
            raise RequestError(f"{answer.error().code}: {answer.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}


class _Sender:
    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.final = self.cancelled = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.final
        if response is not None:
            self.answers.put(response)
        self.final = flags == 1
        if self.final:
            self.answers.put(None)

    def is_cancelled(self) -> bool:
        return self.cancelled


class _Request:
    def __init__(self, utils: Any, inputs: Tensors) -> None:
        self.inputs_by_name = {name: utils.Tensor(name, array) for name, array in inputs.items()}
        self.sender = _Sender()

    def inputs(self) -> list[Any]:
        return list(self.inputs_by_name.values())

    def get_response_sender(self) -> _Sender:
        return self.sender


def _backend_utils(server: Server) -> types.ModuleType:
    """The module that Python models import, as far as ours use it."""

    class Tensor:
        def __init__(self, name: str, array: np.ndarray) -> None:
            assert isinstance(array, np.ndarray)
            self._name, self._array = name, array

        def name(self) -> str:
            return self._name

        def as_numpy(self) -> np.ndarray:
            return self._array

    class TritonError:
        INTERNAL, INVALID_ARG, UNAVAILABLE = "INTERNAL", "INVALID_ARG", "UNAVAILABLE"

        def __init__(self, message: str, code: str = INTERNAL) -> None:
            # It becomes a string of C++.
            self._message, self.code = message.encode().decode(), code

        def message(self) -> str:
            return self._message

    class InferenceResponse:
        def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
            self._tensors, self._error = output_tensors, error

        def has_error(self) -> bool:
            return self._error is not None

        def error(self) -> TritonError | None:
            return self._error

        def output_tensors(self) -> Sequence[Tensor]:
            return self._tensors

    class InferenceRequest:
        def __init__(
            self,
            *,
            model_name: str,
            requested_output_names: list[str],
            inputs: list[Tensor],
            correlation_id: int,
            flags: int,
            preferred_memory: object,
        ) -> None:
            assert 0 < correlation_id < 2**64
            self._name, self._wanted, self._flags = model_name, requested_output_names, flags
            self._inputs = {tensor.name(): tensor.as_numpy() for tensor in inputs}
            self._sequence = correlation_id

        def exec(self) -> InferenceResponse:
            try:
                found = server.infer(
                    self._name, self._inputs, self._sequence, bool(self._flags & 1), bool(self._flags & 2)
                )
            except RequestError as error:
                return InferenceResponse(error=TritonError(str(error)))
            return InferenceResponse([Tensor(name, found[name]) for name in self._wanted])

    class MetricFamily:
        GAUGE, COUNTER = "GAUGE", "COUNTER"

        def __init__(self, *, name: str, description: str, kind: str) -> None:
            assert kind in (self.GAUGE, self.COUNTER)
            self._name, self._grows = name, kind == self.COUNTER

        def Metric(self, *, labels: Mapping[str, str]) -> Metric:
            return Metric((self._name, *labels.values()), self._grows)

    class Metric:
        def __init__(self, key: tuple[str, ...], grows: bool) -> None:
            self._key, self._grows = key, grows

        def increment(self, change: float) -> None:
            assert change > 0 or not self._grows
            server.metrics[self._key] += change

    module = types.ModuleType("triton_python_backend_utils")
    module.MetricFamily = MetricFamily
    module.Tensor, module.TritonError = Tensor, TritonError
    module.InferenceRequest, module.InferenceResponse = InferenceRequest, InferenceResponse
    module.TritonModelException = type("TritonModelException", (Exception,), {})
    module.PreferredMemory = lambda *arguments: arguments
    module.TRITONSERVER_MEMORY_CPU = 0
    module.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START, module.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 1, 2
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.get_input_tensor_by_name = lambda request, name: request.inputs_by_name.get(name)
    module.get_output_tensor_by_name = lambda response, name: next(
        (tensor for tensor in response.output_tensors() if tensor.name() == name), None
    )
    return module


_KINDS: Mapping[str, type[Model]] = {"onnxruntime": OnnxModel, "python": PythonModel}


def words(*texts: str) -> np.ndarray:
    return np.array([text.encode() for text in texts], np.object_)


def rows(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs of one request, with the axis that Triton has for a batch."""
    return {name: values[None] for name, values in given.items()}


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.pbtxt"
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    for name, change in changes.items():
        change(config) if callable(change) else setattr(config, name, change)
    path.write_text(text_format.MessageToString(config))
