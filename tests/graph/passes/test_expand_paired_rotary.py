"""What an engine's builder cannot do is taken apart, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import assert_unchanged, graph_of, op_types, run

from teamlora_export.graph.passes.expand_paired_rotary import ExpandPairedRotary


@pytest.mark.parametrize("turned", [0, 4])
def test_a_rotation_of_pairs_becomes_products_and_sums(turned):
    half = (turned or 8) // 2
    signature = f"(float[2, 3, 5, 8] x, float[2, 5, {half}] c, float[2, 5, {half}] s) => (float[2, 3, 5, 8] y)"
    model = graph_of(signature, f"y = RotaryEmbedding <interleaved = 1, rotary_embedding_dim = {turned}> (x, c, s)")
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.standard_normal(v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}
    before = run(model, feeds)[0]
    assert ExpandPairedRotary()(model).modified
    assert "RotaryEmbedding" not in op_types(model)
    assert model.graph.outputs[0].name == "y"
    # A kernel may add to a product before it rounds it.
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=0, atol=1e-6)


def test_a_rotation_of_halves_stays():
    signature = "(float[2, 3, 5, 8] x, float[2, 5, 4] c, float[2, 5, 4] s) => (float[2, 3, 5, 8] y)"
    assert_unchanged(graph_of(signature, "y = RotaryEmbedding (x, c, s)"), ExpandPairedRotary)
