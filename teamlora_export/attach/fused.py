"""What of a graph holds projections inside of it, where no adapter reaches them, and what avoids that."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from teamlora_export.attach.products import find_products
from teamlora_export.attach.stored import name_of

# Operators that hold the weights of projections, and how to have these as products of their own.
_SWALLOWING = {
    **dict.fromkeys(
        ("Attention", "QAttention", "PackedAttention", "DecoderMaskedSelfAttention", "LongformerAttention"),
        "optimise without fusing attention (onnxruntime.transformers: FusionOptions.enable_attention = False; "
        "--disable_attention), or build with GroupQueryAttention",
    ),
    **dict.fromkeys(
        ("MoE", "QMoE"), "experts of a mixture are packed in it; adapt modules outside of the mixture alone"
    ),
    **dict.fromkeys(
        ("MatMulNBitsMlp", "MatMulNBitsQkv"),
        "switch the fusions of the execution provider off (save the model with optimisation level basic at most)",
    ),
    **dict.fromkeys(("FusedGemm", "GemmFastGelu", "FusedMatMulActivation"), "save the model unoptimised"),
}


def fused_findings(graph: ir.Graph) -> list[str]:
    """Operators of the graph that hold projections inside, with the option that avoids each; branches among them."""
    held: dict[str, list[str]] = defaultdict(list)
    for node in graph:
        if node.op_type in _SWALLOWING and node.domain == "com.microsoft":
            held[node.op_type].append(node.name or "")
    branching = [node for node in graph if _products_within(node)]
    branches = [
        f"{node.op_type} holds {_products_within(node)} projections in graphs inside of it ({name_of(node)}): export "
        "without it (optimum: --no-post-process leaves decoder_model.onnx and decoder_with_past_model.onnx unmerged)"
        for node in branching[:1]
    ]
    return branches + [
        f"com.microsoft.{kind} holds projections inside of it ({len(names)} nodes, the first is {names[0]:.120}): "
        f"{_SWALLOWING[kind]}"
        for kind, names in held.items()
    ]


def _products_within(node: ir.Node) -> int:
    """Products in the branches, or the body, of a node."""
    inner = [each.as_graph() for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH]
    return sum(len(find_products(graph)) for graph in inner)
