"""`deploy python`: the model with a program in Python that runs it on onnxruntime and numpy."""

from __future__ import annotations

from pathlib import Path

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.engine import (
    add_engine,
    longest_text,
    refuse_stray_plugin,
    refuse_unserved,
    serving_packages,
)
from teamlora_export.deploy.engine_session import ENGINE_NAME
from teamlora_export.deploy.folder import deployment, require_cpu_dtype
from teamlora_export.deploy.library import add_library
from teamlora_export.deploy.render import render
from teamlora_export.errors import ExportError

# What runs a model, each file on those before it; the first nine read words, the last is a program.
OPENING = (
    *("failure.py", "device_tensor.py", "adapter_slots.py", "model_folder.py"),
    *("model_session.py", "cores.py", "pages.py", "session.py", "words.py"),
)
ROWS = ("slots_base.py", "slots_in_place.py", "slots_on_device.py", "slots_growing.py", "slots.py")
ENGINE = ("cuda_memory.py", "engine_session.py")
SCHEDULING = ("sampling.py", *ROWS, "answers.py", "health.py", "scheduler.py", *ENGINE)
PROGRAM = (*OPENING, *SCHEDULING, "runner.py")
# The oldest that run what we write: ONNX Runtime 1.26 takes one overload of a function for all of them, and refuses a
# model with two forms of the op.
_OTHERS = ("numpy>=2.0", "tokenizers>=0.20")
REQUIREMENTS = "".join(f"{line}\n" for line in ("onnxruntime>=1.27", *_OTHERS))


def deploy_python(
    bundle: Bundle,
    out: Path,
    logits: str = "last",
    library: Path | None = None,
    engine: str | None = None,
    plugin: Path | None = None,
) -> Path:
    """Write the deployment into `out`.

    Args:
        logits: see `deployment`; an engine gives what it was built with.
        library: a native library with the op, which is copied, and which the program takes then.
        engine, plugin: see `deploy_cpp`; of a text generator, one whose cache is in place.

    Raises:
        ExportError: see `deployment`, `add_library` and `add_engine`; or the model is in bfloat16 and there is no
            engine; or texts cannot share the engine's steps.
    """
    refuse_stray_plugin(engine, plugin)
    if engine is not None and library is not None:
        raise ExportError("--library is for ONNX Runtime, and an engine runs without it. Leave one of them out.")
    if engine is None:
        require_cpu_dtype(bundle, "python")
    with deployment(bundle, out, "python", graph=engine is None, logits=logits, shelf="slots") as made:
        facts = add_engine(made, engine, plugin, ENGINE_NAME) if engine is not None else None
        if engine is not None and facts is not None:
            refuse_unserved(engine, facts)
        for name in PROGRAM:
            made.write(name, Path(__file__).parent / name)
        native = None if library is None else add_library(made, library)
        requirements, longest = REQUIREMENTS, None
        if facts is not None:
            longest = longest_text(facts)
            requirements = "".join(f"{line}\n" for line in (*serving_packages(facts), *_OTHERS))
        made.write("requirements.txt", requirements)
        made.write("README.md", render("python.README.md.j2", bundle, library=native, engine=facts, longest=longest))
    return out
