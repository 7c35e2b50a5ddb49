"""Trains and scores one cell of the grid, and keeps what was found.

A cell's result is a JSON file in the user's cache, under a key of all of its options, of the base's files, of the
libraries that compute and of the code that it came from. A training that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tasks import PARTS, TASKS, make_examples
from write_tasks import write_tasks

import teamlora_export
from method.plan import BASE, Cell, Settings, options_of
from method.score import Scores, score, tokenizer_of, torch_generate
from teamlora_export.bench.measure import processor
from teamlora_export.cache import cache_folder
from teamlora_export.dtypes import DTYPES
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.staging import write_aside

RESULT_NAME, _PROCESSORS_NAME = "result.json", "processors.txt"
_BASE_FILES = ("*.json", "*.safetensors", "*.bin", "*.gguf", "*.model", "merges.txt", "vocab.txt")
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_BENCH = Path(__file__).parents[1]
_PACKAGE = Path(teamlora_export.__file__).parent
_TASKS = (_BENCH / "write_tasks.py", *(_BENCH / "tasks").glob("*.py"))
# What a cell's score depends on; a change elsewhere leaves results as they are.
_TRAINS = (
    "callbacks.py",
    "checkpoint.py",
    "data.py",
    "encode.py",
    "evaluate.py",
    "material.py",
    "model.py",
    "options.py",
    "run.py",
    "trainer.py",
)
_CODE = (
    *_TASKS,
    *(_BENCH / "method" / name for name in ("plan.py", "score.py", "cells.py")),
    *(_PACKAGE / "train" / name for name in _TRAINS),
    *(_PACKAGE / "adapter").glob("*.py"),
    *(_PACKAGE / "model" / name for name in ("base.py", "inject.py", "layer.py")),
    *(_PACKAGE / name for name in ("deploy/words.py", "tokens.py")),
)
# What is exported, deployed or timed depends on all of it.
_ALL = (*_BENCH.rglob("*.py"), *_PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Place:
    """Where cells are kept, and what they are of.

    Attributes:
        any_version: results of other versions of the code count as well, where they are of the same questions and rows.
    """

    base: Path
    settings: Settings
    folder: Path
    any_version: bool = False

    def of(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}-{self._key(cell)}"

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell, or None."""
        return next((result for _, result in self._found(cell)), None)

    def find_own(self, cell: Cell) -> dict[str, Any] | None:
        """Likewise, of this code alone."""
        return dataclasses.replace(self, any_version=False).find(cell)

    def adapter(self, cell: Cell) -> Path | None:
        """The trained adapter of a cell, or None."""
        found = (folder / "adapter" for folder, _ in self._found(cell))
        return next((folder for folder in found if folder.is_dir()), None)

    def _found(self, cell: Cell) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Results, each with its folder: that of this code first."""
        own = self.of(cell)
        for folder in [own, *(self._others(cell) if self.any_version else ())]:
            with suppress(FileNotFoundError):
                result = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
                if folder == own or not unlike(result, self):
                    yield folder, result

    def _key(self, cell: Cell) -> str:
        asked = {**dataclasses.asdict(cell), **dataclasses.asdict(self.settings), "base": hash_of_base(self.base)}
        if cell.family == BASE:
            asked = {name: asked[name] for name in ("test", "data_seed", "dtype", "base")}
        asked["libraries"] = _libraries()
        return f"{short_hash(asked)}-{code_version()}"

    def _others(self, cell: Cell) -> list[Path]:
        """Of the same options, the newest first."""
        options = self._key(cell).partition("-")[0]
        found = (self.folder / "cells").glob(f"{cell.name}-{options}-*")
        return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def default_folder() -> Path:
    return cache_folder() / "claims"


def run_cell(cell: Cell, place: Place) -> dict[str, Any] | None:
    """The result of a cell, from before or from now; None while another process is at it.

    Raises:
        ExportError: it cannot be trained.
    """
    if (found := place.find(cell)) is not None:
        return found
    folder = place.of(cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as is_alone:
        if not is_alone:
            return None
        if (found := place.find(cell)) is not None:
            return found
        result = {
            "cell": cell.name,
            **dataclasses.asdict(cell),
            "settings": dataclasses.asdict(place.settings),
            "code": code_version(),
            "processor": _processors(folder),
            **known_by(cell, place),
            **_run(cell, place, folder),
        }
        write_aside(folder / RESULT_NAME, json.dumps(result, indent=1) + "\n", result=False)
        if not cell.keeps_adapter:
            shutil.rmtree(folder / "adapter", ignore_errors=True)
        return result


def _processors(folder: Path) -> str:
    """That which works at the cell now, after those that did before: a cache may move to another machine."""
    path, now = folder / _PROCESSORS_NAME, processor()
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if now not in known:
        known.append(now)
        write_aside(path, "\n".join(known) + "\n", result=False)
    return ", then ".join(known)


def _run(cell: Cell, place: Place, folder: Path) -> dict[str, Any]:
    started, trained = time.monotonic(), {}
    if cell.family != BASE:
        trained = _trained(cell, place, folder)
    adapter = None if cell.family == BASE else folder / "adapter"
    scores = score_in_torch(place, adapter, place.settings.dtype)
    return {
        **trained,
        "mean": scores.mean,
        "right": {task: "".join("01"[right] for right in found) for task, found in scores.right.items()},
        "by_task": scores.by_task,
        "answers": scores.answers,
        "seconds": time.monotonic() - started,
    }


def _trained(cell: Cell, place: Place, folder: Path) -> dict[str, Any]:
    """What is known of the training that wrote the adapter, from before or from now."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from teamlora_export.progress import Reporter
    from teamlora_export.train import train
    from teamlora_export.train.card import RECORD_NAME
    from teamlora_export.train.checkpoint import work_folder

    options = options_of(cell, place.settings, place.base, data_folder(place), folder / "adapter")
    # It comes with the whole adapter.
    path = options.output / RECORD_NAME
    if not path.is_file():
        # Of rows as short as these: on a CPU the fused kernel's way back takes a fifth of a step.
        with sdpa_kernel(SDPBackend.MATH):
            train(options, Reporter(quiet=True))
    # Left of a training that was killed when all was written.
    shutil.rmtree(work_folder(options.output), ignore_errors=True)
    record = json.loads(path.read_text(encoding="utf-8"))
    return {
        "rank": options.rank,
        "alpha": options.used_alpha,
        "parameters": record["trained_parameters"],
        "seconds_per_step": record["seconds_per_step"],
        "held_out_loss": record["held_out_loss"],
        "best_step": record["best_step"],
        "balance_loss": record["balance_loss"],
        "expert_use": record["expert_use"],
        "losses": [[entry["step"], entry["loss"]] for entry in record["log"] if "loss" in entry],
        "versions": record["versions"],
    }


