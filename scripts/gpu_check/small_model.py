"""`python -m gpu_check.small_model BUNDLE UNADAPTED`: a bundle in float16 of a small Llama of random weights with
adapters, and one of the same graph without them."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bench.graphs import bypass_experts
from teamlora_export.bundle import MODEL_NAME, Bundle, hash_files
from teamlora_export.export import export_onnx
from teamlora_export.manifest import MANIFEST_NAME
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(out: Path, unadapted: Path) -> None:
    """Widths are SmolLM2-135M's, of 4 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=4,
        max_position_embeddings=512,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        LlamaForCausalLM(config).save_pretrained(folder / "base")
        base = open_base(str(folder / "base"))
        adapter = AdapterConfig(r=32, lora_alpha=64.0, lora_nums=4, target_modules=_TARGETS)
        write_adapter(new_adapter(base.signature, adapter, seed=0, spread=0.02), folder / "adapter")
        bundle = export_onnx(base.name, folder / "adapter", out, dtype="fp16", cache="in-place")
    _bypass(bundle, unadapted)


def _bypass(bundle: Bundle, out: Path) -> None:
    """Copy `bundle` without its experts, listed as if it had been exported so."""
    shutil.copytree(bundle.folder, out)
    model = ir.load(out / MODEL_NAME)
    bypass_experts(model, bundle)
    (out / MODEL_NAME).write_bytes(ir.to_proto(model).SerializeToString())
    fields = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    (out / MANIFEST_NAME).write_text(json.dumps({**fields, "sha256": hash_files(out)}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
