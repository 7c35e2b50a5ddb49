"""The reference layer against the formula of `tests/formula.py`; injection; training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_adapter
from formula import FAMILIES, by_formula, random_projection
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from teamlora_export.adapter import align_with_base, read_adapter
from teamlora_export.model.balance import add_balance_loss, balance_loss
from teamlora_export.model.inject import extract, inject
from teamlora_export.model.layer import ExpertLinear


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_layer_equals_the_formula_in_float64(family, kind, rng):
    projection = random_projection(rng, family)
    linear = (nn.Linear(7, 6) if kind is nn.Linear else Conv1D(6, 7)).double()
    x = torch.tensor(rng.normal(size=(2, 5, 7)))
    expected = by_formula(projection, x.numpy(), linear(x).detach().numpy())
    found = ExpertLinear(linear, projection)(x).detach().numpy()
    # 1e-12: sums of a few dozen products of numbers of order one, in float64.
    assert np.abs(found - expected).max() < 1e-12


def test_injection_keeps_the_names_of_the_bases_parameters(make_base, make_adapter):
    base = make_base("gpt2")
    model = base.load(torch.float32)
    before = set(model.state_dict())
    inject(model, align_with_base(read_adapter(make_adapter("gpt2")), base.signature))
    assert before <= set(model.state_dict())


def test_what_is_extracted_is_what_was_injected(make_base):
    base = make_base("llama")
    adapter = random_adapter(base, ARCHITECTURES["llama"].targets)
    model = base.load(torch.float32)
    inject(model, adapter)
    # What it was made of does not count: the values come out of the model.
    found = extract(model, random_adapter(base, ARCHITECTURES["llama"].targets, seed=1))
    for path, projection in adapter.projections.items():
        for name in ("down", "router", "interaction", "ups"):
            assert np.array_equal(getattr(found.projections[path], name), getattr(projection, name)), name


def test_generate_works_on_an_adapted_model_unchanged(make_base, make_adapter):
    base = make_base("llama")
    plain, adapted = base.load(torch.float32), base.load(torch.float32)
    inject(adapted, align_with_base(read_adapter(make_adapter("llama")), base.signature))
    ids = torch.tensor([[5, 9, 200, 31]])
    texts = [m.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None) for m in (plain, adapted)]
    assert texts[0].shape == texts[1].shape == (1, 12)
    assert not torch.equal(texts[0], texts[1])


def test_the_balance_loss_is_zero_for_equal_use_and_follows_its_formula(rng):
    def loss(*layers: list[list[float]]) -> float:
        """Of layers in which each token uses the experts in such shares."""
        model = nn.ModuleList(ExpertLinear(nn.Linear(7, 6), random_projection(rng, "teamlora")) for _ in layers)
        for layer, shares in zip(model, layers, strict=True):
            layer.last_routing = layer.routing_sum * torch.tensor(shares)
        return float(balance_loss(model))

    equal, by_turns, alone = [[0.5, 0.5]] * 2, [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0]] * 2
    assert loss(equal) == loss(by_turns) == 0.0
    assert loss(alone) == pytest.approx(0.25)
    assert loss(alone, equal) == pytest.approx(0.125)


def test_transformers_trainer_trains_the_adapter_with_the_balance_loss(make_base, tmp_path):
    base = make_base("llama")
    model = base.load(torch.float32)
    adapter = random_adapter(base, ARCHITECTURES["llama"].targets)
    inject(model, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in ("down", "router", "interaction", "up"))
    handle = add_balance_loss(model, 0.5)
    batch = {"input_ids": torch.randint(1, 300, (8,)), "labels": torch.randint(1, 300, (8,))}

    model.train()
    both = {name: value[None] for name, value in batch.items()}
    with_balance = model(**both).loss
    balance = balance_loss(model)
    expected = with_balance - 0.5 * balance
    path = next(iter(adapter.projections))
    (gradient,) = torch.autograd.grad(balance, model.get_submodule(path).router)
    assert gradient.abs().max() > 0, "it is trained"
    handle.remove()
    assert torch.isclose(model(**both).loss, expected)

    add_balance_loss(model, 0.5)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=[batch] * 24).train()
    trained = extract(model, adapter)
    for name in ("down", "router", "interaction", "ups"):
        assert not np.array_equal(getattr(trained.projections[path], name), getattr(adapter.projections[path], name)), (
            name
        )
