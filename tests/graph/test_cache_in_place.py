"""The KV cache in place: where rows are written follows from the mask, a full cache takes no more, and layers with a
window keep that alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from teamlora_export.bundle import Bundle
from teamlora_export.graph.cache import first_places, places_in_ring, widened
from teamlora_export.ports import CAPACITY, window_of


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


@pytest.mark.parametrize("rows", [1, 2, 5, 30])
def test_each_row_of_a_ring_holds_the_latest_token_that_was_written_there(rows):
    held = torch.full((rows,), -1)
    for place in range(12):
        held[place % rows] = place
        found = places_in_ring(torch.tensor([place, place + rows]), rows)
        assert torch.equal(found[0].clamp(min=-1), held)
        assert torch.equal(found[1], found[0] + rows)


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
    assert {node.attributes["mode"].as_string() for node in written} == {"linear"}


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("mistral", [6] * 4),
        ("gemma2", [6, None] * 2),
        ("gemma3", [6, 6, 6, None, 6, 6, None]),
        ("unapplied window", [None] * 4),
    ],
)
def test_layers_that_see_a_window_have_rings(name, windows, make_bundle):
    """And those alone whose mask keeps to the window that the configuration names."""
    graph = ir.load(make_bundle(name, cache="in-place").model).graph
    axes = {value.name: value.shape[2].value for value in (*graph.inputs, *graph.outputs) if len(value.shape) == 4}
    made = {node.outputs[0].name: node for node in graph if node.op_type == "TensorScatter"}
    for layer, window in enumerate(windows):
        for which in ("key", "value"):
            present = f"present.{layer}.{which}"
            assert (
                axes[present]
                == axes[f"past_key_values.{layer}.{which}"]
                == (f"window_{window}" if window else CAPACITY)
            )
            assert made[present].attributes["mode"].as_string() == ("circular" if window else "linear")
    masks = [node.inputs[3] for node in graph if node.op_type == "Attention"]
    assert len(masks) == len(windows)
    assert len(set(masks)) == len(set(windows)), "a mask for each kind of layer, not for each layer"


class Decoder:
    """A bundle with its cache in buffers that are kept from call to call, or the growing one of a single row."""

    def __init__(self, bundle: Bundle, batch: int, part: int = 0, capacity: int = 0, spare: int = 0) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(bundle.model, options, providers=["CPUExecutionProvider"])
        self.cache = {}
        for port in bundle.manifest.inputs:
            if port.name.startswith("past_"):
                window = window_of(port.shape[2])
                rows = window - 1 + part + spare if window and part else capacity
                # Not zeros: what was never written is not seen either.
                self.cache[port.name] = np.full((batch, port.shape[1], rows, port.shape[3]), 100.0, np.float32)

    def __call__(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [batch, tokens, vocabulary] of ids [batch, tokens]."""
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *presents = self.session.run(None, {**feeds, **self.cache})
        self.cache = dict(zip(self.cache, presents, strict=True))
        return logits


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("part", [1, 4, 7])
def test_rings_of_the_least_size_give_what_a_growing_cache_gives(name, part, make_bundle, rng):
    """Rows of 60 tokens, ten windows, in calls of `part`; the second row stands three places ahead of the first."""
    length, ahead, total = 60, 3, 63
    ids = rng.integers(3, 384, (2, total))
    growing, in_place = make_bundle(name), make_bundle(name, cache="in-place")

    def alone(row: int, count: int) -> np.ndarray:
        positions = np.arange(count)[None]
        return Decoder(growing, 1)(ids[row : row + 1, :count], np.ones((1, count), np.int64), positions)[0]

    expected = [alone(0, length), alone(1, total)]

    def worst(decoder: Decoder) -> float:
        read = np.array([0, ahead])
        first = np.tile(ids[1:, :ahead], (2, 1))
        # The first row's tokens of this call are overwritten by its own later.
        decoder(first, np.ones((2, ahead), np.int64), np.tile(np.arange(ahead), (2, 1)))
        errors = []
        while read[0] < length:
            count = min(part, length - read[0])
            columns = read[:, None] + np.arange(count)
            mask = (np.arange(read[1] + count) < read[:, None] + count).astype(np.int64)
            logits = decoder(np.take_along_axis(ids, columns, axis=1), mask, columns)
            errors += [abs(logits[row] - expected[row][columns[row]]).max() for row in (0, 1)]
            read = read + count
        return float(max(errors))

    scale = abs(expected[0]).max()
    least = max(part, ahead)
    assert worst(Decoder(in_place, 2, least, capacity=total)) < 1e-5 * scale
    assert worst(Decoder(in_place, 2, capacity=total)) < 1e-5 * scale, "a ring that is as long as the text"
    if part >= ahead:
        assert worst(Decoder(in_place, 2, least, capacity=total, spare=-1)) > 1e-3 * scale, "one row less is too few"


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
