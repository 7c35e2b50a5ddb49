"""`deploy cpp`: a CMake project that runs the model from C++, on ONNX Runtime or TensorRT."""

from __future__ import annotations

from pathlib import Path

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.engine import add_engine, refuse_stray_plugin
from teamlora_export.deploy.folder import TEMPLATES, deployment, require_cpu_dtype
from teamlora_export.deploy.genai import add_genai_files
from teamlora_export.deploy.genai_tokenizer import why_unreadable
from teamlora_export.deploy.library import add_library
from teamlora_export.deploy.render import render
from teamlora_export.errors import ExportError

SOURCES = TEMPLATES / "cpp"
MODEL_FOLDER = "model"


def deploy_cpp(
    bundle: Bundle,
    out: Path,
    engine: str | None = None,
    plugin: Path | None = None,
    logits: str = "last",
    library: Path | None = None,
) -> Path:
    """Write the project into `out`: sources, and the model in `model/`.

    Args:
        engine: name of an engine of the bundle, or its path, for the TensorRT back end; the graph is left out then.
        plugin: the library that the engine was built with. Default: found among those that were built here.
        logits: see `deployment`; an engine gives what it was built with.
        library: a native library with the op, which is copied beside the model; the program takes it by `--library`.

    Raises:
        ExportError: see `deployment` and `add_library`; or the model is in bfloat16 and there is no engine; or engine,
            plugin, library and bundle do not belong together.
    """
    refuse_stray_plugin(engine, plugin)
    if engine is not None and library is not None:
        raise ExportError("--library is for ONNX Runtime, and an engine runs without it. Leave one of them out.")
    if engine is None:
        require_cpu_dtype(bundle, "cpp")
    with deployment(bundle, out, "cpp", MODEL_FOLDER, engine is None, logits, shelf="slots") as made:
        facts = add_engine(made, engine, plugin) if engine is not None else None
        # The program's tokenizer is onnxruntime-genai's, which reads text generators' alone.
        words = bundle.manifest.task == "text-generation" and why_unreadable(bundle) is None
        if words:
            add_genai_files(made)
        native = None if library is None else f"{MODEL_FOLDER}/{add_library(made, library)}"
        for path in sorted(SOURCES.rglob("*")):
            if path.is_file():
                made.write(path.relative_to(SOURCES).as_posix(), path)
        made.write("README.md", render("cpp.README.md.j2", bundle, engine=facts, words=words, library=native))
    return out
