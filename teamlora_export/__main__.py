"""Where the command starts: it listens to interruptions before it imports anything slow."""

from __future__ import annotations

import os

from teamlora_export import interrupt


def main() -> None:
    """Run the command line."""
    with interrupt.reported():
        _wait_briefly()
        from teamlora_export import cli

        cli.main()


def _wait_briefly() -> None:
    """Have PyTorch's threads spin for some tens of microseconds while they wait for each other, and sleep then, unless
    the user says how they wait. Left to themselves they spin 300 times as long, and where another process is busy they
    keep the processor from those that they wait for (`scripts/bench/spinning.py`)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


if __name__ == "__main__":
    main()
