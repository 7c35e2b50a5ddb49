"""`deploy genai`: what onnxruntime-genai loads, `genai_config.json` beside the model and its tokenizer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from teamlora_export.bundle import MODEL_NAME, Bundle
from teamlora_export.deploy.folder import Deployment, deployment, require_cpu_dtype
from teamlora_export.deploy.genai_tokenizer import TOKENIZER_CONFIG_NAME, adds_tokens, tokenizer_config, why_unreadable
from teamlora_export.deploy.library import add_library
from teamlora_export.deploy.render import render
from teamlora_export.deploy.session import ort_value
from teamlora_export.errors import ExportError
from teamlora_export.files import read_json
from teamlora_export.manifest import ADAPTERS_NAME
from teamlora_export.ports import ADAPTER_NAME, is_capacity

CONFIG_NAME = "genai_config.json"
_DEFAULT_LENGTH = 2048


def deploy_genai(bundle: Bundle, out: Path, library: Path | None = None, logits: str = "last") -> Path:
    """Write the deployment into `out`.

    Args:
        library: a native library with the op, which is copied: onnxruntime-genai loads none from elsewhere.
        logits: see `deployment`.

    Raises:
        ExportError: see `deployment`; or the model does not generate text, has no tokenizer.json, or is in bfloat16.
    """
    if bundle.manifest.task != "text-generation":
        raise ExportError(f"{bundle.folder}: is for {bundle.manifest.task}; onnxruntime-genai generates text only.")
    problem = None if _given_config(bundle) is not None else why_unreadable(bundle)
    if problem is None and not bundle.manifest.tokens.stops:
        problem = "no token ends a text (eos_token_id in config.json), and onnxruntime-genai insists on one"
    if problem is not None:
        raise ExportError(f"{bundle.folder}: {problem}. Deploy it with `python` or `triton`.")
    require_cpu_dtype(bundle, "genai")
    name = None
    with deployment(bundle, out, "genai", logits=logits, shelf="own") as made:
        if library is not None:
            name = add_library(made, library)
        add_genai_files(made, name)
        shelf = bundle.manifest.shelf
        for adapter, shelved in shelf["adapters"].items() if shelf is not None else ():
            made.add(f"{ADAPTERS_NAME}/{adapter}.onnx_adapter", _adapter_file(bundle.folder / shelved["file"]))
        facts = {
            "library": name,
            "buffer_bytes": _buffer_bytes(bundle),
            "context": _context(bundle),
            "adds_tokens": adds_tokens(bundle),
            "adapters": sorted(shelf["adapters"]) if shelf is not None else None,
        }
        made.write("README.md", render("genai.README.md.j2", bundle, **facts))
    return out


def _adapter_file(path: Path) -> bytes:
    """An adapter of a shelf as ONNX Runtime keeps adapters: values of the inputs that have a default, which are a graph
    with one slot, and the slot of every row."""
    import onnxruntime as ort

    values = {ADAPTER_NAME: np.zeros(1, np.int32)}
    for name, array in load_file(path).items():
        one_slot = np.ascontiguousarray(array[None])
        values[name] = one_slot.view(np.uint16) if one_slot.dtype.name == "bfloat16" else one_slot
    made = ort.AdapterFormat()
    # They are what the file is written from.
    held = {name: ort_value(array) for name, array in values.items()}
    made.set_parameters(held)
    made.set_adapter_version(1)
    made.set_model_version(1)
    with tempfile.TemporaryDirectory() as folder:
        made.export_adapter(str(Path(folder) / "adapter"))
        return (Path(folder) / "adapter").read_bytes()


def add_genai_files(made: Deployment, library: str | None = None) -> None:
    """Add what onnxruntime-genai reads beside the graph; what its own builder wrote stays, but for the library."""
    given = _given_config(made.bundle)
    if given is not None:
        if library:
            given["model"]["decoder"].setdefault("session_options", {})["custom_ops_library"] = library
        made.add(CONFIG_NAME, json.dumps(given, indent=4) + "\n")
        return
    made.add(CONFIG_NAME, json.dumps(genai_config(made.bundle, library), indent=4) + "\n")
    made.add(TOKENIZER_CONFIG_NAME, tokenizer_config(made.bundle))


def _given_config(bundle: Bundle) -> dict[str, Any] | None:
    """The configuration that an attached graph came with."""
    if CONFIG_NAME not in bundle.manifest.sha256:
        return None
    fields: dict[str, Any] = read_json(bundle.folder / CONFIG_NAME, "Attach the adapter again.", bundle.folder)
    return fields


def genai_config(bundle: Bundle, library: str | None = None) -> dict[str, Any]:
    """The configuration: names and sizes come from the graph's own inputs, ids from what the manifest says of tokens.

    onnxruntime-genai takes no null; what a model does not have is left out, or is an id that does not occur.

    Raises:
        ExportError: the layers' caches differ in size, of which onnxruntime-genai knows one.
    """
    tokens = bundle.manifest.tokens
    caches = [port for port in bundle.manifest.inputs if port.name.startswith("past_key_values.")]
    names = {port.name for port in bundle.manifest.inputs}
    sizes = {(port.shape[1], port.shape[3]) for port in caches}
    if len(sizes) != 1:
        raise ExportError(
            f"{bundle.folder}: its layers' caches differ in size ({sorted(map(str, sizes))}), and onnxruntime-genai "
            "takes one. Deploy it with another target."
        )
    heads, head_size = sizes.pop()
    logits = next(port for port in bundle.manifest.outputs if port.name == "logits")
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library:
        options["custom_ops_library"] = library
    context = _context(bundle)
    return {
        "model": {
            # Any decoder whose inputs and outputs are named here; the names of architectures are for graphs of its own
            # builder, and several of ours are not among them.
            "type": "decoder",
            "vocab_size": logits.shape[-1],
            "context_length": context,
            "bos_token_id": tokens.padding if tokens.start is None else tokens.start,
            # It refuses ids that do not exist. Where nothing stops a text, `deploy cpp` takes its tokenizer alone.
            "eos_token_id": list(tokens.stops) or [tokens.padding],
            "pad_token_id": tokens.padding,
            "decoder": {
                "filename": MODEL_NAME,
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
            # One buffer of max_length for both ends of the cache, or another one that is longer on every call.
            "past_present_share_buffer": _buffer_bytes(bundle) > 0,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _context(bundle: Bundle) -> int:
    return bundle.manifest.tokens.most or _DEFAULT_LENGTH


def _buffer_bytes(bundle: Bundle) -> int:
    """What one token takes of the buffers of a cache in place, each as long as the text; 0 where the cache grows."""
    in_place = [port for port in bundle.manifest.inputs if any(map(is_capacity, port.shape))]
    return sum(int(port.shape[1]) * int(port.shape[3]) * (4 if port.dtype == "float" else 2) for port in in_place)
