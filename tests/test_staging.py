"""Everything that is replaced is old or new, whole, whenever its run ends; and only what we wrote is replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest

from teamlora_export import staging
from teamlora_export.disk import size_text
from teamlora_export.errors import ExportError
from teamlora_export.staging import (
    refuse_foreign,
    refuse_inside,
    require_space,
    settle,
    staged,
    write_aside,
    write_together,
)


def listed(folder: Path) -> set[str]:
    """As a manifest does: the folder's own list."""
    try:
        return set(json.loads((folder / "list.json").read_text()))
    except FileNotFoundError:
        raise ExportError(f"{folder}: is none of ours") from None


def fill(folder: Path, text: str) -> None:
    (folder / "deep").mkdir()
    for name in ("one.txt", "deep/two.txt"):
        (folder / name).write_text(text)
    write_aside(folder / "list.json", json.dumps(["list.json", "one.txt", "deep/two.txt"]))


def write(out: Path, text: str) -> None:
    with staged(out, listed) as folder:
        fill(folder, text)


def contents(out: Path) -> set[str]:
    return {(out / name).read_text() for name in ("one.txt", "deep/two.txt")}


# Runs in a process of its own, which forks: one child for each file operation of a run, and one of the two happens to
# it there. What a child leaves is judged by the parent: old or new, whole; then the next run leaves nothing else.
_AT_EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[3])
import test_staging as tests
from teamlora_export import interrupt, staging

root, ending = Path(sys.argv[1]), sys.argv[2]
if ending.startswith("stepwise"):
    staging._exchange = lambda one, other: False
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock", "os.listdir")


def end_at(number):
    left = number

    def watch(event, arguments):
        nonlocal left
        if event not in OPERATIONS:
            return
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL if "kill" in ending else signal.SIGTERM)

    sys.addaudithook(watch)


def child(number, run, place):
    with interrupt.reported():
        end_at(number)
        run(place, "new")
    os._exit(0)


number = 0
for case in (tests.Folder, tests.File, tests.Pair):
    number, done = 0, False
    while not done:
        number += 1
        place = root / f"{case.__name__}{number}" / "out"
        place.parent.mkdir()
        case.run(place, "old")
        pid = os.fork()
        if pid == 0:
            child(number, case.run, place)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        done = code == 0
        if "kill" not in ending:
            assert case.read(place) in ({"old"}, {"new"}), (case, number, case.read(place))
            left = sorted(path.name for path in place.parent.iterdir())
            assert left == case.names, (case, number, left)
        else:
            assert code in (0, -signal.SIGKILL), code
        unsettled = Path(shutil.copytree(place.parent, place.parent.with_name(f"{place.parent.name} unsettled")))
        staging.settle(place.parent)
        assert case.read(place) in ({"old"}, {"new"}), (case, number, case.read(place))
        for parent in (place.parent, unsettled):
            case.run(parent / "out", "next")
            assert case.read(parent / "out") == {"next"}, (case, number)
            left = sorted(path.name for path in parent.iterdir())
            assert left == case.names, (case, number, left)
    assert number > 5, number
    print(case.__name__, number)
