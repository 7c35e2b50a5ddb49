"""onnxruntime-genai's own engine, for many clients at once.

Its continuous batching needs a graph with paged attention, which runs on a GPU. On a CPU it batches statically: those
that wait make the next batch, which begins when the one before it is done.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class GenaiEngine:
    """A graph with `genai_config.json` in a folder, in a thread of its own, for as long as a block.

    Args:
        batch: requests at a time, at most.
        threads: of ONNX Runtime; 0: every core.
    """

    def __init__(self, folder: Path, batch: int, threads: int) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._config = og.Config(str(folder))
        options: dict[str, Any] = {"engine": {"static_batching": {"max_batch_size": batch}}}
        if threads:
            options["model"] = {"decoder": {"session_options": {"intra_op_num_threads": threads}}}
        self._config.overlay(json.dumps(options))
        self._opened: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[tuple[list[int], int, queue.SimpleQueue[int | None]] | None]
        self._asked = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> GenaiEngine:
        self._thread.start()
        if (failure := self._opened.get()) is not None:
            raise failure
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.put(None)
        self._thread.join()

    def ask(self, prompt: list[int], count: int) -> Iterator[int]:
        tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._asked.put((prompt, count, tokens))
        return iter(tokens.get, None)

    def _run(self) -> None:
        """All that touches the engine, which belongs to the thread that made it."""
        try:
            engine = self._og.Engine(self._og.Model(self._config))
            buffer, flags = engine.create_event_buffer(64), self._og.EngineEventFlags
        except Exception as error:
            self._opened.put(error)
            return
        self._opened.put(None)
        answering: dict[Any, queue.SimpleQueue[int | None]] = {}
        while True:
            while not self._asked.empty() or not answering:
                if (asked := self._asked.get()) is None:
                    return
                prompt, count, tokens = asked
                request = engine.create_request()
                options = self._og.TurnOptions(request)
                options.set_max_generated_tokens(count)
                options.set_min_generated_tokens(count)
                options.set_do_sample(False)
                request.begin_turn(np.array(prompt, np.int32), options)
                answering[request] = tokens
            for event in engine.run(buffer):
                tokens = answering[event.request]
                if event.flags & flags.TOKEN:
                    tokens.put(event.token)
                if event.flags & (flags.TURN_FINISHED | flags.FAILED):
                    tokens.put(None)
                    answering.pop(event.request)
                    event.request.close()
