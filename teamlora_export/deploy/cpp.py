"""`deploy cpp`: a CMake project that runs the model from C++, on ONNX Runtime or TensorRT."""

from __future__ import annotations

import json
from pathlib import Path

from teamlora_export.bundle import ENGINES_NAME, Bundle
from teamlora_export.deploy.folder import TEMPLATES, Deployment, deployment, require_cpu_dtype
from teamlora_export.deploy.genai import CONFIG_NAME, genai_config
from teamlora_export.deploy.python import render
from teamlora_export.engine.facts import EngineFacts, facts_path, find_engine, read_facts
from teamlora_export.engine.plugin import LIBRARY_NAME, check_version, plugin_of_engine
from teamlora_export.errors import ExportError
from teamlora_export.staging import require_space

SOURCES = TEMPLATES / "cpp"
MODEL_FOLDER = "model"
PLUGINS_FOLDER = "plugins"


def deploy_cpp(bundle: Bundle, out: Path, engine: str | None = None, plugin: Path | None = None) -> Path:
    """Write the project into `out`: sources, and the model in `model/`.

    Args:
        engine: name of an engine of the bundle, or its path, for the TensorRT back end; the graph is left out then.
        plugin: the library that the engine was built with. Default: found among those that were built here.

    Raises:
        ExportError: see `deployment`; or the model is in bfloat16 and there is no engine; or engine, plugin and bundle
            do not belong together.
    """
    refuse_stray_plugin(engine, plugin)
    if engine is None:
        require_cpu_dtype(bundle, "cpp")
    with deployment(bundle, out, "cpp", MODEL_FOLDER, graph=engine is None) as made:
        facts = add_engine(made, engine, plugin) if engine is not None else None
        words = bundle.manifest.task == "text-generation" and (bundle.folder / "tokenizer.json").is_file()
        if words:
            # The program's tokenizer is onnxruntime-genai's, which reads text generators' alone.
            made.add(CONFIG_NAME, json.dumps(genai_config(bundle), indent=4) + "\n")
        for path in sorted(SOURCES.rglob("*")):
            if path.is_file():
                made.write(path.relative_to(SOURCES).as_posix(), path)
        made.write("README.md", render("cpp.README.md.j2", bundle, engine=facts, words=words))
    return out


def refuse_stray_plugin(engine: str | None, plugin: Path | None) -> None:
    """A plugin is an engine's."""
    if plugin is not None and engine is None:
        raise ExportError(f"--plugin {plugin}: goes with an engine. Name it with --engine.")


def add_engine(made: Deployment, name: str, plugin: Path | None, as_name: str | None = None) -> EngineFacts:
    """Add an engine of the bundle, its facts, and the plugin that it was built with.

    Args:
        as_name: the engine's path in the model's folder. Default: as in the bundle.
    """
    path = find_engine(made.bundle, name)
    facts = read_facts(path)
    if dict(facts.model_sha256) != dict(made.bundle.manifest.sha256):
        raise ExportError(f"{path}: was built from another export than {made.bundle.folder}. Build it again.")
    if facts.stripped:
        raise ExportError(f"{path}: holds no weights. Build it without --strip-weights.")
    # An engine has a dtype of its own, and after `trt refit` another adapter.
    made.differs.update(dtype=facts.dtype, adapter_sha256=facts.adapter_sha256)
    require_space(made.folder, path.stat().st_size)
    stored = as_name or f"{ENGINES_NAME}/{path.name}"
    made.add(stored, path)
    made.add(Path(stored).with_suffix(".json").as_posix(), facts_path(path))
    if facts.plugin is not None:
        library = plugin_of_engine(path, facts.plugin, plugin)
        check_version(library, facts.runtime_version)
        made.add(f"{PLUGINS_FOLDER}/{LIBRARY_NAME}", library.path)
    return facts
