"""Opens a base model in PyTorch.

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

import ml_dtypes
import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from teamlora_export.adapter.check import BaseSignature
from teamlora_export.errors import ExportError
from teamlora_export.model.inject import signature_of
from teamlora_export.model.source import BaseSource, find_base

TASKS = ("text-generation", "feature-extraction", "sentence-embedding", "text-classification")
_AUTO_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "feature-extraction": AutoModel,
    "sentence-embedding": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class BaseModel:
    """A base model whose configuration transformers has read, for one of `TASKS`."""

    source: BaseSource
    config: Any
    task: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def folder(self) -> Path:
        return self.source.folder

    def skeleton(self, dtype: torch.dtype, *, experts: str | None = "eager") -> nn.Module:
        """The model with uninitialised parameters of `dtype` and real buffers.

        Args:
            experts: how a mixture of experts runs: "eager" is its definition, None what transformers takes for best.
        """
        from accelerate import init_empty_weights

        config = copy.deepcopy(self.config)
        config._experts_implementation = experts
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
        config = copy.deepcopy(self.config)
        # The definition of a mixture of experts, in every dtype.
        config._experts_implementation = "eager"
        try:
            with _quiet():
                model = _AUTO_CLASSES[self.task].from_pretrained(
                    self.folder, config=config, dtype=dtype, gguf_file=self.source.gguf_file
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
            AutoTokenizer.from_pretrained(self.folder, gguf_file=self.source.gguf_file).save_pretrained(folder)

    @cached_property
    def signature(self) -> BaseSignature:
        return signature_of(self.skeleton(torch.float32), self.name)

    def aliases(self) -> dict[str, list[str]]:
        """Every parameter and persistent buffer by name, with the names of all tensors that it is tied to."""
        groups: dict[int, list[str]] = {}
        tensors = self.skeleton(torch.float32).state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            groups.setdefault(id(tensor), []).append(name)
        return {name: groups[id(tensor)] for name, tensor in tensors.items()}


class LoadedWeights:
    """Tensors of a model that transformers has loaded whole: for GGUF, `.bin`, and names that it converts."""

    def __init__(self, base: BaseModel) -> None:
        self._state = base.load(torch.float32).state_dict()

    def read(self, name: str) -> np.ndarray:
        tensor = self._state[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def open_base(name: str | BaseSource, task: str = "auto") -> BaseModel:
    """Open the base model `name`, a local folder or a hub name, for `task`.

    Raises:
        ExportError: it is not there, is not a model that transformers knows, or cannot do the task.
    """
    if task not in (*TASKS, "auto"):
        raise ExportError(f"--task {task}: unknown. Use auto, {', '.join(TASKS[:-1])} or {TASKS[-1]}.")
    source = find_base(name) if isinstance(name, str) else name
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        config = AutoConfig.from_pretrained(source.folder, **options)
    except Exception as error:
        raise ExportError(
            f"{source.name}: its config.json is not one that transformers can read ({_first_line(error)})."
        ) from None
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{source.name}: is an encoder-decoder model ({config.model_type}), which is not supported.")
    if task == "auto":
        task = _guess_task(config, source.folder)
    if type(config) not in _AUTO_CLASSES[task]._model_mapping:
        raise ExportError(f"{source.name}: {config.model_type} has no {task} model. Choose another --task.")
    return BaseModel(source, config, task)


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
