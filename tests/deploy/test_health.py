"""Whether a model can still be run: shortages of memory pass, what a GPU says when it has failed does not."""

from __future__ import annotations

import errno

import pytest

from teamlora_export.deploy.answers import Broken
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.health import Health

# As the libraries say it.
SHORT = [
    MemoryError(),
    OSError(errno.ENOMEM, "no such words"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation"),
    RuntimeError("mmap: Cannot allocate memory"),
    RuntimeError("Failed to allocate memory for requested buffer of size 4096"),
    RuntimeError("Available memory of 512 is smaller than requested bytes of 4096"),
    RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; file=cuda_allocator.cc ; expr=cudaMalloc((void**)&p, size);"),
    RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"),
    RuntimeError("CUDNN failure 4002: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0"),
    RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("cudaErrorMemoryAllocation"),
    ModelError("TensorRT refuses a step (Error Code 2: OutOfMemory (Requested size was 4096 bytes.))."),
    ModelError("TensorRT refuses a step (Requested amount of GPU memory (4096 bytes) could not be allocated.)."),
]
LOST = [
    RuntimeError("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaDeviceSynchronize()"),
    RuntimeError("CUDA failure 700: an illegal memory access ; file=cuda_allocator.cc ; expr=cudaMalloc((void**)&p);"),
    RuntimeError("CUDA failure 700: an illegal memory access ; file=cuda_alloc.cc ; expr=memory_alloc(p);"),
    RuntimeError("CUDA failure 46: all CUDA-capable devices are busy or unavailable"),
    OSError(errno.EIO, "Input/output error"),
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


@pytest.mark.parametrize("raised", SHORT, ids=str)
def test_a_model_that_is_short_of_memory_is_not_lost(raised):
    model = Model(raised)
    health = Health(model)  # type: ignore[arg-type]
    for _ in range(2):
        health.check(3, RuntimeError("a request's own"))
    assert not health.broken
    assert model.rows == [3, 3]


@pytest.mark.parametrize("raised", LOST, ids=str)
def test_whatever_else_the_shortest_text_fails_of_is_the_end_and_the_log_says_once_what_led_there(raised, capfd):
    for is_served in (False, True):
        model = Model()
        health = Health(model)  # type: ignore[arg-type]
        if is_served:
            health.require_runs()
        health.check(0, RuntimeError("a secret prompt"))
        model.raised = raised
        with pytest.raises(Broken) as told:
            health.check(0, RuntimeError("a secret prompt"))
        # What everybody is told has none of one request's words.
        assert str(told.value) == health.broken
        assert str(raised) in health.broken and "secret" not in health.broken
        health.lose(RuntimeError("a second one"), RuntimeError("another prompt"))
        assert str(told.value) == health.broken
        logged = capfd.readouterr().err
        assert logged == (f"{health.broken} What failed first: a secret prompt\n" if is_served else "")


def test_a_model_that_cannot_be_run_is_not_served():
    health = Health(Model(RuntimeError("no kernel image")))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"^ONNX Runtime cannot run the model \(no kernel image\)\.$"):
        health.require_runs()
