"""Reads the graph of a bundle; its weights stay where they are."""

from __future__ import annotations

import onnx_ir as ir

from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError, first_line


def read_graph(bundle: Bundle) -> ir.Model:
    """The graph as it is in the file.

    Raises:
        ExportError: the file holds none.
    """
    try:
        return ir.load(bundle.model)
    except Exception as error:  # protobuf's and onnx_ir's own, of many kinds
        raise ExportError(
            f"{bundle.model}: is no graph that can be read ({first_line(error)}). Export the model again."
        ) from None
