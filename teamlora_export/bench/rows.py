"""The ways to run a model that are measured side by side.

A row says what it is, and opens the model where it is asked to: in the process of the turns, and in one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from teamlora_export.bench.turns import Reader
from teamlora_export.deploy.cores import usable_cores
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError, first_line


class Row(Protocol):
    """A way to run a model, which another process can be sent.

    Attributes:
        libraries: modules that are imported before the time of opening counts.
    """

    @property
    def name(self) -> str: ...

    @property
    def libraries(self) -> tuple[str, ...]: ...

    def open(self) -> Reader:
        """Load the model.

        Raises:
            ExportError: it cannot be loaded; or later, by what is returned: it cannot run.
        """


@dataclass(frozen=True)
class GraphRow:
    """A graph in ONNX Runtime, as the deployed Python program runs it.

    Attributes:
        folder: with the graph, and the manifest of its bundle.
        library: a native library that runs the op in place of its body.
        threads: 0: one for each core that may be used.
        adapters: of a shelf, those of a batch's rows, over and over; None: the base alone. Nothing: it has no shelf.
    """

    name: str
    folder: Path
    library: Path | None = None
    threads: int = 0
    adapters: tuple[str | None, ...] = ()
    libraries: tuple[str, ...] = ("onnxruntime", "teamlora_export.deploy.runner")

    def open(self) -> Reader:
        from teamlora_export.deploy.answers import Failed
        from teamlora_export.deploy.failure import ModelError
        from teamlora_export.deploy.runner import Model

        def read(prompts: Sequence[Sequence[int]], count: int) -> Callable[[], object]:
            chosen = [self.adapters[row % len(self.adapters)] for row in range(len(prompts))] if self.adapters else None
            with told():
                if not model.generates:
                    model.encode(prompts, chosen)
                    return _nothing
                # None of the tokens that are timed is a text's last, after which its row is cleared.
                scheduler, answers = model.ask(prompts, count + 2, stops=(), adapters=chosen)

            def step() -> object:
                with told():
                    scheduler.turn()
                    return [list(answer.arrived()) for answer in answers]

            step()
            return step

        @contextmanager
        def told() -> Iterator[None]:
            try:
                yield
            except (ModelError, Failed) as error:
                raise ExportError(f"{self.name}: {error}") from None

        with told():
            model = Model(self.folder, self.library, check=False, threads=self.threads)
        return read


@dataclass(frozen=True)
class TorchRow:
    """The adapted model in PyTorch, with the layer as its authors publish it.

    Attributes:
        base, adapter: folders, of a base for `task`.
        dtype: "fp32" or "fp16".
        threads: 0: one for each core that may be used, as a graph has. PyTorch takes as many as OpenMP's variables say.
        compiled: by `torch.compile`, in place of eager mode.
    """

    name: str
    base: str
    adapter: str
    task: str
    dtype: str
    threads: int = 0
    compiled: bool = False
    libraries: tuple[str, ...] = ("torch", "teamlora_export.model.base", "teamlora_export.model.inject")

    def open(self) -> Reader:
        import torch

        from teamlora_export.adapter import align_with_base, read_adapter
        from teamlora_export.model.base import open_base
        from teamlora_export.model.inject import inject

        torch.set_num_threads(self.threads or usable_cores())
        base = open_base(self.base, self.task)
        model = base.load(getattr(torch, DTYPES[self.dtype].torch))
        inject(model, align_with_base(read_adapter(self.adapter), base.signature))
        model.eval()
        forward = torch.compile(model, dynamic=True) if self.compiled else model
        run = generate_in_torch if self.task == "text-generation" else _encode_in_torch

        def read(prompts: Sequence[Sequence[int]], _count: int) -> Callable[[], object]:
            with told():
                once_more = run(forward, prompts)

            def step() -> object:
                with told():
                    return once_more()

            return step

        @contextmanager
        def told() -> Iterator[None]:
            try:
                yield
            except MemoryError:
                raise
            except Exception as error:  # of many kinds: the code is transformers', the compiler PyTorch's
                raise ExportError(f"{self.name}: it cannot be run ({first_line(error)}).") from error

        return read


def generate_in_torch(forward: Any, prompts: Sequence[Sequence[int]]) -> Callable[[], object]:
    """Read the prompts, all of one length; what is returned makes one more token of each."""
    import torch
    from transformers import DynamicCache

    ids, cache = torch.tensor(prompts), DynamicCache()

    @torch.no_grad()
    def step() -> object:
        nonlocal ids
        ids = forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        return ids

    step()
    return step


def _encode_in_torch(forward: Any, prompts: Sequence[Sequence[int]]) -> Callable[[], object]:
    import torch

    with torch.no_grad():
        forward(torch.tensor(prompts))
    return _nothing


def _nothing() -> None:
    """An encoder makes no tokens."""
