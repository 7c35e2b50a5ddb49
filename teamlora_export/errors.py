"""The one exception that is written for people, and how text from outside may appear in front of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MOST_FINDINGS = 20
_LONGEST_FINDING = 400
# Bytes: what a person still reads, and a log still keeps.
LONGEST_MESSAGE = 3500


class ExportError(Exception):
    """Wrong input or environment: the message says what, where, and what to do. The command line exits with 2.

    Lines after the first are indented; a line break without an indent came from outside, and is shown as one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(re.sub(r"\n(?!  )", r"\\n", message)))


def raise_findings(subject: str, findings: Sequence[str]) -> None:
    """Raise one `ExportError` that lists every finding about `subject`; do nothing when there are none."""
    if not findings:
        return
    shown: list[str] = []
    left = LONGEST_MESSAGE - 700
    for finding in findings[:_MOST_FINDINGS]:
        line = f"  - {printable(finding, _LONGEST_FINDING, keep='')}"
        left -= len(line.encode())
        if left < 0 and shown:
            break
        shown.append(line)
    if len(findings) > len(shown):
        shown.append(f"  ... and {len(findings) - len(shown)} more")
    count = "1 problem" if len(findings) == 1 else f"{len(findings)} problems"
    raise ExportError("\n".join([f"{printable(subject, 600)}: {count}", *shown]))


def printable(text: object, longest: int | None = LONGEST_MESSAGE, keep: str = "\n") -> str:
    """`text` as any terminal may show it: no control characters, no bytes that are no text, no more than one reads.

    Args:
        longest: bytes in UTF-8; what is longer loses its middle. None: all of it.
        keep: control characters that stay.
    """
    cleaned = "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in str(text)
    )
    data = cleaned.encode()
    if longest is None or len(data) <= longest:
        return cleaned
    # The end of a message says what to do.
    tail = longest // 3
    head = longest - tail - len(f" ... ({len(data):,} bytes left out) ... ")
    left_out = len(data) - head - tail
    return f"{data[:head].decode(errors='ignore')} ... ({left_out:,} bytes left out) ... " + data[-tail:].decode(
        errors="ignore"
    )


def first_line(error: BaseException) -> str:
    """What a library's exception says, its first cause where it names one; short enough for a message of ours."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
