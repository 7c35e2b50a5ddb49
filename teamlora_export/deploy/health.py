"""Whether a model can be run at all, which is asked when something has failed, and how long it may take.

Whether a request fails alone is found out by the least that a text asks of the model, in a row of nobody's: where even
that fails, as on a GPU after an illegal access, everything does. But a shortage of memory may pass. And a call may not
come back at all, which other threads see by the clock.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.answers import Broken, Failed, Late
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.slots import Slots
else:
    # Deployed: the files lie beside one another.
    from answers import Broken, Failed, Late
    from failure import ModelError, brief
    from slots import Slots

# Seconds in which others may give back the memory that the model lacks.
SHORTAGE = 30.0
# Seconds after which a turn hangs: more than the longest one of a server takes.
HANGS = 300.0
# What ONNX Runtime, CUDA's libraries and TensorRT say where there is no memory. Not that word: an illegal access is one
# to it. Nor "alloc": functions and files that are named so meet every error.
_NO_MEMORY = re.compile(
    r"out ?of ?memory|failed to allocate|not be allocated|smaller than requested|alloc_failed|bad_alloc", re.IGNORECASE
)


class Health:
    """Of a model whose calls are made by one thread, in turns; any other may look.

    Args:
        clock: in seconds.
    """

    def __init__(self, model: Slots, clock: Callable[[], float]) -> None:
        self._model, self._clock = model, clock
        self._broken = ""
        self._is_served = False
        # When the turn at work began, and when the model was first found to have no memory for that.
        self._began: float | None = None
        self._short_since: float | None = None

    @property
    def broken(self) -> str:
        """Why the model cannot be run any more, in this process; empty: it can. One that hangs may still come back."""
        if self.hangs and not self._broken:
            return f"The model has not come back from a call for {HANGS:.0f} seconds. Start its process again."
        return self._broken

    @property
    def hangs(self) -> bool:
        began = self._began
        return began is not None and self._clock() - began > HANGS

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._began = self._clock()
        try:
            yield
        finally:
            self._began = None

    def overdue(self, deadline: float) -> Failed | None:
        """Why an answer is not to be waited for any longer; None: it is."""
        if broken := self.broken:
            return Broken(broken)
        return Late("The request took longer than its time limit.") if self._clock() > deadline else None

    def require(self) -> None:
        """Before requests are taken by a server, whose log is told from now on what is the matter.

        Raises:
            ModelError: the model cannot be run.
        """
        try:
            self._model.try_out(0)
        except Exception as error:
            raise ModelError(f"{self._model.runtime} cannot run the model ({brief(error)}).") from None
        self._is_served = True

    def answered(self) -> None:
        """A call has come back with what was asked for."""
        self._short_since = None

    def check(self, row: int, failure: Exception) -> None:
        """After a failure, by a row that is free, or whose text ends of it.

        Raises:
            Broken: the model cannot be run any more.
        """
        try:
            self._model.try_out(row)
        except Exception as error:
            now = self._clock()
            self._short_since = now if self._short_since is None else self._short_since
            is_short = isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))
            if not is_short or now - self._short_since > SHORTAGE:
                raise self.lose(error, failure) from failure
        else:
            self.answered()

    def lose(self, error: Exception, failure: Exception) -> Broken:
        """What everybody is told from now on: not the words of one request's failure, which only the log has."""
        self._broken = f"The model cannot be run any more ({brief(error)}). Start its process again."
        if self._is_served:
            print(f"{self._broken} What failed first: {brief(failure)}", file=sys.stderr, flush=True)
        return Broken(self._broken)
