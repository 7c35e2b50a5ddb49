"""An engine that our programs in Python run: TensorRT and CUDA are stood in for, on the graph that the engine is of."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import until_stop
from engine_stand_in import (
    EngineGraph,
    Fault,
    HostRuntime,
    StaleSlots,
    StandInContext,
    exchange_rows,
    off_by_one,
    stand_in_for_packages,
    write_stand_in,
)
from shelves import COUNT, NAMES, PROMPTS, expected

sys.path.append(str(Path(__file__).parent))
from shelf_requests import ask_all, assert_refuses_an_unknown_one
from triton_server import LoadError, Server

from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.deploy.answers import Failed
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.kubernetes import deploy_kubernetes
from teamlora_export.deploy.publish import publish_shelf
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.triton import deploy_triton
from teamlora_export.deploy.triton_options import TritonOptions
from teamlora_export.errors import ExportError
from teamlora_export.shelf import replace_adapter

SHAPES = "1x1,2x16,4x64"


@pytest.fixture
def engine_of(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    """A copy of a bundle, with an engine named tiny that has a fault; and the GPU."""

    def make(bundle: Bundle, fault: Fault | None = None, shapes: str = SHAPES) -> tuple[Bundle, HostRuntime]:
        shutil.copytree(bundle.folder, tmp_path / "bundle")
        bundle = read_bundle(tmp_path / "bundle")
        _, facts = write_stand_in(bundle, shapes)
        return bundle, stand_in_for_packages(EngineGraph(bundle, facts.profiles, fault), monkeypatch)

    return make


@pytest.mark.parametrize(
    "fault",
    [None, off_by_one(3), exchange_rows, StaleSlots()],
    ids=["whole", "off by one", "exchanged", "stale"],
)
def test_each_prompt_of_a_batch_is_answered_by_its_own_adapter(fault, engine_of, make_shelf, shelf_answers, tmp_path):
    """Seven prompts in four rows, whose five adapters make room for one another in three slots."""
    bundle, gpu = engine_of(make_shelf(cache="in-place"), fault)
    model = Model(deploy_python(bundle, tmp_path / "out", engine="tiny"))
    assert model.adapters == ["hydra", "lora", "moe", "small", "team"]
    found = model.generate(PROMPTS, COUNT, adapters=NAMES)
    assert (found == [until_stop(tokens) for tokens in expected(shelf_answers)]) == (fault is None)
    with pytest.raises(ModelError, match="There is no adapter 'nobody'; there are hydra, lora, moe, small, team"):
        model.generate([[5]], 2, adapters=["nobody"])
    with pytest.raises(ModelError, match="48 tokens; the model takes 47"):
        model.generate([[5] * 48], 1)
    del model
    assert not gpu.held, "memory is given back"
    assert not gpu.streams


def test_what_a_step_that_failed_has_begun_is_over_before_anything_else(engine_of, make_shelf, tmp_path, monkeypatch):
    bundle, gpu = engine_of(make_shelf(cache="in-place"))
    model = Model(deploy_python(bundle, tmp_path / "out", engine="tiny"))
    execute, failing = StandInContext.execute_async_v3, [True] * 9

    def fails(context: StandInContext, stream: int) -> bool:
        return execute(context, stream) and not failing.pop()

    monkeypatch.setattr(StandInContext, "execute_async_v3", fails)
    with pytest.raises(ModelError, match="TensorRT-RTX refuses a step"):
        model.generate([PROMPTS[0]], 2)
    assert not any(gpu.streams.values())
    failing[:] = [False] * 9
    assert model.generate([PROMPTS[0]], 2)


def test_a_gpu_that_has_failed_ends_every_request_and_one_without_memory_does_not(
    engine_of, make_bundle, tmp_path, monkeypatch
):
    bundle, gpu = engine_of(make_bundle("llama", cache="in-place"))
    model = Model(deploy_python(bundle, tmp_path / "out", engine="tiny"))
    scheduler = Scheduler(model.slots(2))
    no_memory, illegal_access = (2,), (700,)
    for name, fails, message in (
        ("cudaMemcpyAsync", lambda *_: no_memory, r"^TensorRT-RTX cannot run the model \(.*out of memory"),
        # As one that is told of when it is waited for.
        ("cudaStreamSynchronize", lambda stream: illegal_access, "^The model cannot be run any more .*illegal memory"),
    ):
        assert not scheduler.broken
        answer = scheduler.submit([5, 6], 20)
        scheduler.turn()
        with monkeypatch.context() as patch:
            patch.setattr(gpu, name, fails)
            while scheduler.busy:
                scheduler.turn()
        with pytest.raises(Failed, match=message):
            list(answer)
    assert scheduler.broken
    # A context of the engine that fails for ever, on a GPU that works: that of prompts.
    scheduler, execute = Scheduler(model.slots(2)), StandInContext.execute_async_v3
    monkeypatch.setattr(
        StandInContext, "execute_async_v3", lambda given, stream: given._profile and execute(given, stream)
    )
    answer = scheduler.submit([5, 6], 20)
    scheduler.turn()
    with pytest.raises(Failed, match=r"cannot be run any more \(TensorRT-RTX refuses a step"):
        list(answer)


def test_adapters_are_published_to_an_engine_with_as_many_slots_as_it_has(engine_of, make_shelf, tmp_path):
    bundle, _ = engine_of(make_shelf(cache="in-place"))
    out = deploy_python(bundle, tmp_path / "out", engine="tiny")
    fields = json.loads((bundle.folder / "manifest.json").read_text())
    fields["shelf"]["slots"] = 5
    (bundle.folder / "manifest.json").write_text(json.dumps(fields))
    publish_shelf(read_bundle(bundle.folder), out)
    assert json.loads((out / "deploy.json").read_text())["shelf"]["slots"] == 3
    assert Model(out).adapters
    with pytest.raises(ExportError, match=r"is an engine with 3 slots of adapters, and .* has 5\. Build it again"):
        deploy_python(read_bundle(bundle.folder), tmp_path / "again", engine="tiny")


def test_a_shelf_changes_while_an_engine_serves_it(engine_of, make_shelf, shelf_adapters, shelf_answers, tmp_path):
    bundle, _ = engine_of(make_shelf(cache="in-place"))
    out = deploy_python(bundle, tmp_path / "out", engine="tiny")
    scheduler = Scheduler(Model(out).slots(3))
    first = scheduler.submit(PROMPTS[0], COUNT, stops=(), adapter="team")
    for _ in range(4):
        scheduler.turn()
    replace_adapter(bundle.folder, "team", shelf_adapters["small"])
    publish_shelf(read_bundle(bundle.folder), out)
    second = scheduler.submit(PROMPTS[1], COUNT, stops=(), adapter="team")
    plain = scheduler.submit(PROMPTS[2], COUNT, stops=())
    while scheduler.busy:
        scheduler.turn()
    found = [[token.id for token in answer] for answer in (first, second, plain)]
    assert found == [shelf_answers[name, tuple(PROMPTS[i])] for i, name in ((0, "team"), (1, "small"), (2, None))]
    # Built before the shelf was changed, it is still the bundle's.
    deploy_python(read_bundle(bundle.folder), tmp_path / "again", engine="tiny")


def test_triton_serves_an_engine_with_the_adapter_of_each_request(engine_of, make_shelf, shelf_answers, tmp_path):
    bundle, _ = engine_of(make_shelf(cache="in-place"))
    out = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", engine="tiny"))
    folder = out / "models" / "m_text"
    assert "kind: KIND_GPU" in (folder / "config.pbtxt").read_text()
    assert not (folder / "1" / "model.onnx").exists()
    told = (out / "README.md").read_text()
    assert 'cuda-bindings>=12.8" "jinja2>=3.1.6" tokenizers && tritonserver' in told
    assert "Python model with TensorRT inside. It writes 4 texts at a time" in told
    server = Server(out / "models")
    assert ask_all(server) == [until_stop(tokens) for tokens in expected(shelf_answers)]
    assert_refuses_an_unknown_one(server)
    server.models["m_text"].unload()
    deploy_kubernetes(bundle, tmp_path / "cluster", TritonOptions(name="m", engine="tiny"))
    assert (
        f"pip install --no-cache-dir {told.split('pip install ')[1].split(' &&')[0]}"
        in (tmp_path / "cluster" / "Dockerfile").read_text()
    )
    assert "nvidia.com/gpu" in (tmp_path / "cluster" / "deployment.yaml").read_text()


def test_an_engine_in_16_bits_answers_as_its_graph_does(engine_of, make_shelf, tmp_path):
    bundle, _ = engine_of(make_shelf(dtype="fp16", cache="in-place"))
    model = Model(deploy_python(bundle, tmp_path / "out", engine="tiny"))
    prompts, names = [list(range(3, 33)), [9, 10], [12]], ["team", None, "lora"]
    alone = Model(bundle.folder, threads=1)
    assert model.generate(prompts, 8, adapters=names) == alone.generate(prompts, 8, adapters=names)


def test_an_engine_with_an_adapter_of_its_own_reads_prompts_in_parts(engine_of, make_bundle, tmp_path):
    bundle, _ = engine_of(make_bundle("llama", cache="in-place"))
    model = Model(deploy_python(bundle, tmp_path / "out", engine="tiny"))
    prompts = [list(range(3, 33)), [9, 10], [12]]
    expected = Model(bundle.folder, threads=1).generate(prompts, 8)
    scheduler = Scheduler(model.slots(3, part=7))
    answers = [scheduler.submit(prompt, 8) for prompt in prompts]
    while scheduler.busy:
        scheduler.turn()
    assert [[token.id for token in answer] for answer in answers] == expected
    with pytest.raises(ModelError, match="takes 4 texts at a time, not 5"):
        model.slots(5)
    with pytest.raises(ModelError, match="has one adapter of its own"):
        model.generate([[5]], 2, adapters=["team"])


def test_an_engine_of_an_encoder_gives_its_vectors(engine_of, make_bundle, tmp_path):
    bundle, _ = engine_of(make_bundle("bert"))
    model = Model(deploy_python(bundle, tmp_path / "out", engine="tiny"))
    inputs = [[5, 6, 7], [8, 9]]
    assert np.allclose(model.encode(inputs), Model(bundle.folder, threads=1).encode(inputs), atol=1e-5)
    with pytest.raises(ModelError, match="its engine takes no 5 rows of 1 tokens"):
        model.encode([[5]] * 5)


def test_what_keeps_an_engine_from_being_opened_is_a_sentence(engine_of, make_shelf, tmp_path, monkeypatch):
    bundle, gpu = engine_of(make_shelf(cache="in-place"))
    out = deploy_triton(bundle, tmp_path / "out", TritonOptions(name="m", engine="tiny", check_files=False))
    folder = out / "models" / "m_text" / "1"
    with pytest.raises(ModelError, match=r"GPU 1 cannot be used .*invalid device ordinal"):
        Model(folder, device="cuda:1")
    with pytest.raises(ModelError, match=r"--device .tpu.*an engine runs on a GPU"):
        Model(folder, device="tpu")
    with pytest.raises(ModelError, match="is for ONNX Runtime"):
        Model(folder, library=Path("libops.so"))
    gpu._room = 1000
    with pytest.raises(ModelError, match=r"MiB of GPU memory for 3 adapters .*out of memory.*Export it with fewer"):
        Model(folder)
    with monkeypatch.context() as lacking:
        lacking.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(LoadError, match=r"cuda-bindings cannot be imported .*pip install cuda-bindings"):
            Server(out / "models")
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**facts, "plugin": {"op": "teamlora::MixedExpertProjection"}}))
    with pytest.raises(ModelError, match=r"libteamlora_tensorrt\.so: cannot be read"):
        Model(folder, check=False)
    (folder / "plugins").mkdir()
    (folder / "plugins" / "libteamlora_tensorrt.so").write_bytes(b"no library")
    with pytest.raises(ModelError, match=r"its list of hashes lacks plugins/libteamlora_tensorrt\.so"):
        Model(folder)
    with pytest.raises(ModelError, match=r"libteamlora_tensorrt\.so: TensorRT .* refuses to load the plugin"):
        Model(folder, check=False)
    (folder / "model.json").write_text(json.dumps({**facts, "runtime_version": "1.6"}))
    with pytest.raises(ModelError, match=r"does not run with TensorRT-RTX .*pip install tensorrt-rtx-cu13==1\.6"):
        Model(folder, check=False)


def test_an_engine_that_cannot_be_served_is_refused(engine_of, make_shelf, make_bundle, tmp_path):
    bundle, _ = engine_of(make_shelf(), shapes="2x1,2x16,4x64")
    for message, options in (
        ("keeps a cache that grows, .*Export the model with --cache in-place", {}),
        ("--library", {"library": Path("libops.so")}),
    ):
        with pytest.raises(ExportError, match=message):
            deploy_python(bundle, tmp_path / "out", engine="tiny", **options)
    for message, batching in (
        ("Triton's own back ends know none; .*texts share the steps of an engine", None),
        ("--batching continuous: texts share the steps", "continuous"),
    ):
        with pytest.raises(ExportError, match=message):
            deploy_triton(bundle, tmp_path / "out", TritonOptions(engine="tiny", batching=batching))
    shutil.rmtree(bundle.folder)
    bundle, _ = engine_of(make_bundle("llama", cache="in-place"), shapes="2x1,2x16,4x64")
    with pytest.raises(ExportError, match="takes no single row"):
        deploy_triton(bundle, tmp_path / "out", TritonOptions(engine="tiny"))
    for shapes, message in (
        ("1x1,2x16,4x63", "do not begin at multiples of 256 bytes"),
        ("1x1,2x16,4x16", "its cache has 16 places, which is too few"),
    ):
        write_stand_in(bundle, shapes)
        with pytest.raises(ExportError, match=message):
            deploy_python(bundle, tmp_path / "out", engine="tiny")
    with pytest.raises(ExportError, match="Triton's TensorRT back end has two for a state"):
        deploy_triton(bundle, tmp_path / "out", TritonOptions(engine="tiny", text=False))
