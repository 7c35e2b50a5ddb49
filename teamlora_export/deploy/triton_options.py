"""What a user can choose of a Triton repository, said once: `deploy triton` and `deploy kubernetes` take the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TritonOptions:
    """What a user can choose.

    Attributes:
        name: of the model; None: `default_name`.
        engine, plugin: see `deploy_cpp`. Where texts are not batched continuously, the engine must be TensorRT's, not
            TensorRT-RTX's.
        library: a native library with the op, as the server will find it. gpu: run the graph on a GPU.
        text: add the models that take words, where the bundle has a tokenizer. check_files: they compare hashes first.
        instances: copies of the model. batch: requests that run together at most; None: 8 for text generation, 32
            elsewhere, or what the engine takes. sequences: texts at work at most.
        logits: see `deployment`; an engine gives what it was built with.
        capacity: see `choose_capacity`; no text is longer. Where texts are batched continuously, None is all that the
            model takes.
        batching: of a text generator: "continuous", one model that takes words, writes `batch` texts at a time, and
            lets others wait until there are `sequences`; or "sequence", a step of the model with its cache as Triton's
            state, and a model that takes words around it. None: continuous, with a cache in place, a shelf, or a model
            that takes no padding; a cache that grows is copied whenever the texts that share a step change, and an
            engine's is not batched so.
        threads: of ONNX Runtime on a CPU, for each instance; 0: every core that the machine has.
    """

    name: str | None = None
    engine: str | None = None
    plugin: Path | None = None
    library: str | None = None
    gpu: bool = False
    text: bool = True
    check_files: bool = True
    instances: int = 1
    batch: int | None = None
    sequences: int = 64
    logits: str = "last"
    capacity: int | None = None
    batching: str | None = None
    threads: int = 0


DEFAULTS = TritonOptions()
