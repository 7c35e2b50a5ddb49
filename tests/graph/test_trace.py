"""What is traced has the names that it is to have, or is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import random_adapter

from teamlora_export.errors import ExportError
from teamlora_export.graph import tasks
from teamlora_export.graph.build import build_graph
from teamlora_export.progress import Reporter


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("_PAST_INPUT", r"traces inputs named .*past_key_values\.layers\.0\.key"),
        ("_PRESENT_OUTPUT", "traces outputs named "),
    ],
)
def test_a_field_that_transformers_renamed_is_an_error_that_names_both(field, message, make_base, monkeypatch):
    base = make_base("llama")
    adapter = random_adapter(base, ("q_proj",))
    # As if transformers called the cache's tensors otherwise than this tool expects.
    monkeypatch.setattr(tasks, field, tasks.re.compile("^nothing$"))
    with pytest.raises(ExportError, match=rf"transformers .* \(tested: .*\) {message}.* is expected"):
        build_graph(base, adapter, torch.float32, Reporter(quiet=True))
