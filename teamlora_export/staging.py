"""Writes everything that takes a place on disk: aside first, then into its place in one step, whole.

    .NAME.TOKEN.teamlora-partial    being written: a folder or a file, beside its place; locked by its process
    .NAME.TOKEN.teamlora-ready      written: a folder of files that belong together and are about to be moved out of it
    .NAME.TOKEN.teamlora-old        what was in the place, for a moment, where two names cannot be exchanged

A process that is killed leaves these behind. Whoever stages something in a folder first sweeps it: what is partial
goes, what is ready takes its place, what is old comes back where its place is empty. So there is always the old or the
new. A process holds a lock (`flock`) on what it writes, and one on the parent folder while it changes names there:
nobody sweeps what is at work, and of two runs with one destination the last one stands, whole. Where a file system has
no locks, what nobody has touched for a day is taken to be left behind.

Before something takes its place it is on the disk, should the power fail. Of an export that is some 2 % of its time:
weights are written past the page cache.

Only what we wrote ourselves is replaced. Who stages a folder says which files of an existing one are ours; anything
else in it is a refusal that names it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

from teamlora_export import interrupt
from teamlora_export.disk import FULL, is_mounted, size_text, sync, sync_names
from teamlora_export.errors import ExportError

_PARTIAL, _READY, _OLD = "teamlora-partial", "teamlora-ready", "teamlora-old"
_STAGED = re.compile(rf"^\.(?P<name>.+)\.[0-9a-f]{{8}}\.(?P<state>{_PARTIAL}|{_READY}|{_OLD})$", re.DOTALL)
# What `flock` says of a file that somebody holds; anything else it says of a file system without locks.
_HELD = (errno.EAGAIN, errno.EACCES, errno.EINTR)
_LEFT_BEHIND_SECONDS = 24 * 3600
Listing = Callable[[Path], Collection[str]]
Held = Callable[[Path], Path]
Content = str | bytes | memoryview


@contextmanager
def staged(out: Path, listed: Listing, inputs: Sequence[Path] = (), held: Held | None = None) -> Iterator[Path]:
    """A folder beside `out` to write into; it becomes `out` when the block ends, and vanishes when it fails.

    Args:
        listed: names the files of an existing folder that we wrote, relative to it; raises `ExportError` where the
            folder is none of ours. An empty folder is not asked about.
        inputs: files and folders that are read while the folder is written.
        held: in a folder that is there, the file that `held_file` locks for those who change it.

    Raises:
        ExportError: `out` is not a folder of ours, holds something else or an input, or cannot be written.
    """
    place = real_path(out)
    refuse_foreign(place, listed, inputs)
    with scratch_folder(place) as staging:
        yield staging
        sync(staging)
        with _alone(place, held):
            # Again: an export takes time, and its owner may have put something there.
            _refuse_foreign(place, listed, inputs)
            with interrupt.held():
                _replace_folder(staging, place)
                sync_names(place.parent)
                _note_written(out, place)


@contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """A folder beside `place` to write into, gone when the block ends.

    Parents that had to be made for it go again where the block fails.

    Raises:
        ExportError: it cannot be written, or the disk is full.
    """
    staging = _staging_path(place, _PARTIAL)
    with _explained(place), existing(place.parent), ExitStack() as locks:
        try:
            with locked(place.parent):
                _sweep(place.parent)
                staging.mkdir()
                locks.enter_context(_lock(staging))
            yield staging
        finally:
            with interrupt.held():
                shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def held_file(path: Path) -> Iterator[Callable[[], bool]]:
    """Alone, inside of the block, with the folder that a file is in, among those who change it or replace it whole
    (`staged`); the system lets go of it where the process is killed.

    Yields:
        Whether another file is at its path by now, or none: a file system without locks does without.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        # NFS gives such a lock only to those who may write.
        with _lock(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY) as descriptor:
            # Its folder may have been replaced while another had it.
            if _is_at(descriptor, path):
                yield lambda: not _is_at(descriptor, path)
                return


@contextmanager
def _alone(place: Path, held: Held | None) -> Iterator[None]:
    """Alone with the names beside `place` inside of the block, and with what is there, as `held_file`."""
    while True:
        with ExitStack() as locks:
            # Another may come into the place, or go, before its neighbours' names are held.
            has_changed: Callable[[], bool] = bool
            if held is not None:
                try:
                    # First: who has it may want the names.
                    has_changed = locks.enter_context(held_file(held(place)))
                except FileNotFoundError:
                    has_changed = partial(_is_there, held, place)
                except OSError:
                    # As on a file system without locks.
                    pass
            with locked(place.parent):
                if not has_changed():
                    yield
                    return


