"""Adapters of a shelf on modules that read one place of each text, [batch, in]: a pooler, a classifier's head."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from conftest import list_again
from faults import judged
from onnx import helper
from shelves import write_family

from teamlora_export.bench.graphs import written_graphs
from teamlora_export.bundle import read_bundle
from teamlora_export.deploy.runner import Model
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.export import export_onnx

POOLER = "bert.pooler.dense"
FORMS = ("function", "standard")


@pytest.fixture(scope="module")
def heads(make_base, tmp_path_factory):  # type: ignore[no-untyped-def]
    """By the op's form: a bundle of the tiny BERT with two adapters on all that is called `dense`."""
    base, folder = make_base("bert"), tmp_path_factory.mktemp("heads")
    adapters = {
        "team": write_family(folder / "team", base, "teamlora", ("dense",), 4, 2, seed=1),
        "lora": write_family(folder / "lora", base, "lora", ("dense", "query"), 2, 1, seed=2),
    }
    return {form: export_onnx(base.name, adapters, folder / form, slots=2, op_form=form) for form in FORMS}


@pytest.mark.parametrize(("form", "native"), [("function", False), ("function", True), ("standard", False)])
def test_they_are_judged_as_any_module_is(form, native, heads, tmp_path):
    assert POOLER in heads[form].manifest.refit["projections"]
    shutil.copytree(heads[form].folder, tmp_path / "bundle")
    library = build_library().path if native else None
    verdict = judged(read_bundle(tmp_path / "bundle"), library=library)
    assert verdict.passed, [*verdict.departures, *(case for case in verdict.cases if not case.passed)]
    seen = {judgement.name for check in verdict.local for judgement in check.judgements}
    assert {f"{POOLER}/{part}" for part in ("input", "base", "experts")} | {POOLER} <= seen


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_see_each_others_adapters(form, heads):
    model = Model(heads[form].folder)
    inputs, names = [[5, 6, 7], [5, 6, 7], [9, 3]], ["team", None, "lora"]
    together = model.encode(inputs, names)
    alone = [model.encode([ids], [name])[0] for ids, name in zip(inputs, names, strict=True)]
    assert np.allclose(together, alone, atol=1e-5)
    with written_graphs(heads[form]) as graphs:
        bypassed = Model(graphs.bypassed, check=False).encode(inputs)
    assert np.allclose(bypassed, model.encode(inputs), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_a_fault_of_one_is_found_and_located(heads, tmp_path):
    def break_pooler(model: onnx.ModelProto) -> None:
        """Every row has the slot before its own."""
        less = helper.make_tensor("one_less", onnx.TensorProto.INT32, [1], [1])
        model.graph.initializer.append(less)
        [node] = [n for n in model.graph.node if n.op_type == "MixedExpertProjection" and POOLER in n.output[0]]
        node.input[5] = "wrong_slot"
        model.graph.node.insert(0, helper.make_node("Sub", ["adapter", "one_less"], ["wrong_slot"], name="fault"))

    shutil.copytree(heads["function"].folder, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    model = onnx.load(bundle.model, load_external_data=False)
    break_pooler(model)
    onnx.save(model, bundle.model)
    verdict = judged(list_again(bundle.folder), only=["team"])
    assert not verdict.passed
    # The slot before holds no numbers, which spread.
    assert next(d for d in verdict.departures if d.check == "modules").module == POOLER
