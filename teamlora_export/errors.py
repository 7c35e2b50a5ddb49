"""The one exception that is written for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MOST_FINDINGS = 20


class ExportError(Exception):
    """Wrong input or environment: the message says what, where, and what to do. The command line exits with 2."""


def raise_findings(subject: str, findings: Sequence[str]) -> None:
    """Raise one `ExportError` that lists every finding about `subject`; do nothing when there are none."""
    if not findings:
        return
    shown = [f"  - {finding}" for finding in findings[:_MOST_FINDINGS]]
    if len(findings) > _MOST_FINDINGS:
        shown.append(f"  ... and {len(findings) - _MOST_FINDINGS} more")
    count = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
    raise ExportError("\n".join([f"{subject}: {count}", *shown]))


def first_line(error: BaseException) -> str:
    """What a library's exception says, its first cause where it names one; short enough for a message of ours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
