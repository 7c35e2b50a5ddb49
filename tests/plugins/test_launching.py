"""How the CUDA kernels are launched: which attributes a CUDA runtime is asked for, by one that only notes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SHARE = " share=100"


def launched(programs: Path, driver: int, ptx: int) -> list[str]:
    """Lines for a device, and for each kernel of a call of three. `driver` as CUDA counts: 12080 is 12.8."""
    command = [programs / "launching", str(driver), str(ptx)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_all_but_the_first_of_a_call_begin_early_and_all_share_memory_alike(programs):
    assert launched(programs, 13000, 90) == [
        "132 multiprocessors, overlaps=1",
        f"kernel{SHARE}",
        f"kernel{SHARE} overlap=1",
        f"kernel{SHARE} overlap=1",
    ]


def test_an_older_driver_is_not_asked_for_what_it_does_not_know(programs):
    assert launched(programs, 12030, 90)[1:] == ["kernel", "kernel overlap=1", "kernel overlap=1"]


@pytest.mark.parametrize(("driver", "ptx"), [(12020, 90), (13000, 80), (0, 90)])
def test_kernels_follow_each_other_where_driver_or_code_cannot_overlap(programs, driver, ptx):
    """A driver that cannot capture such launches, code for sm_80 on a newer GPU, a driver that does not answer."""
    assert launched(programs, driver, ptx) == ["132 multiprocessors, overlaps=0", "kernel", "kernel", "kernel"]


def test_a_device_that_does_not_run_the_kernels_is_an_error(programs):
    assert launched(programs, 13000, 0) == ["error 98"]
