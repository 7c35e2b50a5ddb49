"""Every supported architecture, adapter on all its projections: exported, validated, and the same graph as a full
trace."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime_genai as og
import pytest
import torch
from conftest import ARCHITECTURES, MIXTURES, OTHERS, ROTATIONS
from cpp_programs import run
from shelves import write_family

from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.deploy.cpp import deploy_cpp
from teamlora_export.deploy.genai import deploy_genai
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.words import encode_text
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.graph import op
from teamlora_export.graph.build import build_graph
from teamlora_export.graph.read import port_of
from teamlora_export.graph.stamp import same_constant, same_operation
from teamlora_export.graph.weights import recipe_of
from teamlora_export.progress import Reporter
from teamlora_export.shelf import add_adapter
from teamlora_export.validate.run import validate_bundle


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXTURES, *ROTATIONS])
def test_a_bundle_of_every_architecture_equals_pytorch(name, make_bundle):
    bundle = make_bundle(name)
    verdict = validate_bundle(bundle)
    assert verdict.passed, verdict.departure or verdict.worst
    assert bundle.manifest.op["nodes"] > 0


# Windows of two kinds, positions that are learned, a mixture.
@pytest.mark.parametrize("name", ["mistral", "gemma3", "opt", "qwen2_moe", "unapplied window"])
def test_a_cache_in_place_equals_pytorch_wherever_its_rows_stand(name, make_bundle):
    verdict = validate_bundle(make_bundle(name, cache="in-place"))
    assert verdict.passed, verdict.departure or verdict.worst


@pytest.mark.parametrize("name", [name for name, known in ARCHITECTURES.items() if known.task == "text-generation"])
def test_words_go_in_and_come_out_alike_of_python_genai_and_cpp(name, make_bundle, cpp_programs, tmp_path):
    model = Model(deploy_python(make_bundle(name), tmp_path / "python"))
    prompts = ["Once upon a time", "The License does not"]
    ids = [encode_text(model.tokenizer, prompt) for prompt in prompts]
    answers = model.generate(ids, 20)
    expected = [model.tokenizer.decode(answer) for answer in answers]

    folder = deploy_cpp(make_bundle(name), tmp_path / "cpp") / "model"
    told = run(cpp_programs / "deployed" / "runner", "--model", folder, "--tokens", 20, *prompts)
    assert told.stdout == "".join(map("{}{}\n".format, prompts, expected)), told.stderr

    genai = og.Model(str(deploy_genai(make_bundle(name), tmp_path / "genai")))
    tokenizer = og.Tokenizer(genai)
    tokenizer.update_options(add_special_tokens="true")
    assert [tokenizer.encode(prompt).tolist() for prompt in prompts] == ids
    parameters = og.GeneratorParams(genai)
    parameters.set_search_options(max_length=len(ids[0]) + 20)
    generator = og.Generator(genai, parameters)
    generator.append_tokens(ids[0])
    stream, text = tokenizer.create_stream(), ""
    while not generator.is_done():
        generator.generate_next_token()
        text += stream.decode(generator.get_next_tokens()[0])
    assert text == expected[0]


_HALF = [("llama", "fp16"), ("llama", "bf16"), ("gemma3", "bf16"), ("gpt2", "fp16"), ("bert", "bf16")]


@pytest.mark.parametrize(("name", "dtype"), [*_HALF, *((name, "fp16") for name in OTHERS)])
def test_half_precision_errs_no_more_than_pytorch_does(name, dtype, make_bundle):
    verdict = validate_bundle(make_bundle(name, dtype))
    assert verdict.passed, verdict.departure or verdict.worst


def test_the_inlined_form_equals_pytorch_and_holds_standard_ops_only(make_bundle):
    bundle = make_bundle("llama", op_form="standard")
    model = ir.load(bundle.model)
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions
    assert validate_bundle(bundle).passed


# One of each way to be made of layers; what each layer computes is compared for every model (graph/record.py).
@pytest.mark.parametrize(
    ("name", "in_place", "traced"),
    [
        ("gpt2", False, "2 of 4 layers"),
        # Of two kinds of layers two each.
        ("gemma3", True, "4 of 7 layers"),
    ],
)
def test_repeating_traced_layers_gives_the_graph_of_the_full_trace(
    name, in_place, traced, make_base, make_adapter, capsys
):
    base = make_base(name)
    adapter = align_with_base(read_adapter(make_adapter(name)), base.signature)
    stamped = build_graph(base, adapter, torch.float32, Reporter(), in_place=in_place)
    told = capsys.readouterr().err
    assert traced in told and "not alike" not in told
    full = build_graph(base, adapter, torch.float32, Reporter(quiet=True), in_place=in_place, every_layer=True)
    assert list(map(port_of, stamped.graph.inputs)) == list(map(port_of, full.graph.inputs))
    assert [v.name for v in stamped.graph.outputs] == [v.name for v in full.graph.outputs]
    assert len(stamped.graph) == len(full.graph)
    assert_same_computation(stamped, full)


def assert_same_computation(left: ir.Model, right: ir.Model) -> None:
    """Walk both graphs from their outputs, in step: equal operations, equal constants, equal recipes, equal inputs."""
    twin: dict[ir.Value, ir.Value] = {}
    waiting = list(zip(left.graph.outputs, right.graph.outputs, strict=True))
    while waiting:
        a, b = waiting.pop()
        if a in twin:
            assert twin[a] is b or same_constant(twin[a], b), (a.name, b.name)
            continue
        twin[a] = b
        m, n = a.producer(), b.producer()
        if m is None or n is None:
            assert m is n, (a.name, b.name)
            same_recipe = recipe_of(a) is not None and recipe_of(a) == recipe_of(b)
            same_input = a.is_graph_input() and a.name == b.name
            assert same_recipe or same_input or same_constant(a, b), (a.name, b.name)
            continue
        assert same_operation(m, n), (m.name, n.name)
        assert a.index() == b.index()
        waiting.extend((x, y) for x, y in zip(m.inputs, n.inputs, strict=True) if x is not None and y is not None)


def test_an_adapter_on_packed_experts_is_refused_by_name(make_base, make_adapter):
    adapter = read_adapter(make_adapter("mixtral"))
    path, projection = next(iter(adapter.projections.items()))
    packed = "model.layers.0.mlp.experts.1.gate_proj"
    changed = replace(adapter, projections={path: projection, packed: replace(projection, path=packed)})
    with pytest.raises(ExportError, match=rf"{packed}: the base keeps model.layers.0.mlp.experts's weights .* packed"):
        align_with_base(changed, make_base("mixtral").signature)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2"])
def test_siblings_are_packed_with_their_base_projections(name, make_bundle):
    model = ir.load(make_bundle(name).model)
    nodes = [node for node in model.graph if op.is_op(node)]
    siblings = {"llama": {1, 2, 3}, "qwen2": {1, 2, 3}, "phi3": {1}, "gpt2": {1}}[name]
    assert {len(node.attributes["out_splits"].as_ints()) for node in nodes} == siblings
    for node in nodes:
        base = node.inputs[1].producer()
        assert base.op_type in ("MatMul", "Add", "Gemm"), "sibling bases are one product, not a concatenation"


def test_a_graph_is_strongly_typed_in_its_own_dtype(make_bundle):
    model = ir.load(make_bundle("llama", "fp16").model)
    for node in model.graph:
        if op.is_op(node) or node.op_type == "MatMul":
            kinds = {v.dtype for v in (*node.inputs, *node.outputs) if v.name and not v.name.endswith("mix")}
            assert kinds <= {ir.DataType.FLOAT16, None}, node
    weights = [v for v in model.graph.initializers.values() if np.prod(v.shape.numpy()) > 64]
    assert {v.const_value.dtype for v in weights if not v.name.endswith("mix")} <= {
        ir.DataType.FLOAT16,
        ir.DataType.INT64,
    }


def test_a_comol_adapter_is_exported_and_found_right_alone_and_on_a_shelf(make_base, make_shelf, tmp_path):
    base = make_base("llama")
    adapter = write_family(tmp_path / "comol", base, "comol", ("v_proj", "o_proj", "up_proj", "down_proj"), r=2, k=3)
    bundle = export_onnx(base.name, adapter, tmp_path / "bundle")
    assert validate_bundle(bundle).passed
    shelf = shutil.copytree(make_shelf().folder, tmp_path / "shelf")
    add_adapter(shelf, "comol", adapter)
    prompts = [[5, 6, 7], [200, 100, 50, 25, 12], [44, 45, 46, 47]]
    alone = Model(bundle.folder).generate(prompts, 12)
    assert alone != Model(shelf).generate(prompts, 12), "its experts change the text"
    assert Model(shelf).generate([*prompts, [9]], 12, adapters=["comol"] * 3 + [None])[:3] == alone
