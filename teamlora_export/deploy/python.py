"""`deploy python`: the model with one file of Python that runs it on onnxruntime and numpy.

Three more batch continuously, where the cache is in place.
"""

from __future__ import annotations

from pathlib import Path

from teamlora_export.bundle import Bundle, keeps_in_place
from teamlora_export.deploy.folder import deployment, require_cpu_dtype
from teamlora_export.deploy.library import add_library
from teamlora_export.deploy.render import render

RUNNER_NAME = "runner.py"
SCHEDULER_NAMES = ("slots.py", "sampling.py", "scheduler.py")
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
    with deployment(bundle, out, "python", logits=logits) as made:
        continuous = keeps_in_place(bundle.manifest.inputs)
        for name in (RUNNER_NAME, *(SCHEDULER_NAMES if continuous else ())):
            made.write(name, Path(__file__).parent / name)
        native = None if library is None else add_library(made, library)
        made.write("requirements.txt", REQUIREMENTS)
        made.write("README.md", render("python.README.md.j2", bundle, library=native, continuous=continuous))
    return out
