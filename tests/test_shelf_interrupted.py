"""Edits of a shelf that are killed, fail, or meet others and exports: each is done whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
import threading

import pytest
from shelves import SHELF, names

from teamlora_export import shelf as shelf_module
from teamlora_export.bundle import check_files, listed_files, read_bundle
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.shelf import add_adapter
from teamlora_export.staging import entries, held_file

pytest_plugins = ["shelf_fixtures"]

_KILLED_AT_EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
from teamlora_export.bundle import check_files, read_bundle
from teamlora_export.origin import model_name, require_base
from teamlora_export.progress import Reporter
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter, slot_sizes
from teamlora_export.staging import entries, held_file

source, root, lora, small = map(Path, sys.argv[1:])
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "fcntl.flock")
EDITS = {
    "add": lambda folder: add_adapter(folder, "late", lora),
    "replace": lambda folder: replace_adapter(folder, "team", small),
    "remove": lambda folder: remove_adapter(folder, "moe"),
}

def shelf(folder):
    bundle = read_bundle(folder)
    check_files(bundle)
    return {name: adapter["sha256"] for name, adapter in bundle.manifest.shelf["adapters"].items()}

def end_at(number):
    left = number
    def watch(event, arguments):
        nonlocal left
        # What is read of the adapter, and what Python imports, changes nothing.
        if event in OPERATIONS and root.name in str(arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

for name, edit in EDITS.items():
    old, done = shelf(source), shutil.copytree(source, root / f"{name}-done")
    edit(done)
    new, number, code = shelf(done), 0, None
    assert new != old
    while code != 0:
        number += 1
        folder = shutil.copytree(source, root / f"{name}{number}")
        pid = os.fork()
        if pid == 0:
            end_at(number)
            edit(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        found = shelf(folder)
        assert found in (old, new), (name, number)
        # The next edit leaves nothing behind of the one that was killed.
        add_adapter(folder, "next", lora)
        assert shelf(folder).keys() == {*found, "next"}
        files = set(entries(folder)) - {"manifest.json"}
        assert files == set(read_bundle(folder).manifest.sha256), (name, number, files)
        shutil.rmtree(folder)
    assert number > 8, number
    print(name, number)
"""


def test_an_edit_that_is_killed_at_any_moment_leaves_the_old_shelf_or_the_new(bundle, shelf_adapters, tmp_path):
    root = tmp_path / "killed-runs"
    root.mkdir()
    given = [bundle.folder, root, shelf_adapters["lora"], shelf_adapters["small"]]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT_EVERY_OPERATION, *map(str, given)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_edits_at_once_lose_none(bundle, shelf_adapters):
    threads = [
        threading.Thread(target=add_adapter, args=(bundle.folder, f"new{i}", shelf_adapters["lora"])) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(names(bundle.folder)) == {*SHELF, *(f"new{i}" for i in range(6))}
    check_files(read_bundle(bundle.folder))


def export_meanwhile(bundle, base, adapters, monkeypatch, wait: bool):  # type: ignore[no-untyped-def]
    """While an edit has written its adapter's file and not the list: somebody exports into the same folder."""
    thread = threading.Thread(
        target=export_onnx, args=(base, {"lora": adapters["lora"]}, bundle.folder), kwargs={"dtype": "fp16"}
    )
    place = shelf_module.shelve

    def place_while_exported(*given):  # type: ignore[no-untyped-def]
        placed = place(*given)
        thread.start()
        thread.join(None if wait else 3)
        return placed

    monkeypatch.setattr(shelf_module, "shelve", place_while_exported)
    return thread


def test_an_export_waits_for_an_edit_of_what_it_replaces(bundle, make_base, shelf_adapters, make_shelf, monkeypatch):
    base = make_base("llama").name
    thread = export_meanwhile(bundle, base, shelf_adapters, monkeypatch, wait=False)
    added = add_adapter(bundle.folder, "late", shelf_adapters["moe"])
    assert "late" in added.manifest.shelf["adapters"]
    thread.join()
    found = read_bundle(bundle.folder)
    check_files(found)
    assert (found.manifest.dtype, names(bundle.folder)) == ("fp16", ["lora"])
    assert set(entries(bundle.folder)) == {"manifest.json", *found.manifest.sha256}


def test_where_nothing_can_be_locked_an_edit_of_what_was_replaced_is_refused(
    bundle, make_base, shelf_adapters, monkeypatch
):
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    base = make_base("llama").name
    export_meanwhile(bundle, base, shelf_adapters, monkeypatch, wait=True)
    with pytest.raises(ExportError, match="was exported anew meanwhile"):
        add_adapter(bundle.folder, "late", shelf_adapters["moe"])
    check_files(read_bundle(bundle.folder))


def test_an_edit_that_waited_for_an_export_is_of_what_is_there_then(bundle, make_base, shelf_adapters):
    """The lock was on a file that another has replaced."""
    base, order = make_base("llama").name, []

    def edit() -> None:
        try:
            add_adapter(bundle.folder, "late", shelf_adapters["lora"])
        except ExportError as error:
            order.append(str(error))

    thread = threading.Thread(target=edit)
    with held_file(bundle.model):
        thread.start()
        thread.join(1)
        other = export_onnx(base, {"small": shelf_adapters["small"]}, bundle.folder.with_name("other"))
        bundle.folder.rename(bundle.folder.with_name("old"))
        other.folder.rename(bundle.folder)
    thread.join()
    check_files(read_bundle(bundle.folder))
    assert len(order) == 1 and "was exported anew meanwhile" in order[0]


def test_an_edit_whose_list_cannot_be_written_leaves_nothing(bundle, shelf_adapters, monkeypatch):
    before = sorted(entries(bundle.folder))

    def full(*_: object) -> None:
        raise ExportError("No space left on device; nothing was written.")

    monkeypatch.setattr(shelf_module, "write_manifest", full)
    with pytest.raises(ExportError, match="nothing was written"):
        add_adapter(bundle.folder, "late", shelf_adapters["moe"])
    assert sorted(entries(bundle.folder)) == before


def test_what_a_killed_edit_left_is_ours_and_nothing_else_is(bundle, make_base, shelf_adapters):
    """An export over the bundle replaces it."""
    left = bundle.folder / "adapters" / f"late.{'0' * 16}.safetensors"
    left.write_bytes(b"half")
    assert "adapters/" + left.name in listed_files(bundle.folder)
    again = export_onnx(make_base("llama").name, {"lora": shelf_adapters["lora"]}, bundle.folder)
    assert names(again.folder) == ["lora"]
    assert not left.exists()
    (again.folder / "adapters" / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"mine.safetensors: is not a file that teamlora-export wrote"):
        export_onnx(make_base("llama").name, {"lora": shelf_adapters["lora"]}, bundle.folder)