"""


class Folder:
    """A folder that is replaced."""

    names: ClassVar = ["out"]
    run, read = staticmethod(write), staticmethod(contents)


class File:
    """A file that is replaced."""

    names: ClassVar = ["out"]

    @staticmethod
    def run(place: Path, text: str) -> None:
        write_aside(place, text)

    @staticmethod
    def read(place: Path) -> set[str]:
        return {place.read_text()}


class Pair:
    """Two files that are replaced together."""

    names: ClassVar = ["out", "out.json"]

    @staticmethod
    def run(place: Path, text: str) -> None:
        write_together({place: text, place.with_name("out.json"): text})

    @staticmethod
    def read(place: Path) -> set[str]:
        return {place.read_text(), place.with_name("out.json").read_text()}


@pytest.mark.parametrize("ending", ["killed", "interrupted", "stepwise, killed", "stepwise, interrupted"])
def test_a_run_that_ends_at_any_file_operation_leaves_the_old_or_the_new(ending, tmp_path):
    command = [sys.executable, "-c", _AT_EVERY_OPERATION, str(tmp_path), ending, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_was_staged_appears_whole_and_replaces_the_old(tmp_path):
    for text in ("first", "second"):
        write(tmp_path / "out", text)
    assert contents(tmp_path / "out") == {"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_who_has_opened_the_old_file_reads_it_to_its_end(tmp_path):
    file, pair = tmp_path / "file", {tmp_path / name: "first" for name in ("one", "two")}
    write_aside(file, "first")
    write_together(pair)
    opened = [path.open() for path in (file, *pair)]
    write_aside(file, "second")
    write_together(dict.fromkeys(pair, "second"))
    assert [path.read_text() for path in (file, *pair)] == ["second"] * 3
    for old in opened:
        with old:
            assert old.read() == "first"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_folder_and_nothing_else(error, tmp_path):
    write(tmp_path / "out", "first")

    def fail(out: Path) -> None:
        with staged(out, listed) as folder:
            fill(folder, "second")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "out")
    with pytest.raises(error):
        fail(tmp_path / "deep" / "er" / "out")
    assert contents(tmp_path / "out") == {"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "first")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == out and source.name.endswith("partial"):
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(ExportError, match=r"/out: Input/output error; nothing was written"):
        write(out, "second")
    assert contents(out) == {"first"}
    assert list(tmp_path.iterdir()) == [out]


def test_what_we_did_not_write_is_named_and_stays(tmp_path):
    out = tmp_path / "out"

    def refused(name: str) -> None:
        with pytest.raises(ExportError, match=f"{name}: is not a file that teamlora-export wrote"):
            write(out, "second")
        assert contents(out) == {"first"}

    write(out, "first")
    (out / "notes.txt").write_text("mine")
    refused("notes.txt")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    (out / "deep" / "empty").mkdir()
    refused("empty")
    (out / "deep" / "empty").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (out / "link").symlink_to(tmp_path / "elsewhere")
    refused("link")
    (out / "link").unlink()


def test_a_note_that_comes_while_the_folder_is_written_is_seen_too(tmp_path):
    out = tmp_path / "out"
    write(out, "first")

    def write_beside_its_owner() -> None:
        with staged(out, listed) as folder:
            fill(folder, "second")
            (out / "late.txt").write_text("mine")

    with pytest.raises(ExportError, match=r"late\.txt"):
        write_beside_its_owner()
    assert contents(out) == {"first"}
    assert (out / "late.txt").read_text() == "mine"


def test_a_folder_or_a_file_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ExportError, match="is none of ours"):
        write(tmp_path, "second")
    with pytest.raises(ExportError, match="exists and is not a folder"):
        write(tmp_path / "thesis.txt", "second")
    assert (tmp_path / "thesis.txt").read_text() == "do not touch"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "first")
    assert contents(tmp_path / "empty") == {"first"}


def test_where_a_disk_is_mounted_is_refused_before_anything_is_written():
    with pytest.raises(ExportError, match="Choose a folder in it"):
        refuse_foreign(Path("/proc"), listed)


def test_a_folder_of_the_same_disk_that_is_mounted_is_refused_too(tmp_path):
    """As containers have them: it looks like any folder, and cannot be renamed."""
    (tmp_path / "from").mkdir()
    place = tmp_path / "a place"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "--bind", tmp_path / "from", place], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        assert not os.path.ismount(place)
        with pytest.raises(ExportError, match="Choose a folder in it"):
            refuse_foreign(place, listed)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_that_is_too_long_is_refused_at_the_start_as_its_owner_gave_it(length, tmp_path):
    place = tmp_path / ("x" * length)
    with pytest.raises(ExportError, match=r"/x+: cannot be used \(File name too long\)"):
        refuse_foreign(place, listed)
    with pytest.raises(ExportError, match=r"/x+: File name too long; nothing was written"):
        write_aside(place, "first")


def test_neither_of_an_input_and_what_is_replaced_is_in_the_other(tmp_path):
    out = tmp_path / "out"
    write(out, "first")
    (tmp_path / "link").symlink_to(out / "deep")
    for given in (out, out / "one.txt", tmp_path / "link", out / ".." / "out"):
        with pytest.raises(ExportError, match="which is read"), staged(out, listed, [tmp_path / "x", given]):
            pass
    for place in (out / "deep" / "new", tmp_path / "link" / "new"):
        with pytest.raises(ExportError, match=r"is in .*, which is read"):
            refuse_inside(staging.real_path(place), out)
    assert contents(out) == {"first"}


def test_a_place_is_what_its_name_led_to_at_first(tmp_path, monkeypatch):
    write(tmp_path / "dd", "first")
    write(tmp_path / "dd" / ".." / "dd", "second")
    assert contents(tmp_path / "dd") == {"second"}
    (tmp_path / "link").symlink_to("dd")
    write(tmp_path / "link", "third")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "dd") == {"third"}
    monkeypatch.chdir(tmp_path / "dd")
    write(Path(), "fourth")
    assert contents(tmp_path / "dd") == {"fourth"}
    monkeypatch.chdir(tmp_path)
    with staged(Path("other"), listed) as folder:
        fill(folder, "fifth")
        os.chdir("/")
    assert contents(tmp_path / "other") == {"fifth"}
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ExportError, match="circle"):
        write(tmp_path / "circle", "sixth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "dd", "link", "other"]


def test_what_is_not_ours_or_is_at_work_is_not_swept(tmp_path):
    theirs = [".out.partial", ".out.12.partial", ".out.0123abcd.partial", ".out.xyz12345.teamlora-partial"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".out.0123abcd.teamlora-partial").symlink_to(theirs[0])
    os.mkfifo(tmp_path / ".out.0123abce.teamlora-partial")
    (tmp_path / ".out.00000000.teamlora-partial").mkdir()
    with staged(tmp_path / "other", listed) as at_work:
        write(tmp_path / "out", "first")
        assert at_work.is_dir()
        fill(at_work, "second")
    there = {path.name for path in tmp_path.iterdir()}
    links = {".out.0123abcd.teamlora-partial", ".out.0123abce.teamlora-partial"}
    assert there == {*theirs, *links, "out", "other"}


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_what_is_at_work_stays_and_what_is_a_day_old_goes(error, tmp_path, monkeypatch):
    """As on network file systems, of which some have no locks, and some none for folders."""

    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out", "first")
    with staged(tmp_path / "other", listed) as at_work:
        fill(at_work, "second")
        write(tmp_path / "out", "third")
        assert at_work.is_dir()
        os.utime(at_work, (0, 0))
        settle(tmp_path)
    left = tmp_path / ".out.0123abcd.teamlora-partial"
    left.mkdir()
    (left / "one.txt").write_text("")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    write(tmp_path / "out", "fourth")
    assert contents(tmp_path / "out") == {"fourth"}
    assert contents(tmp_path / "other") == {"second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_files_and_names_are_on_the_disk_before_they_take_their_place(tmp_path, monkeypatch):
    """Otherwise a power failure leaves an empty file under the final name."""
    happened = []
    for name in ("fsync", "replace", "rename"):
        done = getattr(os, name)

        def note(*arguments: object, name: str = name, done: Callable[..., None] = done) -> None:
            place = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[1])
            happened.append((name, os.path.basename(place)))
            done(*arguments)

        monkeypatch.setattr(os, name, note)
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    for case in (Folder, File, Pair):
        place = tmp_path / case.__name__ / "out"
        case.run(place, "first")
        synced = [name for kind, name in happened if kind == "fsync"]
        moved = happened.index(("rename" if case is Folder else "replace", "out"))
        before = {name for kind, name in happened[:moved] if kind == "fsync"}
        files = {"one.txt", "two.txt", "deep", "list.json"} if case is Folder else set()
        assert files <= before
        assert any("teamlora-partial" in name for name in before)
        assert synced[-1] == case.__name__
        happened.clear()


_RUNS_AT_ONCE = """
import sys
import time
from collections.abc import Callable
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_staging as tests
for number in range(40):
    tests.write(Path(sys.argv[1]), f"{sys.argv[3]}")
    assert len(tests.contents_again(Path(sys.argv[1]))) == 1
