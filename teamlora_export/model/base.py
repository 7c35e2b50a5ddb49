"""Opens a base model: a local folder, a GGUF file in one, or a name on the hub.

Two views of it: `skeleton`, the model's code with uninitialised parameters (tracing and checking need names and shapes
only, and untouched memory costs nothing), and `load`, the real thing (the reference of a validation).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from teamlora_export.adapter.check import BaseSignature
from teamlora_export.errors import ExportError
from teamlora_export.model.inject import signature_of

TASKS = ("text-generation", "feature-extraction", "sentence-embedding", "text-classification")
_AUTO_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "feature-extraction": AutoModel,
    "sentence-embedding": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
}
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja", "*/config.json"]


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        config: its transformers configuration.
        task: one of `TASKS`.
        gguf_file: the file inside `folder` that holds the weights, where they are GGUF.
    """

    name: str
    folder: Path
    config: Any
    task: str
    gguf_file: str | None = None

    def skeleton(self, dtype: torch.dtype, config: Any = None) -> nn.Module:
        """The model with uninitialised parameters of `dtype` and real buffers; `config` replaces its own."""
        from accelerate import init_empty_weights

        config = copy.deepcopy(self.config if config is None else config)
        with _quiet(), init_empty_weights(include_buffers=False):
            model = _AUTO_CLASSES[self.task].from_config(config, dtype=dtype)
        _materialize(model)
        model.tie_weights()
        return model.eval().requires_grad_(False)

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model with its weights in `dtype`, in evaluation mode.

        Raises:
            ExportError: a weight file is missing, damaged, or does not fit the configuration.
        """
        try:
            with _quiet():
                model = _AUTO_CLASSES[self.task].from_pretrained(
                    self.folder, config=copy.deepcopy(self.config), dtype=dtype, gguf_file=self.gguf_file
                )
        except Exception as error:
            raise ExportError(f"{self.name}: its weights cannot be loaded ({_first_line(error)}).") from error
        return model.eval()

    def save_companions(self, folder: Path) -> None:
        """Write configuration and tokenizer of a GGUF file as the JSON files that everything else reads."""
        from transformers import AutoTokenizer

        config = copy.deepcopy(self.config)
        with _quiet():
            config.save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.folder, gguf_file=self.gguf_file).save_pretrained(folder)

    @cached_property
    def signature(self) -> BaseSignature:
        return signature_of(self.skeleton(torch.float32), self.name)


def open_base(source: str, task: str = "auto") -> BaseModel:
    """Open the base model `source`, a local folder or a hub name, for `task`.

    Raises:
        ExportError: it is not there, is not a model that transformers knows, or cannot do the task.
    """
    if task not in (*TASKS, "auto"):
        raise ExportError(f"--task {task}: unknown. Use auto, {', '.join(TASKS[:-1])} or {TASKS[-1]}.")
    folder = _find_folder(source)
    gguf_files = sorted(folder.glob("*.gguf"))
    gguf_file = gguf_files[0].name if gguf_files and not (folder / "config.json").exists() else None
    if gguf_file is None and not (folder / "config.json").is_file():
        raise ExportError(f"{source}: no config.json in it. Give a folder that save_pretrained wrote, or a hub name.")
    try:
        config = (
            AutoConfig.from_pretrained(folder, gguf_file=gguf_file) if gguf_file else AutoConfig.from_pretrained(folder)
        )
    except Exception as error:
        raise ExportError(
            f"{source}: its config.json is not one that transformers can read ({_first_line(error)})."
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{source}: is an encoder-decoder model ({config.model_type}), which is not supported.")
    if task == "auto":
        task = _guess_task(config, folder)
    if type(config) not in _AUTO_CLASSES[task]._model_mapping:
        raise ExportError(f"{source}: transformers has no {task} model for {config.model_type}. Choose another --task.")
    return BaseModel(source, folder, config, task, gguf_file)


def _find_folder(source: str) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ExportError(f"{source}: no such folder. Give a folder that save_pretrained wrote, or a hub name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS))
    except Exception as error:
        raise ExportError(
            f"{source}: neither a folder here nor a model that can be fetched from the hub ({_first_line(error)})."
        ) from None


def _guess_task(config: Any, folder: Path) -> str:
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if (folder / "modules.json").is_file():
        return "sentence-embedding"
    if architecture.endswith("ForSequenceClassification"):
        return "text-classification"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")) or type(config) in _causal_only():
        return "text-generation"
    return "feature-extraction"


def _causal_only() -> set[type]:
    """Configurations that have a causal model and no masked one: decoders, whatever `architectures` says."""
    from transformers import AutoModelForMaskedLM

    return set(AutoModelForCausalLM._model_mapping.keys()) - set(AutoModelForMaskedLM._model_mapping.keys())


def _materialize(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for child in module.children():
        _materialize(child)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


class _quiet:
    """Keeps transformers' progress bars and advice out of our output."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: Any) -> None:
        self._warnings.__exit__(*exc)
        transformers_logging.set_verbosity(self._verbosity)
