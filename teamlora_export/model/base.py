"""Opens a base model in PyTorch.

Two views of it: `skeleton`, the model's code with uninitialised parameters (tracing and checking need names and shapes
only, and untouched memory costs nothing), and `load`, the real thing (the reference of a validation).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from teamlora_export.adapter.check import BaseSignature
from teamlora_export.adapter.tensors import FLOAT_DTYPES, read_pickled_tensors, to_numpy
from teamlora_export.errors import ExportError, first_line, raise_findings
from teamlora_export.model.checkpoint import NOT_FLOAT, is_weight, missing_text, read_extents, refuse_not_finite
from teamlora_export.model.configuration import check_config
from teamlora_export.model.inject import signature_of
from teamlora_export.model.source import BaseSource, find_base
from teamlora_export.ports import refuse_unknown_task

_AUTO_CLASSES: dict[str, Any] = {
    "text-generation": AutoModelForCausalLM,
    "feature-extraction": AutoModel,
    "sentence-embedding": AutoModel,
    "text-classification": AutoModelForSequenceClassification,
}
# Bytes of what a model's code computes from its configuration (rotary frequencies, masks).
_LARGEST_TABLES = 2 << 30


@dataclass(frozen=True)
class BaseModel:
    """A base model whose configuration transformers has read, for one of the tasks."""

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

        Raises:
            ExportError: transformers cannot build a model of the configuration.
        """
        model: Any = self._build_empty(dtype, experts)
        if dtype.itemsize < torch.float32.itemsize:
            # What a model computes once it computes in its own dtype: frequencies rounded to 16 bits, for one (GPT-J).
            _copy_computed_buffers(self._build_empty(torch.float32, experts), model)
        _materialize(model)
        model.tie_weights()
        return model.eval().requires_grad_(False)

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The model with its weights in `dtype`, in evaluation mode.

        What the checkpoint lacks is NaN, never a number that somebody made up: a head or a pooler may be missing where
        nobody runs it, or where the adapter brings its own.

        Raises:
            ExportError: a weight file is missing, damaged, quantised, or does not fit the configuration.
        """
        return self.load_and_miss(dtype)[0]

    def load_and_miss(self, dtype: torch.dtype) -> tuple[nn.Module, set[str]]:
        """As `load`, with the names of the tensors that the checkpoint lacks."""
        self._check_kinds()
        try:
            with _quiet():
                model, found = _AUTO_CLASSES[self.task].from_pretrained(
                    self.folder,
                    config=self._config("eager"),
                    dtype=dtype,
                    gguf_file=self.source.gguf_file,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
        except Exception as error:
            raise ExportError(f"{self.name}: its weights cannot be loaded ({first_line(error)}).") from error
        _copy_computed_buffers(self.skeleton(dtype), model)
        missing = self._untied(found["missing_keys"])
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in missing and tensor.is_floating_point():
                tensor.data.fill_(math.nan)
        return model.eval(), missing

    def save_companions(self, folder: Path) -> None:
        """Write configuration and tokenizer of a GGUF file as the JSON files that everything else reads."""
        from transformers import AutoTokenizer

        config = copy.deepcopy(self.config)
        try:
            with _quiet():
                config.save_pretrained(folder)
                tokenizer = AutoTokenizer.from_pretrained(
                    self.folder, gguf_file=self.source.gguf_file, trust_remote_code=False
                )
                tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:
            raise ExportError(f"{self.name}: its tokenizer cannot be read ({first_line(error)}).") from error

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

    def check_size(self) -> None:
        """Refuse a configuration of a model that its weight files cannot hold, before memory is asked for.

        Raises:
            ExportError: it is too large, or transformers cannot build a model of it.
        """
        with torch.device("meta"):
            model = self._build(torch.float32)
        values = sum(parameter.numel() for parameter in model.parameters())
        size = sum(path.stat().st_size for path in self.source.weight_files())
        # Files of type GGUF may have a bit for a value.
        if values > size * (8 if self.source.gguf_file else 1):
            raise ExportError(
                f"{self.name}: its configuration describes a model of {values / 1e6:,.0f} million parameters; "
                f"its weights have {size / 1e6:,.0f} MB. Does config.json belong to these weights?"
            )
        tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
        if tables > _LARGEST_TABLES:
            raise ExportError(
                f"{self.name}: the tables that its code computes would have {tables / 1e9:,.0f} GB. "
                "Is max_position_embeddings right in config.json?"
            )

    def _build_empty(self, dtype: torch.dtype, experts: str | None) -> nn.Module:
        """The model with parameters that have no data, and buffers that do."""
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            return self._build(dtype, experts)

    def _build(self, dtype: torch.dtype, experts: str | None = "eager") -> nn.Module:
        config = self._config(experts)
        try:
            with _quiet():
                return _AUTO_CLASSES[self.task].from_config(config, dtype=dtype, trust_remote_code=False)
        except Exception as error:
            raise ExportError(
                f"{self.name}: transformers cannot build a {self.task} model of its configuration "
                f"({type(error).__name__}: {first_line(error)})."
            ) from error

    def _config(self, experts: str | None) -> Any:
        """A copy of the configuration, with the experts of a mixture run as `skeleton` says."""
        config = copy.deepcopy(self.config)
        config._experts_implementation = experts
        return config

    def _check_kinds(self) -> None:
        """Refuse what transformers would cast in silence: integers, and tensors that are not plain."""
        if self.source.gguf_file is not None:
            return
        kinds = {name: str(extent.dtype) for name, extent in read_extents(self.source).items()}
        for path in self.source.weight_files() if not kinds else ():
            for name, tensor in read_pickled_tensors(path).items():
                kinds[name] = str(tensor.dtype).removeprefix("torch.")
        findings = [
            f"{name} is {kind}: {NOT_FLOAT}"
            for name, kind in kinds.items()
            if kind not in FLOAT_DTYPES and is_weight(name, self.signature)
        ]
        raise_findings(f"The weights of {self.name}", findings)

    def _untied(self, names: Collection[str]) -> set[str]:
        """Those of `names` that are tied to nothing that is not among them."""
        aliases = self.aliases() if names else {}
        return {name for name in names if set(aliases.get(name, [name])) <= set(names)}


class LoadedWeights:
    """Tensors of a model that transformers has loaded whole: for GGUF, `.bin`, and names that it converts.

    Args:
        needed: the tensors that will be read.

    Raises:
        ExportError: the checkpoint lacks some of them; listed.
    """

    def __init__(self, base: BaseModel, needed: Collection[str]) -> None:
        model, missing = base.load_and_miss(torch.float32)
        self._state = model.state_dict()
        raise_findings(
            f"The weights of {base.name}",
            [missing_text(name) for name in sorted(needed) if name in missing or name not in self._state],
        )

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32.

        Raises:
            ExportError: it holds a NaN or an infinite number.
        """
        array = to_numpy(self._state[name])
        refuse_not_finite(name, array)
        return array


