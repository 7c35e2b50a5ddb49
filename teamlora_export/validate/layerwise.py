"""Runs a bundle's model one layer at a time, each in a session of its own, so that only one layer is in memory.

The graph is cut at the residual stream, at the values that the tracer marked as entering and leaving the layers.
Everything before the first cut that layers share (masks, rotary tables) depends on the graph's inputs alone, and each
piece computes it again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.validate.cases import Feeds
from teamlora_export.validate.onnx_runner import OnnxRunner, SlotFill, open_model, run_session


@dataclass(frozen=True)
class _Piece:
    """A part of the graph: what it is entered through (None for the first), and what it gives."""

    entry: str | None
    outputs: tuple[str, ...]


class LayerwiseOnnxRunner(OnnxRunner):
    """`OnnxRunner` in the memory of one layer."""

    def __init__(
        self, bundle: Bundle, adapted: Collection[str], library: Path | None = None, fill: SlotFill | None = None
    ) -> None:
        super().__init__(bundle, adapted, library, fill=fill)
        typed = self._fresh()
        common.ShapeInferencePass()(typed)
        self._proto = ir.to_proto(typed)
        self._producers = {name: node for node in self._proto.graph.node for name in node.output}
        self._types = {info.name: info for info in self._proto.graph.value_info}
        self._pieces = tuple(self._cut())

    def _run(self, feeds: Feeds) -> Feeds:
        return self._run_pieces(feeds, set(self.choices.values()), False)

    def _run_tapped(self, feeds: Feeds, wide: bool) -> Feeds:
        return self._run_pieces(feeds, {tap.value for tap in self.taps.values()}, wide)

    def _run_pieces(self, feeds: Feeds, extra: Collection[str], wide: bool) -> Feeds:
        values: Feeds = dict(feeds)
        known: set[str] = set()
        for piece in self._pieces:
            nodes = self._nodes(piece.outputs, piece.entry)
            inside = [name for node in nodes for name in node.output if name in extra and name not in known]
            # What all pieces compute again is given by the first that does.
            known.update(inside)
            model = self._extract(nodes, piece, inside)
            session = open_model(model, self.bundle, wide, self.library)
            values |= run_session(session, values)
        return values

    def _cut(self) -> Iterator[_Piece]:
        entry, residuals = self._boundaries()
        rest = [output.name for output in self._proto.graph.output]
        yield _Piece(None, (entry,))
        for index, residual in enumerate(residuals):
            made = (residual, *(name for name in rest if name.startswith(f"present.{index}.")))
            rest = [name for name in rest if name not in made]
            yield _Piece(entry, made)
            entry = residual
        if rest:
            yield _Piece(entry, tuple(rest))

    def _boundaries(self) -> tuple[str, list[str]]:
        by_module = {name: tap.value for name, tap in self.taps.items()}
        for module, entry in by_module.items():
            prefix = module.removesuffix(".input")
            if module != prefix and f"{prefix}.0" in by_module:
                layers = [by_module[f"{prefix}.{i}"] for i in range(len(by_module)) if f"{prefix}.{i}" in by_module]
                return entry, layers
        raise ExportError(f"{self.bundle.folder}: its layers cannot be told apart. Validate it on a larger machine.")

    def _nodes(self, outputs: Sequence[str], entry: str | None) -> list[onnx.NodeProto]:
        """The nodes between `entry` and `outputs`, in the graph's order."""
        found: set[str] = set()
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            node = self._producers.get(name)
            if name == entry or node is None or node.name in found:
                continue
            found.add(node.name)
            waiting.extend(node.input)
        return [node for node in self._proto.graph.node if node.name in found]

    def _extract(self, nodes: Sequence[onnx.NodeProto], piece: _Piece, extra: Sequence[str]) -> ir.Model:
        graph = self._proto.graph
        read = {name for node in nodes for name in node.input}
        inputs = [value for value in graph.input if value.name in read]
        if piece.entry is not None:
            inputs.append(self._types[piece.entry])
        made = {name for node in nodes for name in node.output}
        known = {value.name: value for value in graph.output} | self._types
        # A piece that computes an earlier layer again gives that layer's cache, too: ONNX Runtime's attention, which
        # takes the past, wants somebody to take what it makes of it.
        again = [value.name for value in graph.output if value.name in made]
        outputs = [known[name] for name in dict.fromkeys([*piece.outputs, *extra, *again])]
        initializers = [tensor for tensor in graph.initializer if tensor.name in read]
        infos = [info for name, info in self._types.items() if name in made]
        sub = onnx.helper.make_graph(nodes, "piece", inputs, outputs, initializers, value_info=infos)
        model = onnx.helper.make_model(
            sub,
            opset_imports=self._proto.opset_import,
            ir_version=self._proto.ir_version,
        )
        return ir.from_proto(model)
