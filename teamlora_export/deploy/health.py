"""Whether a model can be run at all, which is asked when something has failed.

Whether a request fails alone is found out by the least that a text asks of the model: where even that fails, as on a
GPU after an illegal access, everything does. But a shortage of memory may pass.
"""

from __future__ import annotations

import errno
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.answers import Broken
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.slots import Slots
else:
    # Deployed: the files lie beside one another.
    from answers import Broken
    from failure import ModelError, brief
    from slots import Slots

# What ONNX Runtime, CUDA's libraries and TensorRT say where there is no memory. Not that word: an illegal access is one
# to it. Nor "alloc": functions and files that are named so meet every error.
_NO_MEMORY = re.compile(
    r"out[ _]?of[ _]?memory|memory ?allocation|cannot allocate memory|failed to allocate|not be allocated"
    r"|smaller than requested|alloc(ation)?_failed|bad[ _]alloc",
    re.IGNORECASE,
)


class Health:
    """Of a model whose calls are made by one thread; any other may look.

    Attributes:
        broken: why the model cannot be run any more, in this process; empty: it can.
    """

    def __init__(self, model: Slots) -> None:
        self.broken = ""
        self._model = model
        self._logs = False

    def require_runs(self) -> None:
        """Before requests are taken by a server, whose log is told from now on what is the matter.

        Raises:
            ModelError: the model cannot be run.
        """
        try:
            self._model.try_out(0)
        except Exception as error:
            raise ModelError(f"{self._model.runtime} cannot run the model ({brief(error)}).") from None
        self._logs = True

    def check(self, row: int, failure: Exception) -> None:
        """After a failure, by a row that is free, or whose text ends of it.

        Raises:
            Broken: the model cannot be run any more.
        """
        try:
            self._model.try_out(row)
        except Exception as error:
            if not _is_short_of_memory(error):
                self.lose(error, failure)
                raise Broken(self.broken) from failure

    def lose(self, error: Exception, failure: Exception) -> None:
        """What is told from now on is not the words of one request's failure, which only the log has."""
        if self.broken:
            return
        self.broken = f"The model cannot be run any more ({brief(error)}). Start its process again."
        if self._logs:
            print(f"{self.broken} What failed first: {brief(failure)}", file=sys.stderr, flush=True)


def _is_short_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return _NO_MEMORY.search(str(error)) is not None
