"""config.pbtxt of the models in a Triton repository, made with Triton's own protobuf definitions.

What a model of ours needs of them follows from how the server works (triton-inference-server/core):

- The cache of text generation is implicit state: `present.*` of a request comes back as `past_key_values.*` of the next
  one of its sequence. A sequence starts with every variable size of a state at 1, never 0: a cache of one row of zeros,
  which the client masks out.
- Requests share a batch when their inputs have the same shapes; the mask's shape tells the cache's length, so that
  sequences share one while they are equally long.
- Where the graph keeps its cache in place, the state is one buffer of a fixed size, at both ends; it starts as zeros,
  of which no mask names a place. A mask over all of it lets sequences of any length share a batch.
- A warm-up request belongs to no sequence, so a model with state cannot be warmed up: its load would fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.folder import port_in
from teamlora_export.deploy.model_session import RESULTS
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.engine.facts import EngineFacts
from teamlora_export.errors import ExportError
from teamlora_export.ports import BATCH, Port

_TYPES = {"int64": "TYPE_INT64", "float": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}
# Behind a model's name: the one that takes words.
TEXT = "_text"
# Warm-up data: a row of ones for the mask. Length of the warm-up's rows.
WARMUP_TOKENS = 16
WARMUP_FILE = "ones"

# A sequence that is not ended keeps its cache so long.
_IDLE_MICROSECONDS = 60_000_000
_QUEUE_MICROSECONDS = 500
# Tokens of prompts that are read between two steps of texts that are batched continuously.
_PART = 256


def model_config(bundle: Bundle, name: str, options: TritonOptions, engine: EngineFacts | None, batch: int) -> Any:
    """The model itself: the bundle's graph on ONNX Runtime, or its engine on TensorRT.

    Args:
        engine: what it is; None: the graph. batch: requests that run together at most.
    """
    engine_dtype = None if engine is None else engine.dtype
    pb = protobuf()
    config = pb.ModelConfig(name=name, max_batch_size=batch)
    config.version_policy.latest.num_versions = 1
    if engine is None:
        config.backend = "onnxruntime"
        config.default_model_filename = "model.onnx"
        if options.library is not None:
            config.model_operations.op_library_filename.append(options.library)
    else:
        config.backend, config.platform = "tensorrt", "tensorrt_plan"
        config.default_model_filename = "model.plan"
    group = config.instance_group.add(count=options.instances)
    on_gpu = options.gpu or engine is not None
    group.kind = pb.ModelInstanceGroup.KIND_GPU if on_gpu else pb.ModelInstanceGroup.KIND_CPU
    if options.threads and not on_gpu:
        _add_parameters(config, intra_op_thread_count=str(options.threads))
    if engine is not None and len(engine.profiles) > 1:
        group.profile.extend(str(index) for index in range(len(engine.profiles)))
    ports = [port_in(port, engine_dtype) for port in bundle.manifest.inputs]
    outputs = [port_in(port, engine_dtype) for port in bundle.manifest.outputs]
    for port in ports:
        if not port.name.startswith("past_key_values."):
            config.input.add(name=port.name, data_type=_type(port), dims=_dims(port))
    for port in outputs:
        if port.name in RESULTS:
            config.output.add(name=port.name, data_type=_type(port), dims=_dims(port))
    if bundle.manifest.task == "text-generation":
        _add_state(config, ports, outputs, options.sequences)
    else:
        config.dynamic_batching.max_queue_delay_microseconds = _QUEUE_MICROSECONDS
        _add_warmup(config, batch)
    return config


def generate_config(bundle: Bundle, name: str, check_files: bool, instances: int, capacity: int | None) -> Any:
    """The model around a text generator that takes and gives words.

    Args:
        capacity: of a cache in place.
    """
    pb = protobuf()
    config = pb.ModelConfig(name=f"{name}{TEXT}", backend="python", max_batch_size=0)
    config.version_policy.latest.num_versions = 1
    config.model_transaction_policy.decoupled = True
    config.input.add(name="text_input", data_type=pb.TYPE_STRING, dims=[1])
    config.input.add(name="max_tokens", data_type=pb.TYPE_INT32, dims=[1], optional=True)
    config.input.add(name="stream", data_type=pb.TYPE_BOOL, dims=[1], optional=True)
    config.output.add(name="text_output", data_type=pb.TYPE_STRING, dims=[1])
    # Each waits for the model most of the time, and several keep it busy.
    config.instance_group.add(count=instances, kind=pb.ModelInstanceGroup.KIND_CPU)
    takes_positions = any(port.name == "position_ids" for port in bundle.manifest.inputs)
    _add_parameters(
        config, model=name, takes_positions=takes_positions, check_files=check_files, capacity=str(capacity or 0)
    )
    return config


def continuous_config(name: str, options: TritonOptions, *, slots: int, waiting: int, shelf: bool) -> Any:
    """A text generator that batches continuously, with the model's files in its own folder; on a GPU, with a copy, or
    several, on each of the server's.

    Args:
        slots: texts that are written at a time. waiting: requests that may wait for one of them to end.
        shelf: a request says which adapter answers it, or asks which there are.
    """
    pb = protobuf()
    # Not that it takes batches: the requests of Triton's OpenAI front end have an axis for them.
    config = pb.ModelConfig(name=f"{name}{TEXT}", backend="python", max_batch_size=1)
    config.version_policy.latest.num_versions = 1
    config.model_transaction_policy.decoupled = True
    for key, kind, size in (
        ("text_input", pb.TYPE_STRING, 1),
        ("messages", pb.TYPE_STRING, 1),
        ("input_ids", pb.TYPE_INT64, -1),
        ("max_tokens", pb.TYPE_INT32, 1),
        ("stream", pb.TYPE_BOOL, 1),
        ("temperature", pb.TYPE_FP32, 1),
        ("top_k", pb.TYPE_INT32, 1),
        ("top_p", pb.TYPE_FP32, 1),
        ("repetition_penalty", pb.TYPE_FP32, 1),
        ("presence_penalty", pb.TYPE_FP32, 1),
        ("frequency_penalty", pb.TYPE_FP32, 1),
        ("seed", pb.TYPE_UINT64, 1),
        ("stop", pb.TYPE_STRING, -1),
        ("stop_words", pb.TYPE_STRING, -1),
        ("log_probs", pb.TYPE_BOOL, 1),
        ("return_num_input_tokens", pb.TYPE_BOOL, 1),
        ("return_num_output_tokens", pb.TYPE_BOOL, 1),
        ("time_limit", pb.TYPE_FP32, 1),
        *([("adapter", pb.TYPE_STRING, 1), ("list_adapters", pb.TYPE_BOOL, 1)] if shelf else []),
    ):
        config.input.add(name=key, data_type=kind, dims=[size], optional=True)
    for key, kind, size in (
        ("text_output", pb.TYPE_STRING, 1),
        ("finish_reason", pb.TYPE_STRING, 1),
        ("token_ids", pb.TYPE_INT64, -1),
        ("log_probs", pb.TYPE_FP32, -1),
        ("num_input_tokens", pb.TYPE_INT32, 1),
        ("num_output_tokens", pb.TYPE_INT32, 1),
        *([("adapters", pb.TYPE_STRING, -1)] if shelf else []),
    ):
        config.output.add(name=key, data_type=kind, dims=[size])
    group = pb.ModelInstanceGroup
    config.instance_group.add(count=options.instances, kind=group.KIND_GPU if options.gpu else group.KIND_CPU)
    numbers = {"slots": slots, "waiting": waiting, "part": _PART}
    numbers |= {"threads": options.threads, "capacity": options.capacity or 0}
    given = {key: str(number) for key, number in numbers.items()}
    if options.library:
        given["library"] = options.library
    _add_parameters(config, model=config.name, check_files=options.check_files, spinning=True, time_limit="0", **given)
    return config


def tokenize_config(bundle: Bundle, name: str, check_files: bool, batch: int) -> Any:
    """The ensemble's first step, for models that do not generate text."""
    pb = protobuf()
    config = pb.ModelConfig(name=f"{name}_tokenizer", backend="python", max_batch_size=batch)
    config.version_policy.latest.num_versions = 1
    config.input.add(name="text_input", data_type=pb.TYPE_STRING, dims=[1])
    for port in bundle.manifest.inputs:
        config.output.add(name=port.name, data_type=_type(port), dims=_dims(port))
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    _add_parameters(config, model=name, check_files=check_files)
    return config


