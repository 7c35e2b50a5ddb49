"""`deploy genai`: what onnxruntime-genai loads, `genai_config.json` beside the model and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teamlora_export.bundle import MODEL_NAME, Bundle
from teamlora_export.deploy.folder import deployment, require_cpu_dtype
from teamlora_export.deploy.python import render
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.errors import ExportError
from teamlora_export.progress import Reporter

CONFIG_NAME = "genai_config.json"
_DEFAULT_LENGTH = 2048


def deploy_genai(bundle: Bundle, out: Path, library: str | None = None) -> Path:
    """Write the deployment into `out`.

    Args:
        library: a native library with the op, which is copied: onnxruntime-genai loads none from elsewhere.

    Raises:
        ExportError: see `deployment`; or the model does not generate text, has no tokenizer.json, or is in bfloat16.
    """
    if bundle.manifest.task != "text-generation":
        raise ExportError(f"{bundle.folder}: is for {bundle.manifest.task}; onnxruntime-genai generates text only.")
    if not (bundle.folder / "tokenizer.json").is_file():
        raise ExportError(f"{bundle.folder}: has no tokenizer.json, which onnxruntime-genai reads. Export it again.")
    require_cpu_dtype(bundle, "genai")
    path = None if library is None else find_library(Path(library), Reporter()).path
    library = None if path is None else path.name
    with deployment(bundle, out, "genai") as made:
        if path is not None:
            made.add(path.name, path)
        made.add(CONFIG_NAME, json.dumps(genai_config(bundle, library), indent=4) + "\n")
        made.write("README.md", render("genai.README.md.j2", bundle, library=library))
    return out


def genai_config(bundle: Bundle, library: str | None = None) -> dict[str, Any]:
    """The configuration: names and sizes come from the graph's own inputs, special tokens from the base's files."""
    config = _read(bundle, "config.json")
    settings = {**config, **_read(bundle, "generation_config.json")}
    caches = [port for port in bundle.manifest.inputs if port.name.startswith("past_key_values.")]
    names = {port.name for port in bundle.manifest.inputs}
    heads, head_size = caches[0].shape[1], caches[0].shape[3]
    context = config.get("max_position_embeddings") or config.get("n_positions") or _DEFAULT_LENGTH
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    stops = settings.get("eos_token_id")
    stop = stops[0] if isinstance(stops, list) else stops
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library:
        options["custom_ops_library"] = library
    return {
        "model": {
            "type": bundle.manifest.base["model_type"],
            "vocab_size": config["vocab_size"],
            "context_length": context,
            "bos_token_id": settings.get("bos_token_id", stop),
            "eos_token_id": stops,
            "pad_token_id": settings.get("pad_token_id", stop),
            "decoder": {
                "filename": MODEL_NAME,
                "hidden_size": config.get("hidden_size") or config.get("n_embd"),
                "num_attention_heads": config.get("num_attention_heads") or config.get("n_head"),
                "num_key_value_heads": heads,
                "head_size": head_size,
                "num_hidden_layers": len(caches) // 2,
                "session_options": options,
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            # The cache grows with the text: this graph concatenates, it does not write in place.
            "past_present_share_buffer": False,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _read(bundle: Bundle, name: str) -> dict[str, Any]:
    path = bundle.folder / name
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read ({error}).") from None
