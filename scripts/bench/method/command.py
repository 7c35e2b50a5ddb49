"""How the benchmark's commands end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from teamlora_export.errors import ExportError, printable


def run(main: Callable[[], None], stopped: str = "Stopped.") -> None:
    """Run a command; a refusal, ours or the system's of a file, is one sentence and exit code 2, an interruption
    `stopped` and 130. Whoever reads what it prints may stop to."""
    try:
        main()
    except ExportError as error:
        _end(f"Error: {error}", 2)
    except BrokenPipeError:
        # Whoever reads has enough. What is still to be told at the end would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        _end(printable(f"Error: {error.filename}: {error.strerror or error}.", keep=""), 2)
    except KeyboardInterrupt:
        _end(stopped, 130)


def _end(told: str, code: int) -> NoReturn:
    print(told, file=sys.stderr)
    raise SystemExit(code) from None