def _is_there(held: Held, place: Path) -> bool:
    return held(place).exists()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def write_aside(path: Path, content: Content, *, result: bool = True) -> None:
    """Write a file beside `path`, then move it there: the file is the old one or the new one, never half of one.

    Args:
        result: it is what a command was asked for; an interruption that comes later says that it is there.

    Raises:
        ExportError: it cannot be written, or the disk is full.
    """
    staging = _staging_path(path, _PARTIAL)
    with _explained(path), existing(path.parent), ExitStack() as files:
        try:
            with locked(path.parent):
                _sweep(path.parent)
                file = files.enter_context(staging.open("xb"))
                _wait_for_lock(file.fileno())
            file.write(_bytes(content))
            file.flush()
            if result:
                sync(staging)
            with interrupt.held():
                os.replace(staging, path)
                if result:
                    sync_names(path.parent)
                    _note_written(path, path)
        finally:
            with interrupt.held():
                staging.unlink(missing_ok=True)


def write_together(files: Mapping[Path, Content]) -> None:
    """Write files of one folder that belong together: all are old, or all are new, for everyone who calls `settle`.

    Raises:
        ExportError: they cannot be written, or the disk is full.
    """
    first, *_ = files
    with scratch_folder(first) as staging:
        for path, content in files.items():
            (staging / path.name).write_bytes(_bytes(content))
        sync(staging)
        with locked(first.parent), interrupt.held():
            ready = staging.with_name(staging.name.replace(_PARTIAL, _READY))
            os.rename(staging, ready)
            _move_out(ready)
            sync_names(first.parent)
            for path in files:
                _note_written(path, path)


def remove_whole(folder: Path) -> None:
    """Remove a folder in one step: what is killed while its files go leaves none with a part of them in its place."""
    gone = _staging_path(folder, _PARTIAL)
    with suppress(OSError):
        os.rename(folder, gone)
        _rmtree(gone)


@contextmanager
def existing(folder: Path) -> Iterator[None]:
    """`folder` exists inside of the block; what had to be made for it goes away again where the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


def settle(folder: Path) -> None:
    """Finish or remove what killed runs left in `folder`, so that what is read there is whole."""
    try:
        if any(map(_STAGED.match, os.listdir(folder))):
            with locked(folder):
                _sweep(folder)
    except OSError:
        # Nothing there, or nothing that may be changed: the reader says what is missing.
        return


def real_path(path: Path) -> Path:
    """Where `path` leads, resolved once: links and `..` cannot mean something else later.

    Raises:
        ExportError: its links lead in a circle.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise ExportError(f"{path}: leads nowhere ({error}). Choose another folder.") from None


def refuse_inside(place: Path, folder: Path) -> None:
    """Refuse to write `place` into a folder whose files are all listed.

    Raises:
        ExportError: it is in there.
    """
    if place.is_relative_to(real_path(folder)):
        raise ExportError(f"{place}: is in {folder}, which is read. Choose another -o.")


def refuse_foreign(place: Path, listed: Listing, inputs: Sequence[Path] = ()) -> None:
    """Refuse to replace anything but a folder with nothing in it but files that we wrote, or an empty one.

    Raises:
        ExportError: with the name of what is there.
    """
    with ExitStack() as locks:
        # Nobody exchanges the folder while it is read. A parent that is not there has nothing to lock.
        with suppress(OSError):
            locks.enter_context(locked(place.parent))
        _refuse_foreign(place, listed, inputs)


