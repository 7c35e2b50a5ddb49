"""A model's weights come to lie in large pages, and nothing that would take much more memory for it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest

sys.path.append(str(Path(__file__).parent))
from systems import write_areas

from teamlora_export.deploy import session
from teamlora_export.deploy.cores import system_text
from teamlora_export.deploy.pages import full_areas, has_large_pages

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Of a process that has written 64 MB, a megabyte here and there of 256, and has 64 MB of its parent's: megabytes in
# large pages and in any, before it asks for large ones, after it does on a system where they are off, and here.
_PROGRAM = """
import mmap, os, sys
from pathlib import Path
from teamlora_export.deploy.pages import use_large_pages

def told():
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    sizes = {name: int(size) // 1024 for name, size, _ in lines}
    print(sizes["AnonHugePages:"], sizes["Rss:"], flush=True)

def memory(megabytes):
    return mmap.mmap(-1, megabytes << 20, flags=mmap.MAP_PRIVATE)

inherited = memory(64)
inherited.write(b"a" * len(inherited))
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
written, sparse = memory(64), memory(256)
for place in range(0, len(written), 8):
    written[place:place + 8] = place.to_bytes(8, "little")
for place in range(0, len(sparse), 8 << 20):
    sparse[place] = 1
told()
use_large_pages(Path(sys.argv[1]))
told()
use_large_pages()
told()
assert all(written[place:place + 8] == place.to_bytes(8, "little") for place in range(0, len(written), 8))
"""


def test_areas_that_are_in_use_are_taken_and_no_others(tmp_path):
    expected = write_areas(tmp_path)
    assert list(full_areas(tmp_path)) == expected
    (tmp_path / "sys/kernel/mm/transparent_hugepage/hpage_pmd_size").unlink()
    assert list(full_areas(tmp_path)) == []


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_the_systems_owner_may_turn_them_off(setting, tmp_path):
    if setting is not None:
        write_areas(tmp_path, setting)
    assert not has_large_pages(tmp_path)


@pytest.mark.skipif(not has_large_pages(), reason="this system gives no large pages")
def test_what_is_in_use_comes_to_lie_in_large_pages_and_takes_hardly_more_memory(tmp_path):
    settings = tmp_path / _SETTINGS.relative_to("/")
    settings.mkdir(parents=True)
    (settings / "enabled").write_text("always madvise [never]\n")
    (settings / "hpage_pmd_size").write_text(system_text(_SETTINGS / "hpage_pmd_size"))
    (tmp_path / "proc").symlink_to("/proc")
    program = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, resident, off, _, large, after = (int(size) for size in done.stdout.split())
    assert off == before
    assert large >= 48
    assert after - resident <= 16


def test_a_model_that_is_opened_asks_for_them(make_bundle, monkeypatch):
    asked = Event()
    monkeypatch.setattr(session, "use_large_pages", asked.set)
    session.Session(make_bundle("llama").folder)
    assert asked.wait(60)


def test_a_model_opens_where_no_thread_is_left(make_bundle, monkeypatch):
    class NoThread:
        def __init__(self, **_):
            pass

        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(session, "Thread", NoThread)
    session.Session(make_bundle("llama").folder)
