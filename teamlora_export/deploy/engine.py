"""An engine of the bundle in a deployment: with its facts, and the plugin that it was built with or not at all."""

from __future__ import annotations

from pathlib import Path

from teamlora_export.bundle import ENGINES_NAME
from teamlora_export.deploy.folder import Deployment
from teamlora_export.engine.facts import EngineFacts, facts_path, find_engine, is_made_of, read_facts
from teamlora_export.engine.plugin import LIBRARY_NAME, check_version, plugin_of_engine
from teamlora_export.errors import ExportError
from teamlora_export.staging import require_space

PLUGINS_FOLDER = "plugins"


def refuse_stray_plugin(engine: str | None, plugin: Path | None) -> None:
    """A plugin is an engine's."""
    if plugin is not None and engine is None:
        raise ExportError(f"--plugin {plugin}: goes with an engine. Name it with --engine.")


def add_engine(
    made: Deployment, name: str, plugin: Path | None, as_name: str | None = None, takes_slots: bool = False
) -> EngineFacts:
    """Add an engine of the bundle, its facts, and the plugin that it was built with.

    Args:
        as_name: the engine's path in the model's folder. Default: as in the bundle.
        takes_slots: the target's program binds adapters to an engine that takes them.
    """
    path = find_engine(made.bundle, name)
    facts = read_facts(path)
    if not is_made_of(facts, made.bundle):
        raise ExportError(f"{path}: was built from another export than {made.bundle.folder}. Build it again.")
    if facts.slots is not None and not takes_slots:
        raise ExportError(
            f"{path}: takes adapters as inputs, which the deployed programs bind to no engine as yet. Build one of a "
            "bundle with a single --adapter."
        )
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
