"""Texts that a scheduler writes, and what each of them is alone."""

from __future__ import annotations

from collections.abc import Sequence

from teamlora_export.deploy.answers import Answer
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.slots import Slots


def greedy(model: Slots, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """What each text is alone."""
    alone = Model(model._session.folder, threads=1)
    return [alone.generate([prompt], count)[0] for prompt in prompts]


def tokens(answer: Answer) -> list[int]:
    return [token.id for token in answer]


def finish(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.turn()


def at_work(model: Slots) -> int:
    return sum(length > 0 for length in model.lengths)


def tokens_after(scheduler: Scheduler, prompt: list[int], count: int) -> list[int]:
    answer = scheduler.submit(prompt, count)
    finish(scheduler)
    return tokens(answer)
