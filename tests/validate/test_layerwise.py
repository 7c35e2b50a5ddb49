"""Layer by layer, a model needs the memory of one layer, and gives what the whole gives."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from teamlora_export.bundle import Bundle
from teamlora_export.validate import layerwise
from teamlora_export.validate.cases import Case, first_step
from teamlora_export.validate.onnx_runner import OnnxRunner


def test_no_session_holds_the_weights_of_two_layers(make_bundle, monkeypatch):
    bundle = make_bundle("llama")
    opened = []

    def open_and_look(model: ir.Model, bundle: Bundle, *options: object):  # type: ignore[no-untyped-def]
        matches = (re.match(r"model\.layers\.(\d+)\.", name) for name in model.graph.initializers)
        opened.append(sorted({int(match[1]) for match in matches if match}))
        return original(model, bundle, *options)

    original = layerwise.open_model
    monkeypatch.setattr(layerwise, "open_model", open_and_look)
    case = Case("two prompts", np.arange(1, 13).reshape(2, 6), np.array([[0, 0, 1, 1, 1, 1], [1] * 6]))
    feeds = first_step(bundle.manifest.inputs, case).feeds
    found = layerwise.LayerwiseOnnxRunner(bundle, ()).run(feeds)
    assert [layers for layers in opened if layers] == [[0], [1], [2], [3]]
    for name, expected in OnnxRunner(bundle, ()).run(feeds).items():
        # The same operations, in sessions that may fuse them otherwise.
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
