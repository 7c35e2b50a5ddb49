"""How the CUDA kernels are launched: which attributes a CUDA runtime is asked for, by one that only notes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SHARE = " share=100"
# Kernels of a call, with the wish for shared memory and without.
ASKED = [f"kernel{SHARE}", *[f"kernel overlap=1{SHARE}"] * 2]
NOT_ASKED = ["kernel", *["kernel overlap=1"] * 2]


def launched(programs: Path, driver: int, ptx: int, *places: str) -> list[str]:
    """Lines for a device, and for each kernel of a call of three, or of one in each place. `driver` as CUDA counts:
    12080 is 12.8."""
    command = [programs / "launching", str(driver), str(ptx), *places]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_all_but_the_first_of_a_call_begin_early_and_all_share_memory_alike(programs):
    assert launched(programs, 13000, 90) == ["132 multiprocessors, overlaps=1", *ASKED]


def test_an_older_driver_is_not_asked_for_what_it_does_not_know(programs):
    assert launched(programs, 12030, 90)[1:] == NOT_ASKED


def test_a_driver_that_refuses_to_share_memory_is_not_asked_again(programs):
    """The refused launch is made again without the wish, and its error is left to nobody."""
    calls = launched(programs, 13000, 90, "refused", "plain")[1:]
    assert calls == [f"kernel{SHARE}", *NOT_ASKED, *NOT_ASKED]


def test_within_a_capture_nothing_is_asked_for_that_was_not_granted_before(programs):
    """A refusal could end the capture. CUDA does not tell everywhere whether there is one."""
    assert launched(programs, 13000, 90, "refused-captured", "implicit")[1:] == NOT_ASKED * 2
    assert launched(programs, 13000, 90, "captured", "plain", "captured")[1:] == NOT_ASKED + ASKED * 2


def test_a_launch_that_fails_either_way_fails_and_is_no_refusal(programs):
    fails = [f"kernel{SHARE}", "kernel", "the call fails with error 719"]
    assert launched(programs, 13000, 90, "broken", "plain")[1:] == fails + ASKED


@pytest.mark.parametrize(("driver", "ptx"), [(12020, 90), (13000, 80), (0, 90)])
def test_kernels_follow_each_other_where_driver_or_code_cannot_overlap(programs, driver, ptx):
    """A driver that cannot capture such launches, code for sm_80 on a newer GPU, a driver that does not answer."""
    assert launched(programs, driver, ptx) == ["132 multiprocessors, overlaps=0", "kernel", "kernel", "kernel"]


def test_a_device_that_does_not_run_the_kernels_is_an_error(programs):
    assert launched(programs, 13000, 0) == ["error 98"]
