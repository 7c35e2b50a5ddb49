"""The verdict on a shelf: every adapter by itself, rows of several in one batch, and the faults that it must find."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from faults import judged
from onnx import helper
from rich.console import Console
from safetensors.numpy import load_file, save_file

from teamlora_export.bundle import Bundle, hash_files, read_bundle
from teamlora_export.deploy.adapter_slots import Adapters, Shelved
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.errors import ExportError
from teamlora_export.files import sha256_of
from teamlora_export.manifest import write_manifest
from teamlora_export.shelf import add_adapter, remove_adapter, replace_adapter
from teamlora_export.validate.cases import Case, first_step
from teamlora_export.validate.metrics import ErrorStats
from teamlora_export.validate.report import print_verdict, write_html
from teamlora_export.validate.shelf import MixedRunner, mixed_batches, open_shelf
from teamlora_export.validate.verdict import CaseResult, Departure, Judgement, Thresholds, Verdict


@pytest.fixture
def shelf(make_shelf, tmp_path) -> Bundle:
    """A bundle of its own, of two adapters unlike each other."""
    shutil.copytree(make_shelf().folder, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")


def rehashed(bundle: Bundle) -> Bundle:
    """As somebody exported it who made the fault."""
    shelf, adapters = bundle.manifest.shelf, {}
    for name, adapter in shelf["adapters"].items():
        path = bundle.folder / adapter["file"]
        sha256 = sha256_of(path)
        path = path.rename(path.with_name(f"{name}.{sha256[:16]}.safetensors"))
        adapters[name] = {**adapter, "sha256": sha256, "file": f"adapters/{path.name}"}
    hashes = hash_files(bundle.folder)
    changed = dataclasses.replace(bundle.manifest, sha256=hashes, shelf={**shelf, "adapters": adapters})
    write_manifest(bundle.folder, changed)
    return read_bundle(bundle.folder)


@pytest.mark.parametrize(
    ("dtype", "cache", "only"),
    [
        ("fp32", "growing", ["small", "hydra"]),
        ("fp16", "in-place", ["team"]),
        ("bf16", "growing", ["moe"]),
    ],
)
def test_a_healthy_shelf_passes_with_every_adapter_and_in_batches_of_several(dtype, cache, only, make_shelf, tmp_path):
    shutil.copytree(make_shelf(dtype=dtype, cache=cache).folder, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    verdict = judged(bundle, only=only)
    assert verdict.passed, [*verdict.departures, *(case for case in verdict.cases if not case.passed)]
    names = [case.name for case in verdict.cases]
    assert all(sum(name.startswith(f"{each}: ") for name in names) == 6 for each in only)
    assert names[-2:] == ["no adapter is given", f"rows of {', '.join([only[0], 'none', *only[1:], only[0]])}"]
    kept = read_bundle(bundle.folder).manifest
    assert kept.validation is None, "the others were not judged"
    assert {name for name, adapter in kept.shelf["adapters"].items() if adapter["validation"]} == set(only)


def test_with_the_native_op_too(make_shelf, tmp_path):
    shutil.copytree(make_shelf().folder, tmp_path / "bundle")
    verdict = judged(read_bundle(tmp_path / "bundle"), only=["lora", "team"], library=build_library().path)
    assert verdict.passed, verdict.departures
    assert verdict.library


def test_of_batches_with_the_native_op_nothing_else_can_run_the_nodes(make_shelf, tmp_path):
    """Without the library the model cannot be opened."""
    bundle = make_shelf()
    adapters = open_shelf(bundle, 2)
    runner = MixedRunner(bundle, adapters, build_library().path)
    runner.seat(["team", None])
    ids = np.array([[5, 6, 7], [9, 3, 4]])
    feeds = first_step(bundle.manifest.inputs, Case("rows", ids, np.ones_like(ids))).feeds
    found = runner.run(feeds)
    plain = MixedRunner(bundle, adapters, None)
    plain.seat(["team", None])
    assert np.allclose(found["logits"], plain.run(feeds)["logits"], atol=1e-4)
    assert not runner.model.functions
    runner.forget()
    runner.library = None
    with pytest.raises(ExportError, match="cannot load it"):
        runner._session = runner._open(())


@pytest.mark.parametrize("options", [{}, {"weights_form": "int4"}], ids=str)
def test_layer_by_layer_every_adapter_is_judged_too(options, make_shelf, tmp_path):
    shutil.copytree(make_shelf(**options).folder, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    verdict = judged(bundle, only=["small", "lora"], layer_by_layer=True, quality=False)
    assert verdict.passed, [*verdict.departures, *(case for case in verdict.cases if not case.passed)]
    assert [case.name for case in verdict.cases[-2:]] == ["no adapter is given", "rows of small, none, lora, small"]
    assert {check.case.partition(":")[0] for check in verdict.local} == {"small", "lora"}
    assert {path.partition(":")[0] for path in verdict.expert_use} == {"small", "lora"}


def test_layer_by_layer_a_fault_is_located(shelf):
    verdict = judged(edit_graph(shelf, take_the_next_slot), only=["team"], layer_by_layer=True)
    assert not verdict.passed
    assert any("layers.2.mlp.down_proj" in departure.module for departure in verdict.departures)


def test_what_quantisation_cost_is_told_of_every_adapter(make_shelf, tmp_path, capsys):
    shutil.copytree(make_shelf(weights_form="int4").folder, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    lenient = Thresholds(perplexity=10.0, agreement=0.0)
    verdict = judged(bundle, only=["team", "hydra"], thresholds=lenient)
    assert verdict.exact, verdict.departures
    assert list(verdict.measured) == ["team", "hydra"]
    for name, quality in verdict.qualities.items():
        assert 0 < quality.quantised.kl < quality.base.kl, f"{name} is not what was run"
    assert verdict.qualities["team"].quantised != verdict.qualities["hydra"].quantised
    kept = read_bundle(bundle.folder).manifest.shelf["adapters"]
    assert kept["team"]["validation"]["quality"]["figures"] != kept["hydra"]["validation"]["quality"]["figures"]
    print_verdict(verdict, Console(width=200))
    write_html(verdict, bundle, tmp_path / "page.html")
    for said in (capsys.readouterr().out, (tmp_path / "page.html").read_text()):
        assert "What quantisation cost the adapter team" in said
        assert "What quantisation cost the adapter hydra" in said
    failing = dataclasses.replace(verdict.qualities["hydra"], findings=("too much",))
    spoilt = dataclasses.replace(verdict, qualities={**verdict.qualities, "hydra": failing})
    assert verdict.passed == verdict.exact
    assert not spoilt.passed


def test_more_adapters_than_slots_make_room_for_one_another():
    batches = list(mixed_batches(["a", "b", "c", "d", "e"], 3))
    assert batches == [["a", None, "b", "c", "a"], ["d", None, "e", "d"], ["a", None, "b", "c", "a"]]
    assert list(mixed_batches(["a"], 8)) == [["a", None, "a"]]


def edit_graph(bundle: Bundle, change) -> Bundle:  # type: ignore[no-untyped-def]
    model = onnx.load(bundle.model, load_external_data=False)
    change(model)
    onnx.save(model, bundle.model)
    return rehashed(bundle)


def take_the_next_slot(model: onnx.ModelProto) -> None:
    """The index off by one, where there is a slot before it."""
    less = helper.make_tensor("one_less", onnx.TensorProto.INT32, [1], [1])
    model.graph.initializer.append(less)
    for node in model.graph.node:
        if node.op_type == "MixedExpertProjection" and "layers.2.mlp.down_proj" in node.output[0]:
            node.input[5] = "wrong_slot"
    model.graph.node.insert(0, helper.make_node("Sub", ["adapter", "one_less"], ["wrong_slot"], name="fault"))


def test_an_index_that_is_off_by_one_in_one_module_is_found_and_located(shelf):
    """The slot before holds no numbers when an adapter is judged by itself."""
    verdict = judged(edit_graph(shelf, take_the_next_slot), only=["team"])
    assert not verdict.passed
    assert any("layers.2.mlp.down_proj" in departure.module for departure in verdict.departures)


def clip_to_one(model: onnx.ModelProto) -> None:
    """Of three slots, the last is never read."""
    model.graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT32, [1], [1]))
    node = next(node for node in model.graph.node if "layers.2.mlp.down_proj" in node.output[0])
    node.input[5] = "wrong_slot"
    model.graph.node.insert(0, helper.make_node("Min", ["adapter", "one"], ["wrong_slot"], name="fault"))


def test_an_index_that_is_clipped_is_found_with_fewer_adapters_than_slots(shelf, monkeypatch):
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(shelf))
    verdict = judged(edit_graph(shelf, clip_to_one), only=["team"])
    assert {departure.check for departure in verdict.departures} == {"rows"}
    module = "model.layers.2.mlp.down_proj"
    assert (verdict.departure.module, verdict.departure.node) == (module, f"{module}/MixedExpertProjection")


def first_slot_by_default(model: onnx.ModelProto) -> None:
    default = next(tensor for tensor in model.graph.initializer if tensor.name == "adapter")
    default.CopyFrom(helper.make_tensor("adapter", onnx.TensorProto.INT32, [1], [0]))


def weights_by_default(model: onnx.ModelProto) -> None:
    """The slots' defaults are where the base's weights are in the file."""
    inputs = {value.name for value in model.graph.input} - {"adapter"}
    for tensor in model.graph.initializer:
        for entry in tensor.external_data if tensor.name in inputs else ():
            if entry.key == "offset":
                entry.value = "0"


@pytest.mark.parametrize("changes", [[first_slot_by_default], [weights_by_default]], ids=["index", "weights"])
def test_defaults_that_are_not_the_base_alone_are_found(changes, shelf, monkeypatch):
    """They are what a program runs that knows no adapters."""
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(shelf))
    for change in changes:
        verdict = judged(edit_graph(shelf, change), only=["team"])
    assert not verdict.passed
    assert {departure.check for departure in verdict.departures} == {"graph"}


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_a_graph_that_is_wrong_where_adapters_are_left_out_is_found_by_running_it(layer_by_layer, shelf, monkeypatch):
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(shelf))
    monkeypatch.setattr("teamlora_export.validate.shelf.default_departures", lambda _: iter(()))
    both = edit_graph(edit_graph(shelf, first_slot_by_default), weights_by_default)
    verdict = judged(both, only=["team"], layer_by_layer=layer_by_layer)
    failed = [case.name for case in verdict.cases if not case.passed]
    assert failed == ["no adapter is given"]
    assert "in row 1 with the base alone" in verdict.departure.reason


def test_a_bundle_has_passed_when_all_on_its_shelf_has(shelf, shelf_adapters, monkeypatch):
    """Not when what is left of it has, nor after a change of the shelf."""
    failing: set[str] = {"team"}

    def judge(*given: object) -> Verdict:
        good, name = judged_before(shelf), given[-1]
        bad = Departure("modules", "layer", "node", "it errs")
        return dataclasses.replace(good, departures=(bad,)) if name in failing else good

    monkeypatch.setattr("teamlora_export.validate.run._judge_export", judge)
    monkeypatch.setattr("teamlora_export.validate.run.judge_mixed", lambda *_: judged_before(shelf))

    def passed(*only: str) -> bool | None:
        judged(read_bundle(shelf.folder), only=list(only))
        return state()

    def state() -> bool | None:
        found = read_bundle(shelf.folder).manifest.validation
        return None if found is None else found["passed"]

    assert passed("small") is None
    assert passed() is False
    assert passed("small") is False, "what is wrong with another is not mended by it"
    failing.clear()
    assert passed("team") is False, "batches of several are not judged again"
    assert passed() is True
    assert passed("small") is True
    replace_adapter(shelf.folder, "small", shelf_adapters["lora"])
    assert state() is None
    assert passed("small", "team", "lora", "hydra", "moe") is True
    failing.add("lora")
    assert passed("lora") is False
    remove_adapter(shelf.folder, "lora")
    assert state() is None


def test_numbers_in_the_padding_of_a_smaller_adapter_are_found(shelf):
    """An expert that it does not have takes part in the routing."""
    file = shelf.folder / shelf.manifest.shelf["adapters"]["small"]["file"]
    tensors = load_file(file)
    name = next(key for key in tensors if key.startswith("model.layers.1.self_attn.o_proj") and key.endswith("mix"))
    leaking = tensors[name].copy()
    leaking[0, 3, 3] = 1.0
    save_file({**tensors, name: leaking}, file)
    verdict = judged(rehashed(shelf), only=["small"])
    assert not verdict.passed
    assert {departure.module for departure in verdict.departures if departure.check == "weights"} == {
        "model.layers.1.self_attn.o_proj"
    }
    assert {departure.check for departure in verdict.departures} == {"weights", "modules", "rows"}


def test_a_slot_that_is_stale_after_a_swap_is_found(shelf, monkeypatch):
    """Only the first adapter of each slot is ever copied into it."""
    take = Adapters.take

    def stale(self: Adapters, adapter: Shelved) -> int | None:
        held = {name: array.copy() for name, array in self.memory.items()}
        used = list(self._content)
        slot = take(self, adapter)
        if slot is not None and used[slot] not in (None, adapter.key):
            for name, array in held.items():
                self.memory[name][slot] = array[slot]
        return slot

    monkeypatch.setattr(Adapters, "take", stale)
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(shelf))
    verdict = judged(shelf)
    assert not verdict.passed
    batches = [case for case in verdict.cases if case.name.startswith("rows of ")]
    assert [case.passed for case in batches] == [True, False, False], "the first three have slots of their own"
    assert [case.passed for case in verdict.cases if case.name == "no adapter is given"] == [True]
    assert {departure.check for departure in verdict.departures} == {"rows"}


def judged_before(bundle: Bundle) -> Verdict:
    """Stands for what is judged of each adapter by itself."""
    nothing = ErrorStats(0.0, 0.0, 1.0)
    case = CaseResult("before", (Judgement("logits", nothing, nothing, 1.0),))
    return Verdict(bundle.manifest.dtype, (case,))


def test_two_rows_that_are_exchanged_are_found(shelf, monkeypatch):
    """Each of two tenants has the other's adapter."""
    seat = MixedRunner.seat

    def exchanged(self: MixedRunner, rows: list[str | None]) -> None:
        seat(self, rows)
        if rows:
            self._rows[[0, 2]] = self._rows[[2, 0]]

    monkeypatch.setattr(MixedRunner, "seat", exchanged)
    monkeypatch.setattr("teamlora_export.validate.run._judge_export", lambda *_: judged_before(shelf))
    verdict = judged(shelf, only=["team", "lora"])
    assert {departure.check for departure in verdict.departures} == {"rows"}
    first = verdict.departure
    assert first.module == "model.layers.0.self_attn.q_proj"
    assert first.node == "model.layers.0.self_attn.q_proj+k_proj+v_proj/MixedExpertProjection"
    assert "in row 1 with team (rows of team, none, lora, team)" in first.reason