def ensemble_config(model: Any, tokenizer: Any, result: str) -> Any:
    """Tokenizer and model as one, which gives the model's output `result`."""
    pb = protobuf()
    config = pb.ModelConfig(name=f"{model.name}_text", platform="ensemble", max_batch_size=model.max_batch_size)
    config.version_policy.latest.num_versions = 1
    config.input.extend(tokenizer.input)
    config.output.extend(value for value in model.output if value.name == result)
    for part in (tokenizer, model):
        step = config.ensemble_scheduling.step.add(model_name=part.name, model_version=-1)
        for value in part.input:
            step.input_map[value.name] = value.name
        for value in part.output:
            if part is tokenizer or value.name == result:
                step.output_map[value.name] = value.name
    return config


def result_of(bundle: Bundle) -> str:
    """The output that clients ask for."""
    given = {port.name for port in bundle.manifest.outputs}
    return next(name for name in RESULTS if name in given)


def to_text(config: Any) -> str:
    """config.pbtxt; read again, it is the same configuration."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    assert text_format.Parse(text, protobuf().ModelConfig()) == config
    return text


def protobuf() -> Any:
    """Triton's definitions."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2


def warmup_ones() -> bytes:
    """The mask of a warm-up's row, int64 [WARMUP_TOKENS]."""
    return np.ones(WARMUP_TOKENS, "<i8").tobytes()


