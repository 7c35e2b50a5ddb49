"""A model's weights come to lie in large pages, and nothing that would take much more memory for it does."""

from __future__ import annotations

import mmap
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

sys.path.append(str(Path(__file__).parent))
from systems import HAS_LARGE_PAGES, LARGE_PAGES, write_areas

from teamlora_export.deploy import session
from teamlora_export.deploy.pages import full_areas, use_large_pages

_MB = 1 << 20
needs_large_pages = pytest.mark.skipif(not HAS_LARGE_PAGES, reason="this system has no large pages")


def megabytes(name: str) -> int:
    """Of this process's memory: in large pages ("AnonHugePages"), or in any ("Rss")."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.fixture
def written() -> Iterator[mmap.mmap]:
    """64 MB in small pages."""
    with mmap.mmap(-1, 64 * _MB, flags=mmap.MAP_PRIVATE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(b"a" * len(memory))
        yield memory


def test_areas_that_are_in_use_are_taken_and_no_others(tmp_path):
    assert list(full_areas(tmp_path)) == []
    expected = write_areas(tmp_path)
    assert list(full_areas(tmp_path)) == expected


@needs_large_pages
def test_what_is_in_use_comes_to_lie_in_large_pages_and_takes_no_more_memory(written):
    with mmap.mmap(-1, 256 * _MB, flags=mmap.MAP_PRIVATE) as sparse:
        sparse.madvise(mmap.MADV_NOHUGEPAGE)
        for place in range(0, len(sparse), _MB):
            sparse[place] = 1
        large, all_memory = megabytes("AnonHugePages"), megabytes("Rss")
        use_large_pages()
        assert megabytes("AnonHugePages") - large >= 60
        assert megabytes("Rss") - all_memory <= 32
    assert written[:] == b"a" * len(written)


@needs_large_pages
def test_nothing_is_done_where_they_are_turned_off(written, tmp_path):
    settings = tmp_path / "sys/kernel/mm/transparent_hugepage"
    settings.mkdir(parents=True)
    shutil.copyfile(LARGE_PAGES / "hpage_pmd_size", settings / "hpage_pmd_size")
    (tmp_path / "proc").symlink_to("/proc")
    before = megabytes("AnonHugePages")
    use_large_pages(tmp_path)
    (settings / "enabled").write_text("always madvise [never]\n")
    use_large_pages(tmp_path)
    assert megabytes("AnonHugePages") <= before
    (settings / "enabled").write_text("always [madvise] never\n")
    use_large_pages(tmp_path)
    assert megabytes("AnonHugePages") - before >= 60


def test_a_model_that_is_opened_asks_for_them(make_bundle, monkeypatch):
    asked = Event()
    monkeypatch.setattr(session, "use_large_pages", asked.set)
    session.Session(make_bundle("llama").folder)
    assert asked.wait(60)
