"""The loss of held-out answers and the use of the experts, by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from teamlora_export.train.encode import Encoded
from teamlora_export.train.model import TrainedLinear, forget_routing, routing_of


@dataclass(frozen=True)
class Measured:
    """Sums over rows, float64.

    Attributes:
        losses: of all answers' tokens, [tasks]. answers: number of those tokens, [tasks].
        use: of the experts, summed over all tokens, [tasks, layers, k]; None where there are none (lora).
        tokens: number of all tokens, [tasks].
    """

    losses: np.ndarray
    answers: np.ndarray
    use: np.ndarray | None
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """The mean over the tokens of all answers."""
        return float(self.losses.sum() / self.answers.sum())

    def by_task(self, tasks: Sequence[str]) -> dict[str, float]:
        """The mean loss of a token of each task's answers."""
        return {
            task: float(loss / count)
            for task, loss, count in zip(tasks, self.losses, self.answers, strict=True)
            if count
        }

    def shares(self) -> np.ndarray | None:
        """How much each expert is used, [tasks, layers, k]; each sums to 1. NaN where a task has no row."""
        if self.use is None:
            return None
        with np.errstate(invalid="ignore"):
            return self.use / self.tokens[:, None, None]

    def balance(self) -> float | None:
        """The balance loss over all tokens."""
        if self.use is None:
            return None
        share = self.use.sum(axis=0) / self.tokens.sum()
        return float(np.square(share - 1.0 / share.shape[-1]).mean())


def measure(
    model: nn.Module,
    layers: Sequence[TrainedLinear],
    rows: Sequence[Encoded],
    num_tasks: int,
    batch: int,
    collate: Callable[[Sequence[Encoded]], dict[str, Any]],
    *,
    part: tuple[int, int] = (0, 1),
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Run `model` over `rows`, in evaluation mode; it has its own mode again afterwards.

    Args:
        part: (i, n): the i-th of n parts of the rows, for one of several processes.
        between: called before each batch; it may raise.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids))
    batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)][part[0] :: part[1]]
    losses, answers, tokens = (np.zeros(num_tasks) for _ in range(3))
    use: np.ndarray | None = None
    if layers and layers[0].routes:
        use = np.zeros((num_tasks, len(layers), layers[0].up.shape[0]))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        for rows_of_one in batches:
            between()
            inputs = {name: value.to(device) for name, value in collate(rows_of_one).items()}
            labels = inputs.pop("labels")[:, 1:]
            forget_routing(layers)
            with torch.no_grad():
                logits = model(**inputs).logits[:, :-1]
                of_each = token_losses(logits, labels).sum(dim=1).double().cpu().numpy()
                shares = _summed_shares(layers, inputs["attention_mask"])
            for i, row in enumerate(rows_of_one):
                losses[row.task] += of_each[i]
                answers[row.task] += len(row.ids) - row.prompt_length
                tokens[row.task] += len(row.ids)
                if use is not None and shares is not None:
                    use[row.task] += shares[:, i]
    finally:
        model.train(training)
    return Measured(losses, answers, use, tokens)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in float32 of what is learned, [rows, tokens]; 0 elsewhere.

    Args:
        logits: [rows, tokens, vocabulary]. labels: [rows, tokens], the token that comes next; -100: not learned.
    """
    learned = labels != -100
    found = torch.zeros(labels.shape, device=labels.device)
    values = nn.functional.cross_entropy(logits[learned].float(), labels[learned], reduction="none")
    return found.masked_scatter(learned, values)


def _summed_shares(layers: Sequence[TrainedLinear], mask: torch.Tensor) -> np.ndarray | None:
    """Of each layer and row, the experts' shares summed over its tokens, [layers, rows, k]."""
    routing = routing_of(layers, mask.shape)
    if routing is None:
        return None
    return torch.einsum("lbsk,bs->lbk", routing, mask.float()).double().cpu().numpy()