def test_another_adapter_under_a_name_is_refused_before_anything_runs(shelf, shelf_adapters):
    with pytest.raises(ExportError, match="is not the adapter small that is judged here"):
        judged(shelf, adapter_folder={"small": shelf_adapters["lora"]})
    with pytest.raises(ExportError, match="has no adapter 'nobody'; it has hydra, lora, moe, small, team"):
        judged(shelf, only=["nobody"])
    with pytest.raises(ExportError, match="fp16: no engine of that name"):
        judged(shelf, engine_name="fp16")
    with pytest.raises(ExportError, match="is measured beside a base that is in memory as a whole"):
        judged(shelf, layer_by_layer=True, quality=True)
    with pytest.raises(ExportError, match="what is not measured has no threshold"):
        judged(shelf, quality=False, thresholds=Thresholds())


def test_an_adapter_that_is_added_while_another_is_judged_stays_on_the_shelf(shelf, shelf_adapters, monkeypatch):
    def add_meanwhile(*_: object):  # type: ignore[no-untyped-def]
        add_adapter(Path(shelf.folder), "late", shelf_adapters["moe"])
        return judged_before(shelf)

    monkeypatch.setattr("teamlora_export.validate.run._judge_export", add_meanwhile)
    assert judged(shelf, only=["lora"]).not_kept is None
    kept = json.loads((shelf.folder / "manifest.json").read_text())["shelf"]["adapters"]
    assert kept["late"]["validation"] is None
    assert np.isfinite(kept["lora"]["validation"]["cases"])
