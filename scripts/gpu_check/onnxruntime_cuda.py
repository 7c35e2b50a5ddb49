"""`python -m gpu_check.onnxruntime_cuda BUNDLE [CAPABILITY]`: a prompt in ONNX Runtime's CUDA provider, by the op's
kernels and by its body, which must agree."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gpu_check.engines import LEFT_OUT
from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.engine.onnxruntime_library import build_cuda_library, find_include
from teamlora_export.ports import BATCH, is_capacity

_CAPACITY, _TOKENS, _VOCABULARY = 64, 40, 4096
_CUDA = "CUDAExecutionProvider"
_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
# Of logits in float16: the body rounds the experts' sum before it is added, the kernels do not.
_TOLERANCE = 0.02


def main(
    folder: Path, library: Path | None = None, provider: str = _CUDA, architectures: Sequence[str] | None = None
) -> None:
    """Prints one line; ends with 1 where the two differ. `architectures`: as `build_cuda_library` takes them."""
    if provider not in ort.get_available_providers():
        print(f"{LEFT_OUT}this onnxruntime has no {provider}")
        return
    if library is None and find_include() is None:
        print(f"{LEFT_OUT}no headers of ONNX Runtime; set ONNXRUNTIME_INCLUDE_DIR")
        return
    bundle = read_bundle(folder)
    by_kernels = _logits(bundle, provider, library or build_cuda_library(architectures).path)
    by_body = _logits(bundle, provider, None)
    worst = float(np.abs(by_kernels - by_body).max() / np.abs(by_body).max())
    # Written so that NaN fails.
    if not worst <= _TOLERANCE:
        sys.exit(f"kernels and body differ by {worst:.4f} of the largest logit")
    print(f"kernels and body agree to {worst:.5f} of the largest logit")


def _logits(bundle: Bundle, provider: str, library: Path | None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(bundle.model, options, providers=[provider, "CPUExecutionProvider"])
    return session.run(["logits"], _feeds(session))[0].astype(np.float64)


def _feeds(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """A prompt in an empty cache in place."""
    feeds = {}
    for value in session.get_inputs():
        sizes = [
            size if isinstance(size, int) else 1 if size == BATCH else _CAPACITY if is_capacity(size) else _TOKENS
            for size in value.shape
        ]
        feeds[value.name] = np.zeros(sizes, _TYPES[value.type])
    feeds["input_ids"] = np.random.default_rng(0).integers(3, _VOCABULARY, (1, _TOKENS))
    feeds["attention_mask"] = np.ones((1, _TOKENS), np.int64)
    if "position_ids" in feeds:
        feeds["position_ids"] = np.arange(_TOKENS)[None]
    return feeds


if __name__ == "__main__":
    main(Path(sys.argv[1]), architectures=sys.argv[2:] or None)
