"""What a killed training goes on from: a folder beside the output, OUT.training.

    session.json              the options, the files' hashes and the versions that the training was begun with
    checkpoint-N/             after step N, whole or not there at all; the one before goes when it is
      tensors.safetensors     the adapter, the best one so far, the optimiser's state, the random numbers' state, the
                              sums of what is logged next
      state.json              the schedule, the early stop, what was measured before
      trainer_state.json      the Trainer's own: steps, epochs, what was logged
      sha256.json             of these three: what is damaged would go on to another adapter, unseen

The base is in none of them. Tensors are safetensors, the rest is JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from teamlora_export import interrupt
from teamlora_export.disk import saving, sync, sync_names
from teamlora_export.errors import ExportError
from teamlora_export.files import read_json, read_record, sha256_of
from teamlora_export.staging import existing, locked, real_path, remove_whole, scratch_folder, settle, write_aside
from teamlora_export.train.material import PARTS
from teamlora_export.train.options import option_name

SESSION_NAME = "session.json"
_TENSORS_NAME = "tensors.safetensors"
_STATE_NAME = "state.json"
# As the Trainer calls it, which reads it itself.
TRAINER_STATE_NAME = "trainer_state.json"
_HASHES_NAME = "sha256.json"
_HASHED = (_TENSORS_NAME, _STATE_NAME, TRAINER_STATE_NAME)
_NAMES = {*_HASHED, _HASHES_NAME}
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")
_FORMAT = 1


@dataclass(frozen=True)
class Session:
    """What a training was begun with.

    Attributes:
        options: `TrainOptions.outcome`. hashes: SHA-256 of the data's files, in order, and of the base's.
        processes: how many train together. versions: of the libraries that compute.
    """

    options: dict[str, Any]
    hashes: dict[str, str]
    processes: int
    versions: dict[str, str]
    format_version: int = _FORMAT

    @property
    def sha256(self) -> str:
        """Of all of it, but for the files' names."""
        fields = {**asdict(self), "hashes": [*self.hashes.values()]}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass
class Standing:
    """How the held-out loss has done.

    Attributes:
        before: that of the base, by task. best_loss, best_step: the lowest one since; None before the first.
        worse: evaluations since then. stopped: the training ended for that.
        due: the evaluation after the checkpoint's step was interrupted; going on begins with it.
    """

    before: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0
    stopped: bool = False
    due: bool = False


@dataclass(frozen=True)
class State:
    """What a training has beside tensors: `groups` are the optimiser's rates, `schedule` is of the learning rate."""

    standing: Standing
    groups: list[dict[str, float]]
    schedule: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: its folder, tensors by name, and state."""

    folder: Path
    step: int
    tensors: dict[str, Any]
    state: State

    def part(self, name: str) -> dict[str, Any]:
        """The tensors of one part (adapter, best, optimizer, random, sums)."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


def work_folder(output: Path) -> Path:
    """Where the checkpoints of a training lie.

    Raises:
        ExportError: nothing can lie beside `output`.
    """
    place = real_path(output)
    if not place.name:
        raise ExportError(f"{output}: is the root of the file system. Choose another -o.")
    return place.with_name(f"{place.name}.training")


