"""The types of weights and activations, by the names that the command line and manifests give them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """A floating-point type.

    Attributes:
        torch: its name in PyTorch and ml_dtypes.
        onnx: its name in ONNX, in small letters.
        roundoff: the largest relative error of a number that is rounded to it.
    """

    torch: str
    onnx: str
    roundoff: float


DTYPES = {
    "fp32": Dtype("float32", "float", 2.0**-24),
    "fp16": Dtype("float16", "float16", 2.0**-11),
    "bf16": Dtype("bfloat16", "bfloat16", 2.0**-8),
}
