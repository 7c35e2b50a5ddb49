"""Which of ONNX's own operators for language models a graph is written in, and in how many of its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from teamlora_export.graph.passes.module_outputs import MODULES_KEY

OPERATORS = (
    *("Attention", "TensorScatter", "RotaryEmbedding"),
    *("RMSNormalization", "LayerNormalization", "Gelu", "Swish"),
)


@dataclass(frozen=True)
class Lifted:
    """What was found in a graph.

    Attributes:
        nodes: all nodes of the graph, function bodies not counted.
        layers: of the model; 0 where the graph does not say which values they return.
        operators: number of nodes of each operator that occurs.
        in_layers: in how many layers each of them occurs.
    """

    nodes: int
    layers: int
    operators: Mapping[str, int] = field(default_factory=dict)
    in_layers: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        found = [f"{name} {count}{self._share(name)}" for name, count in self.operators.items()]
        return f"{', '.join(found) or 'none'}; {self.nodes:,} nodes in all"

    def _share(self, name: str) -> str:
        return f" (in {self.in_layers.get(name, 0)} of {self.layers} layers)" if self.layers else ""


def find_lifted(model: ir.Model) -> Lifted:
    """Count the operators of `model`."""
    counts = Counter(node.op_type for node in model.graph if node.domain == "")
    ends = _layer_ends(model)
    seen: set[ir.Node] = set()
    in_layers: Counter[str] = Counter()
    for end in ends:
        in_layers.update({node.op_type for node in _new_ancestors(end, seen)})
    occurring = [name for name in OPERATORS if counts[name]]
    return Lifted(
        sum(1 for _ in model.graph),
        len(ends),
        {name: counts[name] for name in occurring},
        {name: in_layers[name] for name in occurring},
    )


def _layer_ends(model: ir.Model) -> list[ir.Value]:
    """What each layer of the model's one list of layers hands on."""
    marked = {
        module: value
        for node in model.graph
        for value in node.outputs
        for module in value.metadata_props.get(MODULES_KEY, "").split(",")
    }
    prefix = next((name.removesuffix(".input") for name in marked if name.endswith(".input")), None)
    ends: list[ir.Value] = []
    while (end := marked.get(f"{prefix}.{len(ends)}")) is not None:
        ends.append(end)
    return ends


def _new_ancestors(end: ir.Value, seen: set[ir.Node]) -> list[ir.Node]:
    """Nodes that `end` depends on, without those that are `seen` already, which they are after that."""
    found: list[ir.Node] = []
    waiting = [end.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node)
            waiting.extend(value.producer() for value in node.inputs if value is not None)
    return found
