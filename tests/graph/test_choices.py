"""Every top-k of a model's code is seen, and judged by what it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from teamlora_export.graph.choices import SeesChoices, chosen_scores


class Chooses(nn.Module):
    def __init__(self, top_k) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.forward = top_k


@pytest.mark.parametrize(
    "top_k",
    [
        lambda x: torch.topk(x, 2),
        lambda x: torch.topk(input=x, k=2, dim=1, sorted=False),
        lambda x: x.topk(2, -1),
        lambda x: x.topk(k=2),
    ],
)
def test_every_way_to_call_it_is_seen_with_the_module_that_does(top_k):
    model, seen = Chooses(top_k), []

    def choose(path: str, scores: Tensor, best):
        seen.append(path)
        values, indices = best(scores)
        return values, indices + 1

    scores = torch.tensor([[1.0, 5.0, 3.0, 0.0]])
    with SeesChoices(model, choose):
        values, indices = model.router(scores)
    assert seen == ["router"]
    assert sorted(values[0].tolist()) == [3.0, 5.0]
    assert sorted(indices[0].tolist()) == [2, 3]
    assert sorted(model.router(scores).indices[0].tolist()) == [1, 2], "and no longer, afterwards"


def test_the_best_along_another_axis_are_no_choice():
    model = Chooses(lambda x: x.topk(1, 0))
    with SeesChoices(model, lambda *_: pytest.fail("seen")):
        model.router(torch.zeros(2, 3))


def test_of_two_that_score_alike_either_may_be_taken_and_what_is_not_there_may_not():
    scores = {"gate/scores": np.array([[0.25, 0.5, 0.25]])}

    def taken(*indices: int) -> list[float]:
        return chosen_scores({"gate/choice": np.array([indices])}, scores)["gate/choice"][0].tolist()

    assert taken(1, 0) == taken(2, 1) == [0.5, 0.25]
    assert taken(0, 2) == [0.25, 0.25]
    assert np.isnan(taken(1, 3)).any()
