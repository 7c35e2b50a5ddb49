"""How the benchmark's commands end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from teamlora_export.errors import ExportError


def run(main: Callable[[], None], stopped: str = "Stopped.") -> None:
    """Run a command without network; a refusal is one sentence and exit code 2, an interruption `stopped` and 130."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        main()
    except ExportError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        raise SystemExit(130) from None
