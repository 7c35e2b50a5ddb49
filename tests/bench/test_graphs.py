"""The graph without experts computes what the base does, the floor counts the weights that the adapter adds, and every
form of a bundle is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from teamlora_export.bench.floor import Work, floor, work_of
from teamlora_export.bench.graphs import bypass_experts, written_graphs
from teamlora_export.bench.rows import GraphRow
from teamlora_export.bench.run import BODY, BYPASSED, EAGER, NATIVE, BenchOptions, bench_bundle, choose_workloads
from teamlora_export.bench.turns import AGAIN, Workload
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.errors import ExportError
from teamlora_export.graph.read import read_graph

# Of the tiny Llama: four layers of q, k, v, o, gate, up and down, a tied head, r = 8 in 4 experts on all of them.
SHAPES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
LAYERS, HIDDEN, VOCABULARY, RANK, EXPERTS = 4, 32, 384, 8, 4


def cache_feeds(session: ort.InferenceSession, batch: int, capacity: int) -> dict[str, np.ndarray]:
    """An empty cache, growing or in place."""
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    rows = {True: 0, False: capacity}
    return {
        value.name: np.zeros((batch, value.shape[1], rows["past" in str(value.shape[2])], value.shape[3]), np.float32)
        for value in caches
    }


@pytest.mark.parametrize(
    ("name", "op_form", "cache"),
    [
        ("llama", "function", "growing"),
        ("llama", "standard", "growing"),
        ("mistral", "function", "in-place"),
    ],
)
def test_the_bypassed_graph_gives_the_logits_of_the_base(name, op_form, cache, make_bundle, make_base):
    ids = np.array([[5, 9, 200, 31], [77, 3, 4, 300]])
    with torch.no_grad():
        expected = make_base(name).load(torch.float32)(torch.from_numpy(ids)).logits[:, -1:].numpy()
    with written_graphs(make_bundle(name, op_form=op_form, cache=cache)) as graphs:
        found = {}
        for folder in (graphs.bypassed, graphs.adapted):
            session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
            given = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(4)[None].repeat(2, 0),
                **cache_feeds(session, 2, 6),
            }
            feeds = {value.name: given[value.name] for value in session.get_inputs()}
            found[folder] = session.run(["logits"], feeds)[0]
    # Float32 both, of magnitude 1: some hundred roundings.
    assert np.abs(found[graphs.bypassed] - expected).max() < 1e-4
    assert np.abs(found[graphs.adapted] - expected).max() > 1e-2, "the experts do something"


def test_the_bypassed_encoder_gives_what_the_base_does(make_bundle, make_base):
    ids = np.array([[5, 9, 200, 31]])
    with torch.no_grad():
        expected = make_base("bert").load(torch.float32)(torch.from_numpy(ids)).logits.numpy()
    with written_graphs(make_bundle("bert")) as graphs:
        session = ort.InferenceSession(graphs.bypassed / "model.onnx", providers=["CPUExecutionProvider"])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found = session.run(["logits"], given)[0]
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("op_form", ["function", "standard"])
def test_the_work_of_a_bundle_is_that_of_its_shapes(op_form, make_bundle):
    with written_graphs(make_bundle("llama", op_form=op_form)) as graphs:
        adapted, bypassed = graphs.adapted_work, graphs.bypassed_work
    base = LAYERS * sum(rows * columns for rows, columns in SHAPES)
    added = LAYERS * sum((RANK + EXPERTS) * rows + EXPERTS**2 + RANK * columns for rows, columns in SHAPES)
    head, norms = VOCABULARY * HIDDEN, (2 * LAYERS + 1) * HIDDEN
    assert bypassed.last == adapted.last == head
    assert adapted.each - bypassed.each == added
    assert adapted.bytes - bypassed.bytes == 4 * added
    # Beside the weights there is a table of a few frequencies for the positions.
    assert base <= bypassed.each <= base + 8
    assert 4 * (base + head + norms) <= bypassed.bytes <= 4 * (base + head + norms + 16)


@pytest.mark.parametrize("op_form", ["function", "standard"])
def test_the_work_of_a_shelf_grows_with_the_adapters_that_a_batch_has(op_form, make_shelf):
    """Slots of the tiny Llama's shelf, all of whose modules have one: down [a + k, in], mix [k, k], up [k c, out]."""
    bundle = make_shelf(op_form=op_form)
    with written_graphs(bundle) as graphs:
        adapted, bypassed = graphs.adapted_work, graphs.bypassed_work
    slots = bundle.manifest.refit["projections"].values()
    numbers = sum((a + k) * d_in + k * k + k * c * d_out for d_in, d_out, a, k, c in slots)
    assert adapted.slot == 4 * numbers
    assert adapted.bytes == bypassed.bytes
    assert adapted.each - bypassed.each == numbers
    assert (bypassed.slot, bypassed.adapters) == (0, 0)
    three = replace(adapted, adapters=3)
    assert floor(three, bypassed, 1, batch=8).bytes == 1 + 3 * adapted.slot / bypassed.bytes
    assert floor(three, bypassed, 1, batch=2).bytes == 1 + 2 * adapted.slot / bypassed.bytes


