"""Which transformers works: its models and its exporter decide every graph, so another one is refused, not tried.

`pyproject.toml` asks for the same range, and a test compares the two.
"""

from __future__ import annotations

import importlib.metadata
import re

from teamlora_export.errors import ExportError

# The suite has passed with these.
TESTED = ("5.23.0",)
# Earlier ones lack what the exporter needs here; of later ones nothing is known.
OLDEST, TOO_NEW = (5, 23), (6, 0)


def require_transformers(installed: str | None = None) -> None:
    """Refuse a transformers that is known not to work.

    Args:
        installed: its version; by default, that of the installed package.

    Raises:
        ExportError: names both versions and the command that installs the right one.
    """
    version = installed or importlib.metadata.version("transformers")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) < TOO_NEW:
        wanted = f">={OLDEST[0]}.{OLDEST[1]},<{TOO_NEW[0]}"
        raise ExportError(
            f"transformers {version} is installed, which does not work; {wanted} does (tested: {', '.join(TESTED)}). "
            f"pip install 'transformers{wanted}'"
        )