@contextmanager
def begin(work: Path, session: Session, *, again: bool = False) -> Iterator[None]:
    """Write down what a training begins with; from then on it is `alone`, until the block ends.

    Args:
        again: another has begun there before, and this one is alone already.

    Raises:
        ExportError: it cannot be written, or another has begun by now.
    """
    with ExitStack() as held:
        with existing(work), locked(work.parent):
            if not again and (work / SESSION_NAME).exists():
                raise ExportError(_at_work(work))
            write_aside(work / SESSION_NAME, json.dumps(asdict(session), indent=2) + "\n", result=False)
            held.enter_context(alone(work))
        yield


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Nobody else trains in `work` inside of the block; the system lets go of it where the process is killed.

    Raises:
        ExportError: somebody does, or no training of ours was begun there.
    """
    _read_session(work)
    path = work / SESSION_NAME
    # NFS gives such a lock only to those who may write.
    descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    try:
        # A file system that has no locks does without.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ExportError(_at_work(work)) from None
        yield
    finally:
        os.close(descriptor)


def _at_work(work: Path) -> str:
    return f"{work}: another training is at work there. Wait, or choose another -o."


def was_begun(work: Path) -> bool:
    """Whether there is anything in `work`; an empty folder is what a training leaves that is killed while it begins, or
    when it has cleared up."""
    if not work.exists():
        return False
    settle(work)
    return not work.is_dir() or any(work.iterdir())


@contextmanager
def left_as_useful(work: Path) -> Iterator[None]:
    """What fails inside of the block before there is a checkpoint leaves nothing; an interruption after that tells from
    where the training goes on."""
    try:
        yield
    except BaseException as error:
        if work.is_dir() and not _steps(work):
            finish(work)
        elif work.is_dir() and (interrupt.arrived() or isinstance(error, interrupt.Interrupted)):
            interrupt.note_written(f"{last_checkpoint(work)}; --resume goes on from there")
        raise


@contextmanager
def goes_on(work: Path) -> Iterator[None]:
    """What cannot be written inside of the block is told with the checkpoint from which the training goes on."""
    try:
        yield
    except ExportError as error:
        last = last_checkpoint(work)
        raise ExportError(f"{error} {last.name} is whole: --resume goes on from it." if last else str(error)) from None


def has_ended(work: Path, asked: Session, steps: int) -> bool:
    """Whether what is in `work` was left by a training like `asked` that had ended after so many steps, and was killed
    while it cleared up."""
    found = _steps(work)
    return _read_session(work).sha256 == asked.sha256 and (not found or max(found) == steps)


def last_checkpoint(work: Path) -> Path | None:
    """The folder of the last checkpoint in `work`, or None.

    Raises:
        ExportError: no training of ours was begun there.
    """
    _read_session(work)
    steps = _steps(work)
    return work / f"checkpoint-{max(steps)}" if steps else None


def refuse_other(work: Path, asked: Session) -> list[str]:
    """Refuse to go on with other options or files than the training in `work` was begun with.

    Returns:
        What is another version, of ours or of a library: it goes on, but not to the bit.

    Raises:
        ExportError: there are some; each is named.
    """
    begun = _read_session(work)
    found = []
    for name in asked.options:
        before, now = begun.options.get(name), asked.options[name]
        if before != now:
            found.append(f"{option_name(name)} {_shown(before)} (now {_shown(now)})")
    # A version before had hashes of the files alone.
    of_files_alone = PARTS[0] not in begun.hashes
    hashes = {name: of for name, of in asked.hashes.items() if not (of_files_alone and name in PARTS)}
    if [*begun.hashes.values()] != [*hashes.values()]:
        known = set(begun.hashes.values())
        changed = [name for name, sha256 in hashes.items() if sha256 not in known]
        found.append(f"other contents of {', '.join(changed)}" if changed else "other files, or in another order")
    if begun.processes != asked.processes:
        found.append(f"{begun.processes} processes (now {asked.processes})")
    if found:
        raise ExportError(
            f"{work}: the training there was begun with {'; '.join(found)}. Give the same again to go on with it, or "
            "remove that folder to begin anew."
        )
    versions = asked.versions.items()
    return [
        *(["an earlier version, which kept no hash of its rows as tokens"] if of_files_alone else []),
        *(
            f"{name} {begun.versions.get(name)} (now {now})"
            for name, now in versions
            if begun.versions.get(name) != now
        ),
    ]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ExportError: it is damaged, or not one of ours.
    """
    from safetensors.torch import load_file

    advice = f"Remove {folder.name}, and the training begins anew."
    match = _CHECKPOINT.fullmatch(folder.name)
    assert match is not None
    try:
        hashes = read_json(folder / _HASHES_NAME, advice, folder.parent)
        for name in _HASHED:
            if sha256_of(folder / name, folder.parent) != hashes.get(name):
                raise ExportError(f"{folder / name}: is not as it was written. {advice}")
        state = read_record(folder / _STATE_NAME, State, advice, folder.parent)
        trainer = read_json(folder / TRAINER_STATE_NAME, advice, folder.parent)
        tensors = load_file(folder / _TENSORS_NAME)
    except FileNotFoundError as error:
        raise ExportError(f"{error.filename}: is missing. {advice}") from None
    except ExportError:
        raise
    except Exception as error:  # safetensors raises many kinds
        raise ExportError(f"{folder / _TENSORS_NAME}: cannot be read ({error}). {advice}") from None
    if trainer.get("global_step") != int(match[1]):
        raise ExportError(f"{folder / TRAINER_STATE_NAME}: is of another step. {advice}")
    return Checkpoint(folder, int(match[1]), tensors, state)


def write_checkpoint(
    work: Path, step: int, tensors: Mapping[str, Any], state: State, trainer: Mapping[str, Any]
) -> None:
    """Write a checkpoint whole, then remove those before it.

    Raises:
        ExportError: it cannot be written; those before it are left.
    """
    from safetensors.torch import save_file

    place = work / f"checkpoint-{step}"
    with goes_on(work), scratch_folder(place) as staging:
        with saving(place / _TENSORS_NAME):
            save_file(dict(tensors), staging / _TENSORS_NAME)
        (staging / _STATE_NAME).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
        (staging / TRAINER_STATE_NAME).write_text(json.dumps(trainer) + "\n", encoding="utf-8")
        hashes = {name: sha256_of(staging / name) for name in _HASHED}
        (staging / _HASHES_NAME).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        sync(staging)
        with interrupt.held():
            _remove_checkpoint(place)
            os.rename(staging, place)
            sync_names(work)
    for path in work.iterdir():
        if path != place and _CHECKPOINT.fullmatch(path.name):
            _remove_checkpoint(path)


def finish(work: Path) -> None:
    """Remove what a training that is done leaves behind; what is not ours stays."""
    with interrupt.held():
        settle(work)
        for path in work.iterdir():
            if _CHECKPOINT.fullmatch(path.name):
                _remove_checkpoint(path)
        (work / SESSION_NAME).unlink(missing_ok=True)
        with suppress(OSError):
            work.rmdir()


def _steps(work: Path) -> list[int]:
    return [int(match[1]) for path in work.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]


def _remove_checkpoint(folder: Path) -> None:
    """What is in there and not of a checkpoint is somebody else's, and stays."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= _NAMES:
        remove_whole(folder)


def _read_session(work: Path) -> Session:
    advice = f"Remove {work}, and train again."
    try:
        return read_record(work / SESSION_NAME, Session, advice, work, newest=_FORMAT)
    except FileNotFoundError:
        raise ExportError(
            f"{work}: is there, and no training of this tool is in it. Move it elsewhere, or choose another -o."
        ) from None


def _shown(value: Any) -> str:
    return "not given" if value is None else f"{value}"[:80]
