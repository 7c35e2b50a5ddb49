"""Whether a model can still be run: shortages of memory pass, what a GPU says when it has failed does not."""

from __future__ import annotations

import pytest

from teamlora_export.deploy.answers import Broken
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.health import HANGS, SHORTAGE, Health

# As the libraries say it.
SHORT = [
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Failed to allocate memory for requested buffer of size 4096"),
    RuntimeError("Available memory of 512 is smaller than requested bytes of 4096"),
    RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; file=cuda_allocator.cc ; expr=cudaMalloc((void**)&p, size);"),
    RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"),
    RuntimeError("cudaMalloc: out of memory"),
    ModelError("TensorRT refuses a step (Error Code 2: OutOfMemory (Requested size was 4096 bytes.))."),
    ModelError("TensorRT refuses a step (Requested amount of GPU memory (4096 bytes) could not be allocated.)."),
]
LOST = [
    RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaDeviceSynchronize()"),
    RuntimeError("CUDA failure 700: an illegal memory access ; file=cuda_allocator.cc ; expr=cudaMalloc((void**)&p);"),
    RuntimeError("CUDA failure 46: all CUDA-capable devices are busy or unavailable"),
    ZeroDivisionError("integer division or modulo by zero"),
]


class Model:
    """One that fails while there is something to raise."""

    runtime = "ONNX Runtime"

    def __init__(self, raised: Exception | None = None) -> None:
        self.raised, self.rows = raised, []

    def try_out(self, row: int) -> None:
        self.rows.append(row)
        if self.raised is not None:
            raise self.raised


def health_of(model: Model, now: list[float]) -> Health:
    return Health(model, lambda: now[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("raised", SHORT, ids=str)
def test_a_shortage_of_memory_may_pass_and_one_that_stays_is_no_more_waited_for(raised):
    model, now = Model(raised), [100.0]
    health = health_of(model, now)
    for now[0] in (100.0, 100.0 + SHORTAGE):
        health.check(3, RuntimeError("a request's own"))
        assert not health.broken
    # What is answered between two of them ends it, be it the same question.
    health.answered()
    now[0] += 1
    health.check(3, RuntimeError("a request's own"))
    model.raised = None
    now[0] += SHORTAGE
    health.check(3, RuntimeError("a request's own"))
    model.raised = raised
    now[0] += 1
    health.check(3, RuntimeError("a request's own"))
    assert not health.broken
    now[0] += SHORTAGE + 1
    with pytest.raises(Broken, match=r"^The model cannot be run any more \(.*\)\. Start its process again\.$"):
        health.check(3, RuntimeError("a request's own"))
    assert health.broken
    assert set(model.rows) == {3}


@pytest.mark.parametrize("raised", LOST, ids=str)
def test_whatever_else_the_shortest_text_fails_of_is_the_end_and_the_log_says_once_what_led_there(raised, capfd):
    for is_served in (False, True):
        model = Model()
        health = health_of(model, [100.0])
        if is_served:
            health.require()
        health.check(0, RuntimeError("a secret prompt"))
        model.raised = raised
        with pytest.raises(Broken) as told:
            health.check(0, RuntimeError("a secret prompt"))
        # What everybody is told has none of one request's words.
        assert str(told.value) == health.broken
        assert str(raised) in health.broken and "secret" not in health.broken
        logged = capfd.readouterr().err
        assert logged == (f"{health.broken} What failed first: a secret prompt\n" if is_served else "")


def test_a_model_that_cannot_be_run_is_not_served():
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the model \(no kernel image\)\.$"):
        health_of(Model(RuntimeError("no kernel image")), [100.0]).require()


def test_a_turn_that_is_not_over_hangs_after_a_while_and_until_it_is():
    now: list[float] = [100.0]
    health = health_of(Model(), now)
    with health.turn():
        now[0] += HANGS
        assert not health.hangs and not health.broken and health.overdue(now[0]) is None
        now[0] += 1
        assert health.hangs and "has not come back from a call for 300 seconds" in health.broken
        assert isinstance(health.overdue(now[0]), Broken)
    assert not health.hangs and not health.broken
    now[0] += HANGS + 1
    assert not health.hangs
    with pytest.raises(ZeroDivisionError), health.turn():
        assert 1 // 0
    now[0] += HANGS + 1
    assert not health.hangs


def test_a_model_that_is_lost_is_not_called_one_that_hangs():
    now: list[float] = [100.0]
    health = health_of(Model(RuntimeError("CUDA error 700")), now)
    with health.turn():
        with pytest.raises(Broken):
            health.check(0, RuntimeError("a request's own"))
        now[0] += HANGS + 1
        assert "CUDA error 700" in health.broken