@pytest.mark.parametrize("op_form", ["function", "standard"])
def test_the_bypassed_graph_of_a_shelf_is_the_base_and_the_other_has_each_rows_adapter(op_form, make_shelf):
    bundle = make_shelf(op_form=op_form)
    prompts = [[5, 9, 200, 31], [77, 3, 4, 300]]
    expected = Model(bundle.folder)
    with written_graphs(bundle) as graphs:
        assert Model(graphs.bypassed, check=False).generate(prompts, 8) == expected.generate(prompts, 8)
        names = ["team", "small"]
        found = Model(graphs.adapted, check=False).generate(prompts, 8, adapters=names)
    assert found == expected.generate(prompts, 8, adapters=names) != expected.generate(prompts, 8)


def test_rows_of_a_shelf_with_a_library_are_run_by_it(make_shelf):
    """In a graph without the op's definition, so that nothing else can run them."""
    with written_graphs(make_shelf()) as graphs:
        model = onnx.load(graphs.adapted / "model.onnx", load_external_data=False)
        del model.functions[:]
        onnx.save(model, graphs.adapted / "model.onnx")
        row = GraphRow("native", graphs.adapted, build_library().path, adapters=("team", None))
        step = row.open()([[5, 6, 7], [9, 3, 4]], 2)
        assert len(step()) == 2
        with pytest.raises(ExportError, match=r"native: .*cannot load the model"):
            replace(row, library=None).open()


def test_a_floor_is_the_added_bytes_and_operations():
    adapted, bypassed = Work(bytes=110, each=30, last=5), Work(bytes=100, each=20, last=5)
    found = floor(adapted, bypassed, 1)
    assert (found.bytes, found.operations) == pytest.approx((1.1, 35 / 25))
    assert floor(adapted, bypassed, 100).operations == pytest.approx(3005 / 2005)


def test_tables_that_are_looked_up_are_not_read_whole():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (int64[b, s] ids) => (float[b, s, 3] y)
        <float[5, 4] table, float[3, 4] tied, float[3] bias>
        {
            x = Gather(table, ids)
            turned = Transpose<perm = [1, 0]>(tied)
            product = MatMul(x, turned)
            y = Add(product, bias)
        }"""
    )
    for name, shape in (("table", (5, 4)), ("tied", (3, 4)), ("bias", (3,))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    assert work_of(ir.from_proto(model)) == Work(bytes=4 * (12 + 3), each=12, last=0)


def test_a_graph_without_experts_is_refused(make_bundle):
    bundle = make_bundle("llama")
    model = read_graph(bundle)
    bypass_experts(model, bundle)
    with pytest.raises(ExportError, match="does not show where experts are added"):
        bypass_experts(model, bundle)


def test_nothing_is_left_beside_the_bundle(make_bundle):
    bundle = make_bundle("llama")
    before = sorted(bundle.folder.parent.iterdir())
    with written_graphs(bundle) as graphs:
        assert (graphs.adapted / "model.onnx.data").stat().st_ino == bundle.data.stat().st_ino
    assert sorted(bundle.folder.parent.iterdir()) == before


def test_a_row_that_cannot_run_says_which_it_is(tmp_path):
    with pytest.raises(ExportError, match=r"my row: .*Is it a model's folder"):
        GraphRow("my row", tmp_path).open()


def test_a_row_that_fails_behind_its_prompt_says_which_it_is(make_bundle, monkeypatch):
    """A model in float16 may overflow at any token."""
    take, takes = Scheduler._take, []

    def spoilt(self: Scheduler, request: Any, logits: np.ndarray) -> None:
        takes.append(request)
        take(self, request, logits * np.nan if len(takes) > 1 else logits)

    monkeypatch.setattr(Scheduler, "_take", spoilt)
    step = GraphRow("my row", make_bundle("llama").folder).open()([[5, 9]], 1)
    with pytest.raises(ExportError, match=r"my row: .*no number \(NaN\)"):
        step()


def test_a_cache_in_place_runs_with_the_native_op(make_bundle):
    options = BenchOptions(lengths=(6,), batches=(2,), count=2, turns=1, library=build_library().path, memory=False)
    benchmark = bench_bundle(make_bundle("mistral", cache="in-place"), options)
    assert {figure.row for figure in benchmark.figures} == {BYPASSED, BODY, NATIVE, AGAIN}


def test_an_encoder_is_measured_beside_pytorch(make_bundle):
    options = BenchOptions(lengths=(6,), batches=(2,), turns=1, pytorch=True, memory=False)
    benchmark = bench_bundle(make_bundle("bert"), options)
    assert {BYPASSED, BODY, EAGER, AGAIN} <= {figure.row for figure in benchmark.figures}
    assert {figure.quantity for figure in benchmark.figures} == {"prefill"}
    assert choose_workloads(make_bundle("bert"), BenchOptions(batches=(8,))) == [
        Workload(8, 64, 0),
        Workload(8, 130, 0),
    ]