def open_base(name: str | BaseSource, task: str = "auto") -> BaseModel:
    """Open the base model `name`, a local folder or a hub name, for `task`.

    Raises:
        ExportError: it is not there, is not a model that transformers knows, or cannot do the task.
    """
    refuse_unknown_task(task)
    source = find_base(name) if isinstance(name, str) else name
    config = _read_config(source)
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{source.name}: is an encoder-decoder model ({config.model_type}), which is not supported.")
    if task == "auto":
        task = _guess_task(config, source.folder)
    if type(config) not in _AUTO_CLASSES[task]._model_mapping:
        raise ExportError(f"{source.name}: {config.model_type} has no {task} model. Choose another --task.")
    base = BaseModel(source, config, task)
    base.check_size()
    return base


def _read_config(source: BaseSource) -> Any:
    """The configuration as transformers reads it, once it is known to be harmless."""
    if source.gguf_file is None:
        check_config(source, set(CONFIG_MAPPING))
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        with _quiet():
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=False, **options)
    except Exception as error:
        raise ExportError(
            f"{source.name}: its config.json is not one that transformers can read ({first_line(error)})."
        ) from None


def _guess_task(config: Any, folder: Path) -> str:
    given = getattr(config, "architectures", None)
    architecture = str(given[0]) if isinstance(given, (list, tuple)) and given else ""
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


def _copy_computed_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the buffers that no checkpoint holds as `source` computed them when it was built.

    transformers 5.23 builds a model without data before it loads it, and leaves such buffers as they are where the
    model's code does not know how to compute them again (tests/model/test_base.py tells when this can go).
    """
    kept = source.state_dict().keys()
    buffers = dict(target.named_buffers())
    for name, value in source.named_buffers():
        if name not in kept and name in buffers:
            buffers[name].copy_(value)


def _materialize(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    for child in module.children():
        _materialize(child)


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
