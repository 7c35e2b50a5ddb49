"""How many threads a model gets: one for each core that may be used."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from systems import SYSTEMS, write_system

from teamlora_export.deploy import session
from teamlora_export.deploy.cores import cores_of_quota, usable_cores


@pytest.mark.parametrize(
    ("siblings", "cores"),
    [({4: "4-5", 5: "4-5", 8: "8-9"}, 2), ({4: None, 5: None, 8: None}, 3), ({4: "4", 5: None, 8: "8"}, 3)],
)
def test_there_is_a_thread_for_each_core_that_may_be_used(siblings, cores, monkeypatch, tmp_path):
    """Of three processors of many; where the system does not say which share a core, each counts."""
    for processor, said in siblings.items():
        if said is not None:
            topology = tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology"
            topology.mkdir(parents=True)
            (topology / "thread_siblings_list").write_text(f"{said}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(siblings))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize("name", SYSTEMS)
def test_there_are_no_more_threads_than_the_time_of_a_container_fills(name, monkeypatch, tmp_path):
    cores = write_system(name, tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cores_of_quota(tmp_path) == cores
    assert usable_cores(tmp_path) == (cores or 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert usable_cores(tmp_path) == 1


def test_onnx_runtime_has_a_thread_for_each_of_these_cores_unless_a_number_is_given(make_bundle, monkeypatch):
    monkeypatch.setattr(session, "usable_cores", lambda: 3)
    folder = make_bundle("llama").folder
    for given, threads in ((0, 3), (2, 2)):
        options = session.Session(folder, threads=given).onnx.get_session_options()
        assert options.intra_op_num_threads == threads
