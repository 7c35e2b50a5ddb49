"""Eleven kinds of tasks for measuring adapters, in the spirit of CME: made by seeded programs, answered in few tokens.

| kind | answer |
|---|---|
| sentiment | positive or negative |
| topic | sports, science, business or cooking |
| inference | yes, no or maybe |
| paraphrase | same or different |
| extraction | a JSON object |
| questions | a word of the text, one of three |
| arithmetic | a number |
| ordering | four words in alphabetical order |
| oddity | the word of four that does not belong |
| code | an expression in Python |
| brackets | what closes the open ones |

The parts, `train`, `validation` and `test`, share no template: the frames of sentences and the words that fill them are
of one part alone, and so are the operands of arithmetic and the sequences of brackets. What is left in common is what a
task is about: its labels, numbers, brackets and Python itself. Labels are used equally often.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tasks import formal, pairs, reading, reasoning, sentences
from tasks.words import PARTS, Part

__all__ = ["GUESSED", "PARTS", "TASKS", "Example", "Part", "make_examples"]

# Part, random numbers, and the number of the example, by which labels take turns -> prompt, answer.
Maker = Callable[[Part, random.Random, int], tuple[str, str]]

TASKS: Mapping[str, Maker] = {
    "sentiment": sentences.sentiment,
    "topic": sentences.topic,
    "inference": pairs.inference,
    "paraphrase": pairs.paraphrase,
    "extraction": reading.extraction,
    "questions": reading.questions,
    "arithmetic": reasoning.arithmetic,
    "ordering": reasoning.ordering,
    "oddity": reasoning.oddity,
    "code": formal.code,
    "brackets": formal.brackets,
}
# How often who knows what answers a task has, and draws one of them, is right; of the others nearly never.
GUESSED: Mapping[str, float] = {
    "sentiment": 1 / 2,
    "topic": 1 / 4,
    "inference": 1 / 3,
    "paraphrase": 1 / 2,
    "questions": 1 / 3,
    "ordering": 1 / 24,
    "oddity": 1 / 4,
}
_TRIES = 200


@dataclass(frozen=True)
class Example:
    """A prompt that ends with a colon, and the answer after it, which begins with a space."""

    task: str
    prompt: str
    answer: str


def make_examples(task: str, part: Part, count: int, seed: int = 0) -> list[Example]:
    """`count` examples of a task with different prompts; the same ones for the same seed.

    Raises:
        ValueError: the part has not so many.
    """
    rng = random.Random(f"{task}/{part}/{seed}")
    examples: dict[str, Example] = {}
    for index in range(count):
        for _ in range(_TRIES):
            prompt, answer = TASKS[task](part, rng, index)
            if prompt not in examples:
                examples[prompt] = Example(task, prompt, f" {answer}")
                break
        else:
            raise ValueError(f"{task}: its {part} part has not {count} different examples.")
    shuffled = list(examples.values())
    rng.shuffle(shuffled)
    return shuffled