def _refuse_foreign(place: Path, listed: Listing, inputs: Sequence[Path]) -> None:
    """As `refuse_foreign`, with the parent locked."""
    settle(place)
    for given in inputs:
        read = real_path(given)
        if read.is_relative_to(place):
            raise ExportError(f"{place}: is, or holds, {given}, which is read. Choose another -o.")
    try:
        if not os.path.lexists(place):
            # As long as the name that is written first.
            with suppress(FileNotFoundError):
                os.lstat(_staging_path(place, _PARTIAL))
            return
        if not place.is_dir():
            raise ExportError(f"{place}: exists and is not a folder. Choose another -o.")
        if is_mounted(place):
            raise ExportError(f"{place}: is where a disk is mounted, and cannot be replaced. Choose a folder in it.")
        if not any(place.iterdir()):
            return
        ours = listed(place)
        for found in entries(place):
            if found not in ours:
                raise ExportError(
                    f"{place / found}: is not a file that teamlora-export wrote, and would be lost. "
                    "Move it elsewhere, or choose another -o."
                )
    except OSError as error:
        raise ExportError(
            f"{_shown(error.filename) or place}: cannot be used ({error.strerror}). Choose another -o."
        ) from None


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes where they do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{_shown(folder)}: {size_text(needed)} are needed, {size_text(free)} are free. Free space, or choose "
            "another place."
        )


def entries(folder: Path) -> Iterator[str]:
    """Everything below `folder` that is no folder with something in it, relative to it; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            yield (here / name).relative_to(folder).as_posix()
        if not folders and not files and here != folder:
            yield here.relative_to(folder).as_posix()


def _note_written(given: Path, place: Path) -> None:
    """An interruption that comes later says that `given` is there; a part of what is being written is not yet."""
    if not any(map(_STAGED.match, place.parent.parts)):
        interrupt.note_written(given)


def _replace_folder(staging: Path, place: Path) -> None:
    """`staging` becomes `place`; what was there is in `staging` afterwards, or gone."""
    if _exchange(staging, place):
        return
    old = staging.with_name(staging.name.replace(_PARTIAL, _OLD))
    if place.exists():
        os.rename(place, old)
    try:
        os.rename(staging, place)
    except BaseException:
        if old.exists() and not place.exists():
            os.rename(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot, or there is nothing to exchange with."""
    sys.audit("os.rename", str(one), str(other), -1, -1)
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _move_out(ready: Path) -> None:
    for path in sorted(ready.iterdir()):
        os.replace(path, ready.parent / path.name)
    ready.rmdir()


def _sweep(folder: Path) -> None:
    """Finish or remove what killed runs left in `folder`, which is locked."""
    for name in os.listdir(folder):
        match = _STAGED.match(name)
        path = folder / name
        if match is None or not _is_abandoned(path):
            continue
        with suppress(OSError):
            _finish(path, folder / match["name"], match["state"])


def _finish(path: Path, place: Path, state: str) -> None:
    if state == _READY:
        _move_out(path)
    elif state == _OLD and not os.path.lexists(place):
        os.rename(path, place)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rmtree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody writes it any more; what cannot be told from the outside is taken to be at work."""
    try:
        if not stat.S_ISDIR(kind := path.lstat().st_mode) and not stat.S_ISREG(kind):
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD and _idle_seconds(path) > _LEFT_BEHIND_SECONDS
    finally:
        os.close(descriptor)
    return True


def _idle_seconds(path: Path) -> float:
    """Since anything in `path` was last written or renamed; none where that cannot be seen."""
    try:
        return time.time() - max(found.lstat().st_ctime for found in (path, *path.rglob("*")))
    except OSError:
        return 0.0


def _staging_path(place: Path, state: str) -> Path:
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}.{state}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone with the names in `folder` inside of the block."""
    # What is being written is its writer's alone.
    with nullcontext() if _STAGED.match(folder.name) else _lock(folder):
        yield


@contextmanager
def _lock(path: Path, mode: int = os.O_RDONLY) -> Iterator[int]:
    """Hold `path` inside of the block; the system lets go of it where the process is killed.

    Yields:
        Its descriptor.
    """
    descriptor = os.open(path, mode | os.O_NONBLOCK)
    try:
        _wait_for_lock(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int) -> None:
    """A file system that has no locks does without."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    """What the system refuses, in one sentence that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ExportError(
                f"{place}: {error.strerror}; nothing was written. Free space, or choose another place."
            ) from None
        raise ExportError(
            f"{_shown(error.filename) or place}: {error.strerror or error}; nothing was written."
        ) from None


def _shown(path: str | bytes | Path | None) -> str:
    """A path as its owner knows it: of what is being written, the place that it will take."""
    if path is None:
        return ""
    staged_names = ((part, _STAGED.match(part)) for part in Path(os.fsdecode(path)).parts)
    return str(Path(*(match["name"] if match else part for part, match in staged_names)))


def _bytes(content: Content) -> bytes | memoryview:
    return content.encode(errors="replace") if isinstance(content, str) else content
