"""Inputs that a validation runs: several batches and lengths, padding on either side, all with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from teamlora_export.errors import ExportError
from teamlora_export.ports import Port
from teamlora_export.tokens import Tokens, longest_input
from teamlora_export.validate.metrics import attended

Feeds = dict[str, np.ndarray]

DECODE_STEPS = 12
# So many tokens in one call, and the native op goes its way for many, whatever the processor
# (`plugins/kernels/cpu/projection.cpp`).
MANY_TOKENS = 96


@dataclass(frozen=True)
class Case:
    """One batch. `mask` is [batch, length]; `steps` tokens are decoded after it where the task generates.

    `part`: the prompt is read in calls of so many tokens, each against the cache of those before; 0 reads all at once.
    `past`: so many tokens stand in the cache before the prompt, whose keys and values are random numbers.
    """

    name: str
    ids: np.ndarray
    mask: np.ndarray
    steps: int = 0
    part: int = 0
    past: int = 0

    @property
    def calls(self) -> int:
        return self.steps + (-(-self.mask.shape[1] // self.part) if self.part else 1)


@dataclass(frozen=True)
class Step:
    """One call of the model: what it is fed, and the mask over all tokens so far. `case` is what it is a step of."""

    feeds: Feeds
    mask: np.ndarray
    case: Case

    def attended(self, name: str, array: np.ndarray) -> np.ndarray:
        """What of an output or module value belongs to real tokens of this step."""
        return attended(name, array, self.mask, self.feeds["input_ids"].shape[1])


def make_cases(config: Any, task: str, seed: int = 0, brief: bool = False, many: bool = False) -> list[Case]:
    """The cases for a model of `config` doing `task`; ids are drawn over the whole vocabulary.

    Args:
        brief: for models that are read from disk on every call: one padded batch, with two decoding steps.
        many: one batch has `MANY_TOKENS` in a call, and more rows than the others.

    Raises:
        ExportError: the configuration does not say how many tokens there are.
    """
    rng = np.random.default_rng(seed)
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if type(vocabulary) is not int or vocabulary < 2:
        raise ExportError(f"{config.name_or_path}: its vocab_size is {vocabulary!r:.80}, so no tokens can be drawn.")
    pad = getattr(text, "pad_token_id", None) or 0
    pad = pad if 0 <= pad < vocabulary else 0
    limit = longest_input(config.to_dict(), Path(config.name_or_path, "config.json")) or 512

    def case(name: str, lengths: list[int], side: str, steps: int = 0) -> Case:
        width = max(lengths)
        mask = np.zeros((len(lengths), width), np.int64)
        for row, length in zip(mask, lengths, strict=True):
            row[width - length :] = side == "left"
            row[:length] |= side == "right"
        ids = rng.integers(0, vocabulary, mask.shape)
        ids[ids == pad] = (pad + 1) % vocabulary
        return Case(name, np.where(mask > 0, ids, pad), mask, steps)

    long = min(48, limit // 2)

    def largest() -> Case:
        rows = 8
        lengths = [MANY_TOKENS // rows - row % 3 for row in range(rows)]
        return case(f"batch of {rows}, padded left", lengths, "left", steps)

    steps = 2 if task == "text-generation" else 0
    if brief:
        return [largest() if many else case("batch of 2, padded left", [9, 4], "left", steps)]
    if task == "text-generation":
        window = getattr(text, "sliding_window", None)
        past = window + 5 if type(window) is int and 0 < window <= limit - 16 else 0
        return [
            case("one prompt", [9], "left", DECODE_STEPS),
            case("batch of 3, padded left", [17, 4, 11], "left", DECODE_STEPS),
            case("batch of 2, padded right", [6, 13], "right"),
            case(f"one prompt of {long}", [long], "left", 2),
            replace(case("batch of 2, read in parts of 5", [14, 9], "left", 2), part=5),
            case("one token", [1], "left", 2),
            *([replace(case("one prompt past a window", [7], "left", 2), past=past)] if past else []),
            *([largest()] if many else []),
        ]
    return [
        case("one sentence", [9], "right"),
        case("batch of 4, padded right", [17, 4, 11, 1], "right"),
        case("batch of 2, padded left", [6, 13], "left"),
        case(f"one sentence of {long}", [long], "right"),
        *([largest()] if many else []),
    ]


def cases_without_padding(tokens: Tokens, task: str, seed: int = 0) -> list[Case]:
    """Cases for a model that is known by its tokens alone: rows of one length."""
    rng = np.random.default_rng(seed)
    vocabulary, limit = tokens.vocabulary or 256, tokens.most or 512
    steps = 2 if task == "text-generation" else 0

    def case(name: str, rows: int, length: int) -> Case:
        shape = (rows, min(length, limit // 2 or 1))
        return Case(name, rng.integers(0, vocabulary, shape), np.ones(shape, np.int64), steps)

    return [case("one text of 17", 1, 17), case("batch of 3, all of 9", 3, 9), case("one token", 1, 1)]


def first_step(inputs: Sequence[Port], case: Case) -> Step:
    """The prompt of a case, or its first part, with the cache that it begins with where the model has one."""
    caches = [port for port in inputs if port.name.startswith("past_key_values.")]
    batch, rng = len(case.mask), np.random.default_rng(0)
    past = {}
    for port in caches:
        shape = (batch, int(port.shape[1]), case.past, int(port.shape[3]))
        # Exact in every type, so that no runtime is blamed for rounding them.
        past[port.name] = rng.integers(-8, 9, shape).astype(np.float32) / 4
    end = case.part or case.mask.shape[1]
    ids, mask = case.ids[:, :end], np.pad(case.mask[:, :end], ((0, 0), (case.past, 0)), constant_values=1)
    return Step(_common_feeds(inputs, ids, mask) | past, mask, case)


def next_step(inputs: Sequence[Port], step: Step, outputs: Feeds, logits: np.ndarray) -> Step:
    """What follows `step`, with the cache of `outputs`: the next part of the prompt, or the likeliest token by
    `logits`."""
    case = step.case
    read = step.mask.shape[1] - case.past
    if read < case.mask.shape[1]:
        ids, seen = (array[:, read : read + case.part] for array in (case.ids, case.mask))
    else:
        ids = logits[:, -1].argmax(axis=-1)[:, None]
        seen = np.ones_like(ids)
    mask = np.concatenate([step.mask, seen], axis=1)
    presents = {name: value for name, value in outputs.items() if name.startswith("present.")}
    past = {f"past_key_values.{name.removeprefix('present.')}": value for name, value in presents.items()}
    return Step(_common_feeds(inputs, ids, mask) | past, mask, case)


def follow_case(
    inputs: Sequence[Port], case: Case, run: Callable[[int, Sequence[Step]], Sequence[Feeds]], runners: int
) -> Iterator[tuple[int, Step, Sequence[Feeds]]]:
    """Each call of a case: its number, the first runner's step, and what all of them give. Each goes on from its own
    cache, and all with the tokens that are likeliest to the first.

    Args:
        run: what each of `runners` gives in a call, by its number, and the step of each.
    """
    steps = [first_step(inputs, case)] * runners
    for call in range(case.calls):
        outputs = run(call, steps)
        yield call, steps[0], outputs
        if call + 1 < case.calls:
            logits = outputs[0]["logits"]
            steps = [next_step(inputs, step, own, logits) for step, own in zip(steps, outputs, strict=True)]


def _common_feeds(inputs: Sequence[Port], ids: np.ndarray, mask: np.ndarray) -> Feeds:
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    feeds["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
    return {port.name: feeds[port.name] for port in inputs if port.name in feeds}


def position_ids(mask: np.ndarray) -> np.ndarray:
    """Positions as transformers' `generate` counts them: real tokens from 0, padding 1."""
    positions = mask.cumsum(axis=1) - 1
    return np.where(mask > 0, positions, 1)
