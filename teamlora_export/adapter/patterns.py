"""Regular expressions out of an adapter's configuration, matched by Python's rules and within a limit of time.

A pattern such as `((\\w+)+\\.?)+!` takes `re` longer than anybody waits. The `regex` package knows the same language
and stops in time; what it would read in another way than `re` does (fuzzy braces, nested sets) is refused.
"""

from __future__ import annotations

import re
import time
import warnings

import regex

from teamlora_export.errors import ExportError

# A rank of its own for each of 1,000 modules takes some 1.5 seconds.
_SECONDS = 4.0
_LONGEST = 1 << 16
# In `re` a brace that is no repetition is a letter; in `regex` it may allow errors in a match.
_ODD_BRACE = re.compile(r"\{(?!\d*,?\d*\})")
# Where a brace is a letter to both: behind a backslash, and in a set.
_LETTERS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
# A group that no pattern has by accident.
_NUMBER = "number_of_the_layer"


def why_no_pattern(text: str) -> str | None:
    """What keeps `text` from being a regular expression that is read here, or None."""
    if len(text) > _LONGEST:
        return f"it has {len(text):,} characters, expected {_LONGEST:,} at most"
    if _ODD_BRACE.search(_LETTERS.sub("x", text)):
        return "it has a brace that is no repetition"
    try:
        with warnings.catch_warnings():
            # `re` warns of sets that may come to mean something else, and `regex` takes them for that already.
            warnings.simplefilter("error")
            re.compile(text)
        regex.compile(text)
    except (re.error, regex.error, Warning, RecursionError, OverflowError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


class PatternMatcher:
    """Matches the patterns of one configuration; all their time together is limited."""

    def __init__(self) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._left = _SECONDS

    def fullmatch(self, pattern: str, text: str) -> bool:
        """As `re.fullmatch` would say.

        Raises:
            ExportError: the patterns take too long.
        """
        return self._match(pattern, pattern, text) is not None

    def layer_of(self, pattern: str, path: str) -> str | None:
        """The number behind the last part of a module's path that `pattern` matches, in digits; None without one.

        Raises:
            ExportError: as `fullmatch`.
        """
        match = self._match(rf"(?:.*\.)?(?:{pattern})\.(?P<{_NUMBER}>\d+)\..*", pattern, path)
        return None if match is None else match[_NUMBER]

    def _match(self, whole: str, pattern: str, text: str) -> regex.Match[str] | None:
        """
        Args:
            whole: what is matched. pattern: the configuration's own part of it.
        """
        if whole not in self._compiled:
            self._compiled[whole] = regex.compile(whole)
        started = time.thread_time()
        try:
            return self._compiled[whole].fullmatch(text, timeout=max(self._left, 0.001))
        except TimeoutError:
            raise ExportError(
                f"The pattern {pattern!r:.200} takes too long to match {text!r:.200}. "
                "Write it without repetitions of repetitions, or list the modules."
            ) from None
        finally:
            self._left -= time.thread_time() - started
