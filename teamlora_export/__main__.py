"""Where the command starts: it listens to interruptions before it imports anything slow."""

from __future__ import annotations

import os

from teamlora_export import interrupt


def main() -> None:
    """Run the command line."""
    with interrupt.reported():
        _wait_asleep()
        from teamlora_export import cli

        cli.main()


def _wait_asleep() -> None:
    """Have PyTorch's threads wait for each other asleep, unless the user says how. Left to themselves they spin, and
    where another process is busy they keep the processor from those that they wait for."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


if __name__ == "__main__":
    main()
