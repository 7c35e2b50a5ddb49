"""`deploy python`: the model with a program in Python that runs it on onnxruntime and numpy."""

from __future__ import annotations

from pathlib import Path

from teamlora_export.bundle import Bundle
from teamlora_export.deploy.folder import deployment, require_cpu_dtype
from teamlora_export.deploy.library import add_library
from teamlora_export.deploy.render import render

# What runs a model, each file on those before it; the first six read words, the last is a program.
OPENING = ("failure.py", "device_tensor.py", "adapter_slots.py", "cores.py", "session.py", "words.py")
ROWS = ("slots_base.py", "slots_in_place.py", "slots_on_device.py", "slots_growing.py", "slots.py")
SCHEDULING = ("sampling.py", *ROWS, "scheduler.py")
PROGRAM = (*OPENING, *SCHEDULING, "runner.py")
# The oldest that run what we write: ONNX Runtime 1.26 takes one overload of a function for all of them, and refuses a
# model with two forms of the op.
REQUIREMENTS = "onnxruntime>=1.27\nnumpy>=2.0\ntokenizers>=0.20\n"


def deploy_python(bundle: Bundle, out: Path, logits: str = "last", library: Path | None = None) -> Path:
    """Write the deployment into `out`.

    Args:
        logits: see `deployment`.
        library: a native library with the op, which is copied, and which the program takes then.

    Raises:
        ExportError: see `deployment` and `add_library`; or the model is in bfloat16.
    """
    require_cpu_dtype(bundle, "python")
    with deployment(bundle, out, "python", logits=logits, shelf="slots") as made:
        for name in PROGRAM:
            made.write(name, Path(__file__).parent / name)
        native = None if library is None else add_library(made, library)
        made.write("requirements.txt", REQUIREMENTS)
        made.write("README.md", render("python.README.md.j2", bundle, library=native))
    return out