"""


def contents_again(out: Path) -> set[str]:
    """The contents, read until the folder did not change meanwhile."""
    while True:
        before = os.stat(out).st_ino
        try:
            found = contents(out)
        except FileNotFoundError:
            continue
        if os.stat(out).st_ino == before:
            return found


def test_of_several_runs_with_one_destination_the_last_one_stands_whole(tmp_path):
    command = [sys.executable, "-c", _RUNS_AT_ONCE, str(tmp_path / "out"), str(Path(__file__).parent)]
    running = [subprocess.Popen([*command, name], stderr=subprocess.PIPE, text=True) for name in ("a", "b", "c")]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(contents(tmp_path / "out")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nobody_exchanges_a_folder_while_it_is_looked_at(tmp_path):
    out = tmp_path / "out"
    write(out, "first")
    other = threading.Thread(target=write, args=(out, "second"))

    def listed_meanwhile(folder: Path) -> set[str]:
        other.start()
        other.join(timeout=0.3)
        assert contents(folder) == {"first"}
        return listed(folder)

    refuse_foreign(out, listed_meanwhile)
    other.join()
    assert contents(out) == {"second"}


@pytest.fixture
def no_room():
    """A file system on which no file may be larger than 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_sentence_that_names_the_file_and_leaves_the_old(tmp_path, no_room):
    write(tmp_path / "out", "first")
    write_aside(tmp_path / "file", "first")
    write_together({tmp_path / "a": "first", tmp_path / "b": "first"})
    much = "x" * 5000
    for name, attempt in (
        ("out", lambda: write(tmp_path / "out", much)),
        ("file", lambda: write_aside(tmp_path / "file", much)),
        ("a", lambda: write_together({tmp_path / "a": "second", tmp_path / "b": much})),
    ):
        with pytest.raises(ExportError, match=rf"/{name}: File too large; nothing was written\. Free space"):
            attempt()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file", "out"]
    assert contents(tmp_path / "out") == {"first"}
    assert {(tmp_path / name).read_text() for name in ("file", "a", "b")} == {"first"}


@pytest.mark.parametrize("options", ["size=16k", "ro"])
def test_a_file_system_that_is_full_or_read_only_is_one_sentence_too(options, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "x", disk], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        for attempt in (lambda: write(disk / "out", "x" * 9000), lambda: write_aside(disk / "file", "x" * 20000)):
            with pytest.raises(ExportError, match=r"/disk/\S+: (No space left|Read-only file).*; nothing"):
                attempt()
        settle(disk)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_room_is_told_in_units_that_fit(tmp_path):
    for size, text in ((999, "999 bytes"), (1000, "1 kB"), (4_700_000, "4.7 MB"), (275_000_000_000, "275 GB")):
        assert size_text(size) == text
    refusal = pytest.raises(ExportError, match=r"/out: 1,000,000,000 GB are needed, \S+ GB are free")
    with staging.scratch_folder(tmp_path / "out") as folder, refusal:
        require_space(folder, 10**18)
