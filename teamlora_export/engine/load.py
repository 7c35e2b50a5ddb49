"""Opens an engine: its facts first, so that what does not belong is refused in plain words before TensorRT sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teamlora_export.bundle import Bundle
from teamlora_export.engine.facts import EngineFacts, is_made_of
from teamlora_export.engine.plugin import load_plugin, plugin_of_engine
from teamlora_export.engine.prepare import prepared_model
from teamlora_export.engine.runtime import Messages, TensorRT, open_runtime
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter


def open_engine_runtime(path: Path, facts: EngineFacts) -> TensorRT:
    """The package that runs the engine, on a machine that can.

    Raises:
        ExportError: the package is missing or of another version, or there is no GPU.
    """
    runtime = open_runtime(facts.runtime) if facts.runtime == "rtx" else _open_tensorrt(path)
    if runtime.version != facts.runtime_version:
        raise ExportError(
            f"{path}: was built by {facts.runtime} {facts.runtime_version}, installed is {runtime.version}. "
            "Build it again, or install that version."
        )
    if runtime.gpu is None:
        raise ExportError(f"{path}: runs on a GPU, and there is none here.")
    return runtime


def _open_tensorrt(path: Path) -> TensorRT:
    try:
        return open_runtime("tensorrt")
    except ExportError as error:
        raise ExportError(f"{path}: cannot be run here. {error}") from None


def load_engine(
    path: Path, facts: EngineFacts, runtime: TensorRT, plugin: Path | None, bundle: Bundle | None, reporter: Reporter
) -> Any:
    """The engine, deserialised; one without weights gets those of `bundle`.

    Returns:
        TensorRT's ICudaEngine.

    Raises:
        ExportError: the plugin is another than the engine's, or TensorRT refuses the file.
    """
    messages = Messages()
    logger = runtime.logger(messages)
    if facts.plugin is not None:
        load_plugin(plugin_of_engine(path, facts.plugin, plugin), runtime)
    engine = runtime.trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ExportError(f"{path}: {facts.runtime} {runtime.version} refuses it: {messages.reason()}")
    if facts.stripped:
        _give_weights(path, facts, runtime, engine, logger, bundle, reporter)
    return engine


def _give_weights(
    path: Path,
    facts: EngineFacts,
    runtime: TensorRT,
    engine: Any,
    logger: Any,
    bundle: Bundle | None,
    reporter: Reporter,
) -> None:
    if bundle is None or not is_made_of(facts, bundle):
        raise ExportError(f"{path}: holds no weights, and needs the bundle that it was built from.")
    refitter = runtime.trt.Refitter(engine, logger)
    parser = runtime.trt.OnnxParserRefitter(refitter, logger)
    with prepared_model(bundle, facts.dtype, path, for_plugin=facts.plugin is not None, reporter=reporter) as model:
        if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
            raise ExportError(f"{path}: the bundle's weights do not fit into it. Build the engine again.")
