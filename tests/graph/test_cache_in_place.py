"""The KV cache in place: where rows are written follows from the mask, and a full cache takes no more."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from teamlora_export.bundle import CAPACITY
from teamlora_export.graph.cache import first_places, widened


@pytest.mark.parametrize(
    ("mask", "sequence", "places"),
    [
        pytest.param([[1, 1, 1], [1, 1, 1]], 3, [0, 0], id="a prompt into an empty cache"),
        pytest.param([[1, 1, 1], [0, 0, 1]], 3, [0, 0], id="padded on the left"),
        pytest.param([[1, 1, 1], [1, 0, 0]], 3, [0, 0], id="padded on the right"),
        pytest.param([[1, 1, 1, 1], [0, 1, 1, 1]], 1, [3, 3], id="one token more"),
        pytest.param([[1, 1, 1, 1, 1]], 2, [3], id="a part of a prompt"),
        pytest.param([[0, 0, 0, 0], [0, 0, 1, 1]], 2, [0, 2], id="a part that is padding alone"),
        pytest.param([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], 1, [3, 1], id="rows at places of their own"),
    ],
)
def test_a_calls_tokens_stand_before_the_last_place_that_their_mask_names(mask, sequence, places):
    assert first_places(torch.tensor(mask), sequence).tolist() == places


def test_what_is_beyond_the_mask_is_not_seen():
    assert widened(torch.ones(1, 2, dtype=torch.int64), 4).tolist() == [[1, 1, 0, 0]]


def test_past_and_present_are_one_buffer_of_any_capacity(make_bundle):
    bundle = make_bundle("llama", cache="in-place")
    ports = {port.name: port for port in (*bundle.manifest.inputs, *bundle.manifest.outputs)}
    for layer in range(4):
        for which in ("key", "value"):
            past, present = (ports[f"{end}.{layer}.{which}"] for end in ("past_key_values", "present"))
            assert past.shape == present.shape
            assert past.shape[2] == CAPACITY
    written = [node for node in ir.load(bundle.model).graph if node.op_type == "TensorScatter"]
    assert len(written) == 8
    assert len({node.inputs[2] for node in written}) == 1, "places are computed once, not once a layer"


def test_a_full_cache_takes_no_more(make_bundle):
    bundle = make_bundle("llama", cache="in-place")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(bundle.model, options)
    feeds = {
        port.name: np.zeros((1, port.shape[1], 7, port.shape[3]), np.float32)
        for port in bundle.manifest.inputs
        if port.name.startswith("past_")
    }

    def call(total: int) -> None:
        one = {"input_ids": np.ones((1, 1), np.int64), "position_ids": np.full((1, 1), total - 1)}
        session.run(None, {**feeds, **one, "attention_mask": np.ones((1, total), np.int64)})

    call(7)
    with pytest.raises(Exception, match="TensorScatter"):
        call(8)
