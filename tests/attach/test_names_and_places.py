"""What names and places of a foreign graph say, and modules that they do not tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from foreign_graphs import IN, Graph, adapter_of, matmul

from teamlora_export.attach.match import find_modules
from teamlora_export.attach.names import are_apart, key_of, towers_of
from teamlora_export.attach.run import attach
from teamlora_export.errors import ExportError

VISION, TEXT = (f"{each}_model.encoder.layers.0.self_attn.q_proj" for each in ("vision", "text"))


def square(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(IN, IN)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("layers.0.attn.Wo", "o of layer 0"),
        ("layers.0.mlp.Wo", "mlp.wo of layer 0"),
        ("transformer_blocks.0.attn.add_q_proj", "attn.add_q_proj of layer 0"),
        ("layers.0.multi_head_attention.q_proj", "q of layer 0"),
        ("layers.0.add.weight", "None"),
        ("/model/layers.3/attn/q_proj/MatMul_Q4", "q of layer 3"),
        ("/model/layers.3/attn/q_proj/Add_output_0", "q of layer 3"),
        ("model.layers.0.attention.wqkv", "qkv of layer 0"),
        ("model.layers.1.mlp.down_proj.add_12", "down of layer 1"),
    ],
)
def test_a_name_says(name, key):
    assert str(key_of(name)) == key


def test_towers_are_apart_where_both_names_say_theirs():
    vision, text = towers_of([VISION]), towers_of(["/text_model/encoder/layers.0/q_proj"])
    assert are_apart(vision, text)
    assert not are_apart(vision, towers_of(["/model/layers.0/attn/q_proj"]))
    assert are_apart(towers_of(["encoder.block.0.q"]), towers_of(["decoder.block.0.q"]))


@pytest.mark.parametrize("paths", [(VISION, TEXT), (VISION,)])
def test_a_module_of_another_tower_is_missing(paths, rng, tmp_path):
    graph = Graph()
    result = matmul(graph, graph.embed(rng), square(rng), "/text_model/encoder/layers.0/self_attn/q_proj")
    foreign = graph.save(tmp_path / "foreign", result)
    adapter_of(rng, tmp_path / "adapter", dict.fromkeys(paths, (IN, IN)))
    with pytest.raises(ExportError, match=rf"{VISION}: is missing: .* of another part of the model"):
        attach(foreign, tmp_path / "adapter", tmp_path / "out")


def test_two_modules_in_one_place_are_refused(rng, tmp_path):
    graph = Graph()
    foreign = graph.save(tmp_path / "foreign", matmul(graph, graph.embed(rng), square(rng), "/layers.0/attn/q_proj"))
    adapter_of(rng, tmp_path / "adapter", dict.fromkeys((VISION, TEXT), (IN, IN)))
    with pytest.raises(ExportError, match=rf"{VISION}: is found in .*, and so is {TEXT}"):
        attach(foreign, tmp_path / "adapter", tmp_path / "out")


def test_groups_of_queries_keys_and_values_are_not_three_products(rng, tmp_path):
    """What InternLM2 packs is in another order than the three side by side."""
    graph, widths = Graph(), {"q": 16, "k": 8, "v": 8}
    x = graph.embed(rng)
    made = [matmul(graph, x, square(rng)[:, :width], f"/layers.0/attn/{n}_proj") for n, width in widths.items()]
    foreign = graph.save(tmp_path / "foreign", graph.node("Concat", made, "read", axis=-1))
    adapter_of(rng, tmp_path / "adapter", {"model.layers.0.attention.wqkv": (IN, 32)})
    with pytest.raises(ExportError, match="wqkv: is missing"):
        attach(foreign, tmp_path / "adapter", tmp_path / "out")


def layer_of(graph: Graph, rng: np.random.Generator, folder: Path, gated: str = "shared_expert") -> ir.Model:
    """An attention, and behind it a gated block whose modules have names of their own."""
    x = graph.embed(rng)
    read = [matmul(graph, x, square(rng), f"/model/layers.0/attn/{n}_proj") for n in "qkv"]
    attended = graph.node("MultiHeadAttention", read, "attended", domain="com.microsoft", num_heads=4)
    x = matmul(graph, attended, square(rng), "/model/layers.0/attn/o_proj")
    gate, up = (matmul(graph, x, square(rng), f"/model/layers.0/mlp/{gated}/{n}_proj") for n in ("gate", "up"))
    activated = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], "sigmoid")], "activated")
    joined = graph.node("Mul", [activated, up], "joined")
    return ir.load(graph.save(folder, matmul(graph, joined, square(rng), f"/model/layers.0/mlp/{gated}/down_proj")))


def test_a_name_of_its_own_adds_to_a_place(rng, tmp_path):
    model = layer_of(Graph(), rng, tmp_path)
    sizes = {f"model.layers.0.mlp.shared_expert.{n}_proj": (IN, IN) for n in ("gate", "up", "down")}
    found, problems = find_modules(model.graph, {**sizes, "model.layers.0.self_attn.v_proj": (IN, IN)})
    assert not problems
    assert {answer.evidence for answer in found.values()} == {("name", "place")}
    # One of another layer contradicts it.
    _, problems = find_modules(
        model.graph, {path.replace("layers.0", "layers.1"): size for path, size in sizes.items()}
    )
    assert len(problems) == 3


@pytest.mark.parametrize("equation", ["bqd,bkd->bqk", "bkd,bqd->bqk", "bqd,bkd", "bxd,bxd->bxx"])
def test_the_equation_says_which_are_the_queries(equation, rng, tmp_path):
    graph, is_turned = Graph(), equation.startswith("bkd")
    x = graph.embed(rng)
    made = {n: graph.node("MatMul", [x, graph.weight(f"onnx::{n}", square(rng))], f"out_{n}") for n in "qkvo"[:3]}
    factors = [made["k"], made["q"]] if is_turned else [made["q"], made["k"]]
    shares = graph.node("Softmax", [graph.node("Einsum", factors, "scores", equation=equation)], "shares", axis=-1)
    attended = graph.node("MatMul", [shares, made["v"]], "attended")
    model = ir.load(
        graph.save(tmp_path, graph.node("MatMul", [attended, graph.weight("onnx::o", square(rng))], "out_o"))
    )
    found, problems = find_modules(model.graph, {f"layers.0.self_attn.{n}_proj": (IN, IN) for n in "qkv"})
    if "->bqk" not in equation:
        assert len(problems) == 3
        return
    places = {path: answer.spans[0].product.output.name for path, answer in found.items()}
    assert places == {f"layers.0.self_attn.{n}_proj": f"out_{n}" for n in "qkv"}