def score_in_torch(place: Place, adapter: Path | None, dtype: str) -> Scores:
    """The score of the base with an adapter, or without one; all of it computes in `dtype`."""
    import torch

    from teamlora_export.adapter import align_with_base, read_adapter
    from teamlora_export.model.base import open_base
    from teamlora_export.model.inject import inject

    base = open_base(str(place.base), "text-generation")
    model = base.load(getattr(torch, DTYPES[dtype].torch))
    if adapter is not None:
        inject(model, align_with_base(read_adapter(adapter), base.signature))
    generate = torch_generate(model.eval(), base.folder)
    return score(generate, tokenizer_of(base.folder), asked_examples(place.settings))


def asked_examples(settings: Settings) -> list[Any]:
    """The questions of the test part, task by task.

    Raises:
        ExportError: a task has not so many.
    """
    with _as_many_as_there_are():
        return [example for task in TASKS for example in make_examples(task, "test", settings.test, settings.data_seed)]


def data_folder(place: Place) -> Path:
    """The files of `write_tasks` for these settings, written once.

    Raises:
        ExportError: a task has not so many rows.
    """
    settings = place.settings
    code = _hash_of_code(_TASKS)
    folder = place.folder / "data" / f"{short_hash({**settings.counts, 'seed': settings.data_seed})}-{code}"
    if not folder.is_dir():
        staging = folder.with_name(f"{folder.name}.{os.getpid()}")
        try:
            with _as_many_as_there_are():
                write_tasks(staging, {part: settings.counts[part] for part in PARTS}, settings.data_seed)
        except ExportError:
            shutil.rmtree(staging)
            raise
        try:
            os.rename(staging, folder)
        except OSError:
            # Another process was faster.
            shutil.rmtree(staging)
    return folder


@contextmanager
def _as_many_as_there_are() -> Iterator[None]:
    """The tasks are programs that run on their own, and know no ExportError."""
    try:
        yield
    except ValueError as error:
        raise ExportError(f"{error} Lower that part's number: --train, --validation or --test.") from None


def known_by(cell: Cell, place: Place) -> dict[str, str]:
    """By which a result knows what it is of: hashes of the questions and, where it trained, of the rows."""
    asked = {"questions_sha256": hash_of_questions(place.settings)}
    return asked if cell.family == BASE else {**asked, "rows_sha256": hash_of_rows(place)}


def unlike(result: Mapping[str, Any], place: Place) -> list[str]:
    """In what a result is not of the questions and rows of `place`. What it does not say of itself is taken to be the
    same, where the questions are as many."""
    found = []
    counts = {task: len(right) for task, right in result["right"].items()}
    if counts != _counts_of_questions(place.settings) or result.get("questions_sha256") not in (
        None,
        hash_of_questions(place.settings),
    ):
        found.append("was asked other questions")
    if (rows := result.get("rows_sha256")) is not None and rows != hash_of_rows(place):
        found.append("was trained on other rows")
    return found


@cache
def hash_of_questions(settings: Settings) -> str:
    return _sha256([dataclasses.asdict(example) for example in asked_examples(settings)])


@cache
def hash_of_rows(place: Place) -> str:
    """Of the files that are trained on and held out."""
    folder = data_folder(place)
    return _sha256({name: sha256_of(folder / name) for name in ("train.jsonl", "validation.jsonl")})


@cache
def _counts_of_questions(settings: Settings) -> Mapping[str, int]:
    return Counter(example.task for example in asked_examples(settings))


@cache
def code_version() -> str:
    """Of the code that decides about a score, but for comments, docstrings and layout."""
    return _hash_of_code(_CODE)


@cache
def whole_version() -> str:
    """Of all code of the package and of the benchmark, likewise."""
    return _hash_of_code(_ALL)


def _hash_of_code(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:8]


@cache
def hash_of_base(folder: Path) -> str:
    """Of every file that decides what the model makes of a prompt: configuration, weights and tokenizer.

    Raises:
        ExportError: it is no folder with weights. A hub name is none: all of them would be the same base.
    """
    files = sorted(path for pattern in _BASE_FILES for path in folder.glob(pattern) if path.is_file())
    if not any(path.suffix in _WEIGHTS for path in files):
        raise ExportError(f"--base {folder}: is no folder with a model's weights. Give one; a hub name is not taken.")
    return short_hash({path.name: sha256_of(path) for path in files})


@cache
def _libraries() -> dict[str, str]:
    """What computes, beside our own code."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "tokenizers")}


def short_hash(fields: Mapping[str, Any]) -> str:
    return _sha256(fields)[:10]


def _sha256(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process works in the folder; none will until the block ends."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
