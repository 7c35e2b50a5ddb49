"""A model's weights come to lie in large pages, and nothing that would take much more memory for it does."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from pathlib import Path
from threading import Event

import pytest

sys.path.append(str(Path(__file__).parent))
from systems import write_areas

from teamlora_export.deploy import pages, session
from teamlora_export.deploy.cores import system_text
from teamlora_export.deploy.pages import full_areas, has_large_pages

_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
# Of a process that has written 64 MB, a page here and there of 256 MB, and has 64 MB of its parent's: megabytes in
# large pages and in any, before it asks for large ones, after it does on a system where they are off, and here.
_PROGRAM = """
import mmap, os, sys
from pathlib import Path
from teamlora_export.deploy.pages import finish_large_pages, start_large_pages, use_large_pages

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
content = os.urandom(1 << 20)
for _ in range(64):
    written.write(content)
for place in range(0, len(sparse), 8 << 20):
    sparse[place] = 1
told()
use_large_pages(Path(sys.argv[1]))
told()
start_large_pages()
finish_large_pages()
told()
assert all(written[place << 20 : place + 1 << 20] == content for place in range(64))
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


@pytest.mark.skipif(
    not has_large_pages() or "[always]" in system_text(_SETTINGS / "enabled"),
    reason="this system gives no large pages, or gives them to everybody",
)
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
    # Not what the parent wrote; nor does what is empty take memory.
    assert 48 <= large - before <= 90
    assert after - resident <= 16


def test_a_model_that_is_opened_asks_for_them(make_bundle, monkeypatch):
    asked = Event()
    monkeypatch.setattr(session, "start_large_pages", asked.set)
    session.Session(make_bundle("llama").folder)
    assert asked.is_set()


def test_a_model_opens_where_no_thread_is_left(make_bundle, monkeypatch):
    class NoThread:
        def __init__(self, **_):
            pass

        def start(self):
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "Thread", NoThread)
    session.Session(make_bundle("llama").folder)


def test_times_are_taken_when_all_that_was_started_is_done(monkeypatch):
    done = []

    def slow() -> None:
        time.sleep(0.2)
        done.append(threading.current_thread())

    monkeypatch.setattr(pages, "use_large_pages", slow)
    pages.start_large_pages()
    pages.start_large_pages()
    pages.finish_large_pages()
    assert len(done) == 3 and done[-1] is threading.current_thread()


def test_it_leaves_off_where_the_system_has_no_more_to_give(monkeypatch, tmp_path):
    areas = write_areas(tmp_path)
    for refusal, count in ((errno.ENOMEM, 2), (errno.EBUSY, 2), (errno.EAGAIN, len(areas))):
        taken = []

        def collapse(start, size, refusal=refusal, taken=taken):
            taken.append((start, start + size))
            return refusal if len(taken) == 2 else 0

        monkeypatch.setattr(pages, "has_large_pages", lambda _: True)
        monkeypatch.setattr(pages, "_collapse", lambda collapse=collapse: collapse)
        pages.use_large_pages(tmp_path)
        assert taken == areas[:count]
