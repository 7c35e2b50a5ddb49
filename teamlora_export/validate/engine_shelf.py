"""An engine that takes adapters, with those of a bundle's shelf in its slots, as a program that serves has them: each
slot stays where it is, an adapter is copied into one by the same code, and the index of each row is an input of a call.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from teamlora_export.bundle import Bundle
from teamlora_export.engine.facts import EngineFacts
from teamlora_export.validate.engine_runner import EngineRunner, SlotTensor
from teamlora_export.validate.shelf import open_shelf, seated

# By its bits.
_BFLOAT16_NAN = 0x7FC0


class EngineShelf:
    """The slots of an engine, bound to it once; any number of adapters come and go in them.

    Raises:
        ExportError: there is not so much memory on the GPU.
    """

    def __init__(self, bundle: Bundle, runner: EngineRunner, facts: EngineFacts) -> None:
        assert facts.slots is not None
        self._bundle, self._runner, self._slots = bundle, runner, facts.slots
        self._adapters = open_shelf(bundle, facts.slots, SlotTensor)
        self._memory: dict[str, SlotTensor] = self._adapters.memory
        # Of few adapters in many slots, an index that is too low would not show.
        self._adapters.take_last_first()
        self._swaps = 0
        runner.bind(self._memory)

    def seat_alone(self, name: str) -> None:
        """From now on every row has this adapter, which is copied anew, into another slot than the last time. No other
        slot holds a number.

        Raises:
            ExportError: the adapter's file is damaged.
        """
        for memory in self._memory.values():
            nothing = np.full(memory.shape[1:], _BFLOAT16_NAN if memory.dtype == np.uint16 else np.nan, memory.dtype)
            for slot in range(self._slots):
                memory[slot] = nothing
        held = iter(self._memory.values())
        # Of which nothing is known to be in any slot.
        self._adapters = open_shelf(self._bundle, self._slots, lambda _shape, _kind: next(held))
        if self._swaps % 2 == 0:
            self._adapters.take_last_first()
        self._swaps += 1
        self._runner.seat(seated(self._adapters, [name]))

    def seat(self, rows: Sequence[str | None]) -> None:
        """From now on, the rows of a batch have these adapters; those that are in slots already are not copied again.

        Raises:
            ExportError: an adapter's file is damaged.
        """
        self._runner.seat(seated(self._adapters, rows))
