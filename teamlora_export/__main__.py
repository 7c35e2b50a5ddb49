"""Where the command starts: it listens to interruptions before it imports anything slow."""

from __future__ import annotations

from teamlora_export import interrupt


def main() -> None:
    """Run the command line."""
    with interrupt.reported():
        from teamlora_export import cli

        cli.main()


if __name__ == "__main__":
    main()