def _add_state(config: Any, inputs: Iterable[Port], outputs: Iterable[Port], sequences: int) -> None:
    batching = config.sequence_batching
    batching.max_sequence_idle_microseconds = _IDLE_MICROSECONDS
    batching.oldest.max_candidate_sequences = sequences
    given = {port.name: port for port in outputs}
    for port in inputs:
        if not port.name.startswith("past_key_values."):
            continue
        present = given[port.name.replace("past_key_values.", "present.")]
        state = batching.state.add(input_name=port.name, output_name=present.name)
        state.data_type, dims = _type(port), _dims(port)
        state.dims.extend(dims)
        state.use_same_buffer_for_input_output = -1 not in dims
        start = state.initial_state.add(name=f"empty {port.name}", zero_data=True, data_type=_type(port))
        start.dims.extend(max(size, 1) for size in dims)


def _add_warmup(config: Any, batch: int) -> None:
    for size in sorted({1, batch}):
        sample = config.model_warmup.add(name=f"batch of {size}", batch_size=size, count=1)
        for value in config.input:
            row = sample.inputs[value.name]
            row.data_type = value.data_type
            row.dims.append(WARMUP_TOKENS)
            if value.name == "attention_mask":
                row.input_data_file = WARMUP_FILE
            else:
                row.zero_data = True


def _add_parameters(config: Any, **values: str | bool) -> None:
    for key, value in values.items():
        config.parameters[key].string_value = value if isinstance(value, str) else str(value).lower()


def _type(port: Port) -> int:
    known: Mapping[str, int] = dict(protobuf().DataType.items())
    return known[_TYPES[port.dtype]]


def _dims(port: Port) -> list[int]:
    """Without the batch, which Triton adds."""
    if port.shape[0] != BATCH:
        raise ExportError(f"{port.name}: its first axis is not the batch, as Triton needs it to be.")
    return [size if isinstance(size, int) else -1 for size in port.shape[1:]]
