"""Regular expressions of an adapter: Python's own answer, in time."""

from __future__ import annotations

import re
import time

import pytest

from teamlora_export.adapter.config import AdapterConfig
from teamlora_export.adapter.patterns import PatternMatcher, why_no_pattern
from teamlora_export.errors import ExportError

PATTERNS = (
    r"layers\.\d+\.[qv]_proj",
    r".*\.(q|v)_proj",
    r"model\.layers\.(?:0|1)\..*",
    r"^model.*k_proj$",
    r"(?i)MODEL.*",
    r".*\bself_attn\b.*",
    r"[^.]+(\.[^.]+)*",
    r"model\.layers\.[0-3]\.(self_attn|mlp)\.(?!down)\w+_proj",
    r"[^{]+|[]{}]\{[\]{]",
    r"a{2,3}|.*[0-9]{1,}.*",
    # They match a part of a path, which is no match.
    r"model\.layers\.0",
    r"q_proj",
)
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "layers.3.q_proj", "lm_head", "aa", "")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_python_says(pattern):
    assert why_no_pattern(pattern) is None
    for path in PATHS:
        assert PatternMatcher().fullmatch(pattern, path) == (re.fullmatch(pattern, path) is not None)


@pytest.mark.parametrize(
    "text",
    ["(", "(?:foo){e<=1}", r"\[(?:foo){e<=1}]", r"[a]{e}", "[[a]b]", "(" * 5000, "a" * 70_000, r"\p{L}", "(?P<a>"],
)
def test_what_python_does_not_read_or_reads_in_another_way_is_refused(text):
    assert why_no_pattern(text)


def test_a_pattern_that_never_ends_is_given_up_in_time():
    path = "model.layers.0.self_attn." + "a" * 60
    catastrophic = r"(\w|\w\w|[a.]+)+0"
    config = AdapterConfig(8, 16.0, 4, catastrophic)
    # Of the processor, however busy it is; and of all matches together.
    started = time.thread_time()
    for _ in range(3):
        with pytest.raises(ExportError, match="takes too long"):
            config.targets(path)
    assert time.thread_time() - started < 6
