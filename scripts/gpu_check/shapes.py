"""The projections that figures are given for: real models' widths, as their configurations have them."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_check.kernels import Sizes

TOKENS = (1, 8, 32, 256, 2048)


@dataclass(frozen=True)
class Projection:
    """Siblings that read the same x, with their adapters. `rank` counts all experts."""

    model: str
    name: str
    inputs: int
    outs: tuple[int, ...]
    rank: int
    experts: int = 4

    def __str__(self) -> str:
        return f"{self.model} {self.name}"

    def sizes(self, dtype: str, tokens: int) -> Sizes:
        return Sizes(dtype, tokens, self.inputs, self.experts, self.rank // self.experts, self.outs)


SMOLLM2 = (
    Projection("SmolLM2-135M", "q/k/v", 576, (576, 192, 192), 32),
    Projection("SmolLM2-135M", "o", 576, (576,), 32),
    Projection("SmolLM2-135M", "gate/up", 576, (1536, 1536), 32),
    Projection("SmolLM2-135M", "down", 1536, (576,), 32),
)
LLAMA_3_8B = (
    Projection("Llama-3-8B", "q/k/v", 4096, (4096, 1024, 1024), 32),
    Projection("Llama-3-8B", "o", 4096, (4096,), 32),
    Projection("Llama-3-8B", "gate/up", 4096, (14336, 14336), 32),
    Projection("Llama-3-8B", "down", 14336, (4096,), 32),
)
# The paper's headline.
LLAMA_2_7B = (
    Projection("LLaMA-2-7B", "gate/up", 4096, (11008, 11008), 128),
    Projection("LLaMA-2-7B", "down", 11008, (4096,), 128),
)
PROJECTIONS = (*SMOLLM2, *LLAMA_3_8B, *LLAMA_2_7B)
