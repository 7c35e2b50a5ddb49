"""The trained layer against the reference layer, its losses against their formulas, and what a family trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from formula import FAMILIES, random_projection
from torch import nn

from teamlora_export.adapter import read_adapter, write_adapter
from teamlora_export.errors import ExportError
from teamlora_export.model.layer import ExpertLinear
from teamlora_export.train import TrainOptions, count_parameters
from teamlora_export.train.checkpoint import Checkpoint, Standing, State
from teamlora_export.train.evaluate import token_losses
from teamlora_export.train.model import TrainedLinear, routing_of, start_adapter, trained_parameters
from teamlora_export.train.trainer import AdapterTrainer


def gradients(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    layer(x).square().mean().backward()
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_it_computes_what_the_reference_layer_does_with_its_gradients(family, packed, rng):
    projection = random_projection(rng, family)
    linear = nn.Linear(projection.in_features, projection.out_features).requires_grad_(False)
    reference, trained = ExpertLinear(linear, projection), TrainedLinear(linear, projection, family, 0.0, packed)
    x = torch.tensor(rng.normal(size=(2, 5, projection.in_features)), dtype=torch.float32)
    # 1e-5: float32, a few dozen products of numbers of order one, in another order.
    assert torch.allclose(trained(x), reference(x), rtol=1e-5, atol=1e-5)
    expected, found = gradients(reference, x), gradients(trained, x)
    assert set(found) == set(trained.trained())
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-5), name


def test_a_family_trains_what_it_has_and_nothing_else(rng):
    def trained(family: str) -> set[str]:
        projection = random_projection(rng, family)
        linear = nn.Linear(projection.in_features, projection.out_features).requires_grad_(False)
        return set(TrainedLinear(linear, projection, family, 0.0, True).trained())

    assert trained("teamlora") == {"down", "router", "interaction", "up"}
    assert trained("hydralora") == trained("moelora") == {"down", "router", "up"}
    assert trained("lora") == {"down", "up"}


def test_beside_a_base_in_16_bits_the_adapter_is_trained_in_float32(rng):
    projection = random_projection(rng, "teamlora")
    linear = nn.Linear(projection.in_features, projection.out_features).bfloat16().requires_grad_(False)
    layer = TrainedLinear(linear, projection, "teamlora", 0.0, True)
    assert {p.dtype for p in layer.trained().values()} == {torch.float32}
    x = torch.tensor(rng.normal(size=(2, 5, projection.in_features))).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients(layer, x).values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_leaves_the_base_as_it_is_and_is_read_back_as_it_was_written(family, make_base, tmp_path):
    base = make_base("gpt2")
    options = TrainOptions(base.name, ("rows.jsonl",), "out", family=family, rank=8, experts=2, seed=5)
    adapter = start_adapter(base.signature, options)
    assert all(not up.any() for projection in adapter.projections.values() for up in projection.ups)
    assert {path.rpartition(".")[2] for path in adapter.projections} == {"c_attn", "c_proj", "c_fc"}
    assert sum(p.num_parameters for p in adapter.projections.values()) >= count_parameters(options)
    again = start_adapter(base.signature, options)
    for path, projection in adapter.projections.items():
        assert np.array_equal(projection.down, again.projections[path].down), "the seed decides"
    write_adapter(adapter, tmp_path)
    read = read_adapter(tmp_path)
    assert read.family == family and read.projections.keys() == adapter.projections.keys()
    for path, projection in adapter.projections.items():
        found = read.projections[path]
        assert (found.scaling, found.routing_sum) == (projection.scaling, projection.routing_sum) and found.scaling == 2
        for name in ("down", "interaction", "ups") + (("router",) if family != "lora" else ()):
            assert np.array_equal(getattr(found, name), getattr(projection, name)), name


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("q_proj", "nope"), "nope"),
        (("nope", "q_proj", "embed_tokens"), "nope, embed_tokens"),
        (r".*\.nope", r".*\.nope"),
        # Of names a whole part is meant.
        (("proj",), "proj"),
    ],
)
def test_each_target_is_the_name_of_a_linear_layer(targets, told, make_base):
    base = make_base("llama")
    options = TrainOptions(base.name, ("rows.jsonl",), "out", targets=targets)
    for ask in (start_adapter, trained_parameters):
        with pytest.raises(ExportError) as found:
            ask(base.signature, options)
        assert str(found.value).startswith(f"--targets {told}: names no linear layer of ")
        assert str(found.value).endswith("It has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj.")
    whole = "model.layers.1.mlp.up_proj"
    for targets in (("o_proj", whole), rf".*\.o_proj|{whole}"):
        adapter = start_adapter(base.signature, dataclasses.replace(options, targets=targets))
        assert {path for path in adapter.projections if not path.endswith("o_proj")} == {whole}


def test_teamlora_starts_its_interaction_as_published(make_base):
    base = make_base("llama")
    options = TrainOptions(base.name, ("rows.jsonl",), "out", targets=("q_proj",))
    matrices = [p.interaction for p in start_adapter(base.signature, options).projections.values()]
    for matrix in matrices:
        assert not np.diag(matrix).any()
    others = np.concatenate([matrix[~np.eye(4, dtype=bool)] for matrix in matrices])
    assert 0.05 < np.abs(others).max() <= 0.1


def test_routing_of_flattened_tokens_is_that_of_rows_and_tokens(rng):
    projection = random_projection(rng, "teamlora")
    linear = nn.Linear(projection.in_features, projection.out_features).requires_grad_(False)
    layers = [TrainedLinear(linear, projection, "teamlora", 0.0, True) for _ in range(2)]
    x = torch.tensor(rng.normal(size=(2, 5, projection.in_features)), dtype=torch.float32)
    layers[0](x)
    layers[1](x.flatten(0, 1))
    routing = routing_of(layers, (2, 5))
    assert routing is not None and routing.shape[:3] == (2, 2, 5)
    # 1e-6: float32, perhaps other sums.
    assert torch.allclose(routing[0], routing[1], atol=1e-6)


def test_the_losses_of_experts_follow_their_formulas_and_leave_padding_out():
    class Trainer(AdapterTrainer):
        def __init__(self, options: TrainOptions) -> None:
            self.options, self._shares = options, []

    options = TrainOptions("base", ("rows.jsonl",), "out", balance_weight=2.0, experts=2, rank=2)
    # One layer, two rows of two tokens, of which one is padding; shares of two experts.
    routing = torch.tensor([[[[0.9, 0.1], [0.5, 0.5]], [[0.7, 0.3], [0.0, 1.0]]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    use = (0.9 + 0.5 + 0.7) / 3
    balance = (use - 0.5) ** 2
    trainer = Trainer(options)
    assert float(trainer._routing_loss(routing, mask)) == pytest.approx(2 * balance)
    assert trainer._shares[0][0] == pytest.approx(balance)
    # As published, of w that sums to k (README: Training).
    published = np.mean(np.square(2 * np.array([use, 1 - use]) - 1 / 2))
    assert published == pytest.approx(2**2 * balance + (1 - 1 / 2) ** 2)
    assert trainer._shares[0][1].tolist() == pytest.approx([use, 1 - use])
    # Of w = 2 shares, what is above 1.5: 0.3 of the first token's first expert.
    over = Trainer(dataclasses.replace(options, overconfidence_weight=3.0))
    assert float(over._routing_loss(routing, mask)) == pytest.approx(2 * balance + 3 * 0.3 / 3 / 2)


def test_each_process_has_its_own_random_numbers_again():
    class Trainer(AdapterTrainer):
        def __init__(self, states: torch.Tensor, rank: int) -> None:
            self.resumed = Checkpoint(Path("checkpoint-1"), 1, {"random.cpu": states}, State(Standing(), [], {}))
            self.args = SimpleNamespace(process_index=rank)

    states, drawn = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
        drawn.append(torch.rand(3).tolist())
    for rank in range(2):
        Trainer(torch.stack(states), rank)._load_rng_state("checkpoint-1")
        assert torch.rand(3).tolist() == drawn[rank]


def test_the_loss_is_that_of_the_answers_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[-100, 1, 4], [-100, -100, 0]])
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    found = token_losses(logits, labels)
    assert torch.allclose(found, expected)
    found.sum().backward()
    assert logits.grad is not None and not logits.grad[:, 0].any()
