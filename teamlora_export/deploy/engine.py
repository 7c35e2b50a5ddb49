"""An engine of the bundle in a deployment: with its facts, and the plugin that it was built with or not at all."""

from __future__ import annotations

import math
from pathlib import Path

from teamlora_export.bundle import ENGINES_NAME
from teamlora_export.deploy.engine_session import ALIGNMENT
from teamlora_export.deploy.folder import Deployment
from teamlora_export.deploy.slots_base import SPARE_PLACES
from teamlora_export.engine.facts import EngineFacts, facts_path, find_engine, is_made_of, read_facts
from teamlora_export.engine.plugin import LIBRARY_NAME, check_version, plugin_of_engine
from teamlora_export.errors import ExportError
from teamlora_export.staging import require_space

PLUGINS_FOLDER = "plugins"


def refuse_stray_plugin(engine: str | None, plugin: Path | None) -> None:
    """A plugin is an engine's."""
    if plugin is not None and engine is None:
        raise ExportError(f"--plugin {plugin}: goes with an engine. Name it with --engine.")


def serving_packages(facts: EngineFacts) -> list[str]:
    """What our programs in Python run an engine with, as pip is told."""
    package = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx-cu13"}[facts.runtime]
    return [f"{package}=={facts.runtime_version}", "cuda-bindings>=12.8"]


def longest_text(facts: EngineFacts) -> int | None:
    """Tokens of a text in our programs in Python, at most; None where there is no cache of a fixed length."""
    return None if facts.capacity is None else facts.capacity - SPARE_PLACES


def refuse_unserved(engine: str, facts: EngineFacts) -> None:
    """Refuse an engine whose steps texts cannot share in our programs in Python."""
    longest = longest_text(facts)
    if longest is not None and longest < 2:
        raise ExportError(
            f"{engine}: its cache has {facts.capacity} places, which is too few. Build it with longer --shapes."
        )
    if facts.task == "text-generation" and facts.capacity is None:
        raise ExportError(
            f"{engine}: keeps a cache that grows, and texts share the steps of an engine where it is in place. Export "
            "the model with --cache in-place, and build an engine of that."
        )
    caches = [
        most[1:] for name, (_, _, most) in facts.profiles[0].inputs.items() if name.startswith("past_key_values.")
    ]
    if any(math.prod(shape) * (4 if facts.dtype == "fp32" else 2) % ALIGNMENT for shape in caches):
        raise ExportError(
            f"{engine}: rows of its cache do not begin at multiples of {ALIGNMENT} bytes, as TensorRT wants them to. "
            "Build it with --shapes whose most tokens are a multiple of 16."
        )
    if max(profile.inputs["input_ids"][0][0] for profile in facts.profiles) > 1:
        raise ExportError(f"{engine}: takes no single row. Build it with --shapes from 1x1 on.")


def add_engine(made: Deployment, name: str, plugin: Path | None, as_name: str | None = None) -> EngineFacts:
    """Add an engine of the bundle, its facts, and the plugin that it was built with.

    Args:
        as_name: the engine's path in the model's folder. Default: as in the bundle.
    """
    path = find_engine(made.bundle, name)
    facts = read_facts(path)
    # The programs would not open it.
    slots = None if made.bundle.manifest.shelf is None else made.bundle.manifest.shelf["slots"]
    if facts.slots != slots:
        raise ExportError(
            f"{path}: is an engine with {facts.slots or 'no'} slots of adapters, and {made.bundle.folder} has "
            f"{slots or 'none'}. Build it again."
        )
    if not is_made_of(facts, made.bundle):
        raise ExportError(f"{path}: was built from another export than {made.bundle.folder}. Build it again.")
    if facts.stripped:
        raise ExportError(f"{path}: holds no weights. Build it without --strip-weights.")
    # An engine has a dtype of its own, and after `trt refit` another adapter.
    made.differs.update(dtype=facts.dtype, adapter_sha256=facts.adapter_sha256)
    require_space(made.folder, path.stat().st_size)
    stored = as_name or f"{ENGINES_NAME}/{path.name}"
    made.add(stored, path)
    made.add(Path(stored).with_suffix(".json").as_posix(), facts_path(path))
    if facts.plugin is not None:
        library = plugin_of_engine(path, facts.plugin, plugin)
        check_version(library, facts.runtime_version)
        made.add(f"{PLUGINS_FOLDER}/{LIBRARY_NAME}", library.path)
    return facts
