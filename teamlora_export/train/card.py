"""What is written with a trained adapter: `training.json` with every figure, `README.md` for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from teamlora_export import __version__
from teamlora_export.adapter import AdapterSpec, write_adapter
from teamlora_export.adapter.config import CONFIG_NAME
from teamlora_export.adapter.tensors import SAFETENSORS_NAME
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError, printable
from teamlora_export.files import read_json, read_record, sha256_of
from teamlora_export.train.encode import Lengths
from teamlora_export.train.evaluate import Measured
from teamlora_export.train.options import TrainOptions

RECORD_NAME = "training.json"
CARD_NAME = "README.md"
_SIGNATURE = "written_by"
_FILES = (CONFIG_NAME, SAFETENSORS_NAME, CARD_NAME)
_MOST_ROWS = 40
_TITLES = {"teamlora": "TeamLoRA", "hydralora": "HydraLoRA", "moelora": "MoELoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
        folder: of the adapter. family: of `options.FAMILY_NAMES`.
        steps: after which it ended. best_step: whose adapter was written. stopped_early: by --patience.
        trained_parameters: how many numbers have gradients.
        seconds_per_step: median of this run's steps after the first (forward to optimiser); NaN where it had none.
        losses: (step, mean training loss since the last one).
        rows: how many are trained on. held_out_rows: how many are not.
        held_out_before, held_out: loss of a token of the held-out answers, by task, of the base and of the adapter as
            its file has it.
        held_out_loss: of all held-out answers; None where nothing is held out.
        balance_loss: over the held-out rows, else over some that are trained on; None of lora.
        expert_use: share of each expert by task, averaged over layers. layer_use: by layer, averaged over tokens.
        versions: of the libraries that computed. hashes: SHA-256 of the data and of the base's weights.
        session: `checkpoint.Session.sha256`. used: options that were not given, as they were used.
        rows_cut, rows_skipped: of both parts, those that were longer than `used["max_length"]`.
        log: all that was logged; times at its end are of this run. is_first: this process wrote the files, of several.
    """

    folder: Path
    family: str
    steps: int
    best_step: int
    stopped_early: bool
    trained_parameters: int
    seconds_per_step: float
    losses: Sequence[tuple[int, float]]
    rows: int
    held_out_rows: int
    held_out_before: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] = field(default_factory=dict)
    held_out_loss: float | None = None
    balance_loss: float | None = None
    expert_use: Mapping[str, Sequence[float]] = field(default_factory=dict)
    layer_use: Mapping[str, Sequence[float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    session: str = ""
    used: Mapping[str, Any] = field(default_factory=dict)
    rows_cut: int = 0
    rows_skipped: int = 0
    log: Sequence[Mapping[str, Any]] = ()
    is_first: bool = True


def use_by_task(found: Measured, tasks: Sequence[str]) -> dict[str, list[float]]:
    """The share of each expert by task, averaged over layers."""
    shares = found.shares()
    if shares is None:
        return {}
    means = shares.mean(axis=1)
    return {task: means[i].round(4).tolist() for i, task in enumerate(tasks) if found.tokens[i]}


def use_by_layer(found: Measured, paths: Sequence[str]) -> dict[str, list[float]]:
    """The share of each expert by layer, over all tokens."""
    if found.use is None:
        return {}
    shares = found.use.sum(axis=0) / found.tokens.sum()
    return {path: shares[i].round(4).tolist() for i, path in enumerate(paths)}


def summary(result: TrainResult) -> str:
    """A line for each fact."""
    lines = [
        f"{result.folder}: {result.family}, {result.trained_parameters:,} trained parameters, {result.steps:,} steps"
        + (f", the adapter of step {result.best_step:,}" if result.held_out else "")
    ]
    for task, loss in list(result.held_out.items())[:_MOST_ROWS]:
        before = result.held_out_before.get(task, math.nan)
        lines.append(f"{printable(task, 200, keep='')}: held-out loss {loss:.4f}, of the base {before:.4f}")
    if result.balance_loss is not None:
        lines.append(f"balance loss: {result.balance_loss:.4f}")
    if math.isfinite(result.seconds_per_step):
        lines.append(f"seconds a step: {result.seconds_per_step:.3f}")
    return "\n".join(lines)


def write_result(folder: Path, adapter: AdapterSpec, result: TrainResult, options: TrainOptions) -> None:
    """Write the adapter with its record and card into `folder`."""
    dtype = DTYPES[options.save_dtype].torch
    if dtype == "bfloat16":
        import ml_dtypes

        write_adapter(adapter, folder, np.dtype(ml_dtypes.bfloat16))
    else:
        write_adapter(adapter, folder, np.dtype(dtype))
    (folder / CARD_NAME).write_text(_card(result, options), encoding="utf-8", errors="replace")
    hashes = {name: sha256_of(folder / name) for name in _FILES}
    record = {_SIGNATURE: f"teamlora-export {__version__}", **record_fields(result, options), "sha256": hashes}
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8", errors="replace")


def record_fields(result: TrainResult, options: TrainOptions) -> dict[str, Any]:
    """Every figure of a training, of types that JSON has."""
    return {
        "family": result.family,
        "command": options.command(),
        "session": result.session,
        "options": {**options.outcome(), "save_dtype": options.save_dtype},
        "used": dict(result.used),
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "trained_parameters": result.trained_parameters,
        "seconds_per_step": _number(result.seconds_per_step),
        "rows": result.rows,
        "held_out_rows": result.held_out_rows,
        "rows_cut": result.rows_cut,
        "rows_skipped": result.rows_skipped,
        "held_out_loss_before": dict(result.held_out_before),
        "held_out_loss": dict(result.held_out),
        "balance_loss": result.balance_loss,
        "expert_use": dict(result.expert_use),
        "expert_use_by_layer": dict(result.layer_use),
        "versions": dict(result.versions),
        "inputs": dict(result.hashes),
        "log": list(result.log),
    }


@dataclass(frozen=True)
class Record:
    """What `training.json` says of the training that wrote it. `session`: `checkpoint.Session.sha256`."""

    steps: int
    session: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def is_of(self, session: str, options: TrainOptions) -> bool:
        """Whether what was written is to the bit what a training of `session` and `options` writes."""
        return self.session == session and self.options.get("save_dtype") == options.save_dtype


def trained_record(folder: Path) -> Record | None:
    """What is known of the training that wrote `folder`; None where there is nothing.

    Raises:
        ExportError: it is damaged.
    """
    try:
        return read_record(folder / RECORD_NAME, Record, "Remove it, and train again.", folder)
    except FileNotFoundError:
        return None


def listed(folder: Path) -> set[str]:
    """The files in `folder` that a training wrote, and nobody changed since.

    Raises:
        ExportError: no training wrote them.
    """
    path = folder / RECORD_NAME
    advice = "Choose another -o."
    try:
        record = read_json(path, advice, folder)
    except FileNotFoundError:
        raise ExportError(f"{folder}: is not empty, and no training of this tool is in it. {advice}") from None
    hashes = record.get("sha256")
    if _SIGNATURE not in record or not isinstance(hashes, dict):
        raise ExportError(f"{path}: is not what a training of this tool writes. {advice}")
    ours = {RECORD_NAME}
    for name in _FILES:
        if (folder / name).is_file() and sha256_of(folder / name, folder) == hashes.get(name):
            ours.add(name)
    return ours


def _card(result: TrainResult, options: TrainOptions) -> str:
    targets = options.targets if isinstance(options.targets, str) else ", ".join(options.targets)
    experts = f", {options.experts} experts" if result.family != "lora" else ""
    lines = [
        "---",
        f"base_model: {json.dumps(_inline(Path(options.base).name if Path(options.base).exists() else options.base))}",
        "library_name: teamlora-export",
        f"tags: [{result.family}, adapter]",
        "---",
        "",
        f"# {_TITLES[result.family]} adapter",
        "",
        f"r = {options.rank}{experts}, alpha = {options.used_alpha:g}, on {_inline(targets)}: "
        f"{result.trained_parameters:,} trained parameters, in {options.save_dtype}.",
        "",
        f"Trained for {result.steps:,} steps on {result.rows:,} rows"
        + (", ended by a held-out loss that rose" if result.stopped_early else "")
        + (f"; this is the adapter of step {result.best_step:,}." if result.held_out else "."),
        *_lengths(result),
        f"A step took {result.seconds_per_step:.2f} s (median)." if math.isfinite(result.seconds_per_step) else "",
        "",
        "```",
        _inline(options.command()),
        "```",
        "",
        *_losses(result),
        *_use(result),
        "| made of | SHA-256 |",
        "|---|---|",
        *(f"| {_inline('/'.join(Path(name).parts[-2:]))} | `{sha256}` |" for name, sha256 in result.hashes.items()),
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in result.versions.items()) + ".",
        "`training.json` has every figure.",
        "",
    ]
    return "\n".join(lines)


def _lengths(result: TrainResult) -> list[str]:
    """Of rows whose files' hashes stand below, and that were not read as they are."""
    told = Lengths(result.used.get("max_length", 0), result.rows_cut, result.rows_skipped).told()
    return [told] if told else []


def _losses(result: TrainResult) -> list[str]:
    if not result.held_out:
        return ["Nothing was held out.", ""]
    rows = [
        f"| {_inline(task)} | {result.held_out_before.get(task, math.nan):.3f} | {loss:.3f} |"
        for task, loss in list(result.held_out.items())[:_MOST_ROWS]
    ]
    title = f"| loss of a held-out token ({result.held_out_rows:,} rows) | base | with the adapter |"
    return [title, "|---|---|---|", *rows, *_rest(len(result.held_out)), ""]


def _use(result: TrainResult) -> list[str]:
    if not result.expert_use:
        return []
    count = len(next(iter(result.expert_use.values())))
    of = "held-out rows" if result.held_out else "rows that were trained on"
    rows = [
        f"| {_inline(task)} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |"
        for task, shares in list(result.expert_use.items())[:_MOST_ROWS]
    ]
    return [
        f"Balance loss {result.balance_loss:.4f} (0: all experts are used equally), on {of}.",
        "",
        "| share of expert | " + " | ".join(str(i) for i in range(count)) + " |",
        "|---" * (count + 1) + "|",
        *rows,
        *_rest(len(result.expert_use)),
        "",
    ]


def _rest(count: int) -> list[str]:
    return [f"\n{count - _MOST_ROWS} more tasks are in `training.json`."] if count > _MOST_ROWS else []


def _inline(text: str) -> str:
    """One line of Markdown, without what would begin something else."""
    return printable(text, 2000, keep="").replace("|", "\\|").replace("`", "'")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
