"""Asks a model every question of a part, greedily and in batches, and counts the answers that are right to the letter.

The same for PyTorch and for what is exported: only what makes the tokens differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import Example

from teamlora_export.deploy.words import encode_text, open_tokenizer
from teamlora_export.tokens import read_tokens

# Prompts as token ids, and how many tokens at most -> the tokens after each, without the one that ends a text.
Generate = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
_BATCH = 64
# After the longest right answer a model may still go on: then it is wrong, and one token tells.
_MORE = 1


@dataclass(frozen=True)
class Scores:
    """`right`: by task, for each of its examples in their order. `answers`: what was said, likewise."""

    right: dict[str, list[bool]]
    answers: dict[str, list[str]]

    @property
    def by_task(self) -> dict[str, float]:
        """Percent."""
        return {task: 100 * sum(right) / len(right) for task, right in self.right.items()}

    @property
    def mean(self) -> float:
        """Over the tasks, percent."""
        return sum(self.by_task.values()) / len(self.right)


def score(generate: Generate, tokenizer: Any, examples: Sequence[Example], batch: int = _BATCH) -> Scores:
    """Prompts of like length share a batch. White space around an answer does not count."""
    prompts = [encode_text(tokenizer, example.prompt) for example in examples]
    longest = [len(encode_text(tokenizer, example.answer, specials=False)) + 1 + _MORE for example in examples]
    # Tasks with long answers among themselves: a batch takes as many steps as its longest answer.
    order = sorted(range(len(examples)), key=lambda i: (longest[i], len(prompts[i])))
    said = [""] * len(examples)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        found = generate([prompts[i] for i in rows], max(longest[i] for i in rows))
        for i, tokens in zip(rows, found, strict=True):
            # A special token inside of an answer is something that was said: the one that ends it is left out already.
            said[i] = tokenizer.decode(tokens, skip_special_tokens=False).strip()
    right: dict[str, list[bool]] = {}
    answers: dict[str, list[str]] = {}
    for example, answer in zip(examples, said, strict=True):
        right.setdefault(example.task, []).append(answer == example.answer.strip())
        answers.setdefault(example.task, []).append(answer)
    return Scores(right, answers)


def tokenizer_of(folder: Path) -> Any:
    """As training and the deployed programs cut words."""
    return open_tokenizer(folder, None)


def torch_generate(model: Any, folder: Path) -> Generate:
    """By `transformers`, padded on the left; `folder` has the base's configuration and tokenizer.

    Greedily, as the deployed programs do: what else the base's generation_config.json asks for, such as a penalty of
    words that the prompt has, `model` forgets.
    """
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    tokens = read_tokens(folder, "text-generation")

    def generate(prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), tokens.padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.no_grad():
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=tokens.padding,
                eos_token_id=list(tokens.stops) or None,
            )
        return [_until_end(row, tokens.stops) for row in made[:, longest:].tolist()]

    return generate


def runner_generate(folder: Path, threads: int = 0) -> Generate:
    """By the deployed Python program, on a bundle in ONNX Runtime."""
    from teamlora_export.deploy.runner import Model

    model = Model(folder, check=False, threads=threads)
    return lambda prompts, count: model.generate(prompts, count)


def _until_end(tokens: Sequence[int], stops: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])
