"""Training rows from JSON Lines: one object a line, {"prompt": ..., "answer": ..., "task": ...}.

Every line is a row or a finding; none is dropped. A row without a task belongs to the one that its file is named
after. Whatever is wrong is told by file and line, all of it at once. Free of torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import open_file

SUFFIX = ".jsonl"
# Bytes: more than any prompt that a model reads.
_LONGEST_LINE = 16 << 20
_MOST_TASKS = 1000
_LONGEST_TASK = 200
# More than are shown: nobody reads on, and a file that is no JSON Lines at all ends here.
_MOST_FINDINGS = 1000
_ADVICE = 'expected an object such as {"prompt": "...", "answer": "...", "task": "..."}'


@dataclass(frozen=True)
class Row:
    """One example. `where` is file and line."""

    prompt: str
    answer: str
    task: str
    where: str


@dataclass(frozen=True)
class Rows:
    """All rows of some files, with the SHA-256 of each file by its name as given."""

    rows: list[Row]
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return sorted({row.task for row in self.rows})


def read_rows(paths: Sequence[Path]) -> Rows:
    """All rows of the files and folders `paths`, in order; of a folder, its `*.jsonl` by name.

    Raises:
        ExportError: there is none of them, one leads out of its folder or cannot be read, or rows are not what they
            should be: every finding by file and line.
    """
    findings: list[str] = []
    rows: list[Row] = []
    hashes: dict[str, str] = {}
    for path, folder in _files(paths):
        if str(path) in hashes:
            raise ExportError(f"{path}: is given twice.")
        try:
            file = open_file(path, folder)
        except FileNotFoundError:
            raise ExportError(f"{path}: no such file. Give a JSON Lines file, or a folder of them.") from None
        with file:
            hashes[str(path)] = _read_file(file, path, rows, findings)
    raise_findings("The training data" if len(hashes) > 1 else next(iter(hashes)), findings)
    if not rows:
        raise ExportError(
            f"{', '.join(hashes)}: no row in it. Each line is a row: {_ADVICE.removeprefix('expected ')}."
        )
    tasks = {row.task for row in rows}
    if len(tasks) > _MOST_TASKS:
        raise ExportError(
            f"{', '.join(hashes)}: {len(tasks):,} tasks, {_MOST_TASKS:,} at most. `task` names a kind, not a row."
        )
    return Rows(rows, hashes)


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and a `share` of each task that is held out; rows with one prompt stay together.

    Raises:
        ExportError: there are too few prompts for both parts.
    """
    by_task: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_task.setdefault(row.task, {}).setdefault(row.prompt, []).append(row)
    held_out: set[str] = set()
    last: dict[str, str] = {}
    for task, prompts in by_task.items():
        ordered = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())
        if len(ordered) < 2:
            raise ExportError(f"--validation {share:g}: task {task!r:.80} has one prompt alone; two parts need two.")
        held_out.update(ordered[: min(len(ordered) - 1, max(1, round(share * len(ordered))))])
        last[task] = ordered[-1]
    # Where tasks share prompts, another task may have held out all of a small one's.
    held_out -= {last[task] for task, prompts in by_task.items() if prompts.keys() <= held_out}
    for task, prompts in by_task.items():
        if not prompts.keys() & held_out:
            raise ExportError(
                f"--validation {share:g}: task {task!r:.80} shares its prompts with others, and has none to hold out. "
                "Give files of held-out rows."
            )
    return [row for row in rows if row.prompt not in held_out], [row for row in rows if row.prompt in held_out]


def shared_prompts(rows: Sequence[Row], held_out: Sequence[Row]) -> int:
    """How many held-out rows have a prompt that is trained on."""
    trained = {row.prompt for row in rows}
    return sum(row.prompt in trained for row in held_out)


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, Path | None]]:
    """Each file, with the folder that it may not leave."""
    for path in paths:
        if not path.is_dir():
            yield path, None
            continue
        try:
            found = sorted(one for one in path.iterdir() if one.name.endswith(SUFFIX))
        except OSError as error:
            raise ExportError(f"{path}: cannot be read ({error.strerror}).") from None
        if not found:
            raise ExportError(f"{path}: no file *{SUFFIX} in it. Give a JSON Lines file, or a folder of them.")
        yield from ((one, path) for one in found)


def _read_file(file: BufferedReader, path: Path, rows: list[Row], findings: list[str]) -> str:
    """Append the file's rows and findings; its SHA-256."""
    digest = hashlib.sha256()
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        digest.update(line)
        where = f"{path}, line {number}"
        if len(line) > _LONGEST_LINE:
            findings.append(f"{where}: has more than {_LONGEST_LINE:,} bytes")
            break
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            # Between rows, or the end of the file: no row that could be lost.
            continue
        row = _parse(line, path.stem, where)
        if isinstance(row, Row):
            rows.append(row)
        else:
            findings.append(f"{where}: {row}")
        if len(findings) >= _MOST_FINDINGS:
            break
    return digest.hexdigest()


def _parse(line: bytes, stem: str, where: str) -> Row | str:
    """The row on a line, or what is wrong with it."""
    try:
        fields = json.loads(line.decode(), object_pairs_hook=_refuse_duplicates)
    except UnicodeError:
        return "is not text in UTF-8"
    except RecursionError:
        return "is not a row: it is nested too deep"
    except ValueError as error:
        return f"is not JSON ({str(error).partition(';')[0]:.120})"
    if not isinstance(fields, dict):
        return f"is no JSON object, {_ADVICE}"
    for name in ("prompt", "answer"):
        if name not in fields:
            return f"has no {name!r}, {_ADVICE}"
    found = {"task": stem, **{name: fields[name] for name in ("prompt", "answer", "task") if name in fields}}
    for name, value in found.items():
        if not isinstance(value, str):
            return f"{name} is {_kind(value)}, expected a string"
        if not value.strip():
            return f"{name} is empty"
        try:
            value.encode()
        except UnicodeError:
            return f"{name} holds half of a character (a lone surrogate)"
    if len(found["task"]) > _LONGEST_TASK:
        return f"task has {len(found['task']):,} characters, {_LONGEST_TASK} at most"
    return Row(found["prompt"], found["answer"], found["task"], where)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", bool: "a truth value"}.get(type(value), "a number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it names a field twice")
    return fields
