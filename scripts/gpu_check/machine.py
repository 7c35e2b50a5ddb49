"""Where the kernels run: a GPU, or in a dry run the emulation on this CPU, with one interface."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

# Of each of the rounds whose median counts.
_ROUND_SECONDS, _ROUNDS, _MOST_REPLAYS = 0.004, 5, 200


@dataclass(frozen=True)
class Description:
    """What is written down of a machine. `capability`: without the dot; None where there is no GPU."""

    name: str
    capability: str | None
    cache_bytes: int
    memory_bytes: int
    versions: dict[str, str]


class Machine(Protocol):
    """Attributes: `device` is PyTorch's name of it."""

    device: str

    def describe(self) -> Description: ...

    def stream(self) -> int:
        """The stream that PyTorch works on now."""

    def synchronize(self) -> None:
        """Wait for all that was enqueued; an error of a kernel is raised here."""

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """What enqueues again what `run` enqueues, a graph where there is one; it has run before."""

    def seconds(self, run: Callable[[], None]) -> float:
        """Of one `run`, without what launching costs the CPU: the median of several rounds."""


class Gpu:
    """The first GPU. `torch`: the module."""

    device = "cuda"

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def describe(self) -> Description:
        facts = self._torch.cuda.get_device_properties(0)
        versions = {"torch": self._torch.__version__, "torch's CUDA": str(self._torch.version.cuda)}
        cache = getattr(facts, "L2_cache_size", 64 << 20)
        return Description(facts.name, f"{facts.major}{facts.minor}", cache, facts.total_memory, versions)

    def stream(self) -> int:
        return self._torch.cuda.current_stream().cuda_stream

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        return self._graph(run).replay

    def seconds(self, run: Callable[[], None]) -> float:
        """Of a replay of a graph that has captured `run`, between two events."""
        graph = self._graph(run)
        replays = max(1, min(_MOST_REPLAYS, round(_ROUND_SECONDS / max(self._replayed(graph, 2), 1e-7))))
        return statistics.median(self._replayed(graph, replays) for _ in range(_ROUNDS))

    def _graph(self, run: Callable[[], None]) -> Any:
        cuda = self._torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            # What is loaded or chosen at the first call is not captured.
            run()
            run()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=side):
            run()
        return graph

    def _replayed(self, graph: Any, count: int) -> float:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count


class Emulated:
    """This CPU, for a dry run: its times mean nothing."""

    device = "cpu"

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def describe(self) -> Description:
        return Description("emulation on a CPU", None, 1 << 10, 1 << 30, {"torch": self._torch.__version__})

    def stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def captured(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def seconds(self, run: Callable[[], None]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
