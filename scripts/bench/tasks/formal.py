"""Formal languages: expressions in Python, and brackets."""

from __future__ import annotations

import random
import zlib

from tasks.words import Part, split

_VARIABLES = split(
    "names, prices, items, rows, scores, words, ages, lines, tokens, points, files, colors",
    "users, weights, steps, parts",
    "values, numbers, cities, orders, books, results, paths, messages",
)
# What an expression does, said in ways of each part's own.
_EXPRESSIONS = {
    "len({v})": split(
        "the length of {v}, the number of elements in {v}", "the size of {v}", "how many entries {v} has"
    ),
    "max({v})": split("the largest of {v}, the maximum of {v}", "the highest in {v}", "the greatest element in {v}"),
    "min({v})": split("the smallest of {v}, the minimum of {v}", "the least in {v}", "the lowest element in {v}"),
    "sum({v})": split("the sum of {v}, all of {v} added up", "the sum over {v}", "the total of everything in {v}"),
    "sorted({v})": split("{v} in order, {v} sorted", "{v} put in order", "{v} in ascending order"),
    "{v}[0]": split(
        "the first of {v}, the first element of {v}", "what {v} begins with", "the item at the start of {v}"
    ),
    "{v}[-1]": split("the last of {v}, the last element of {v}", "what {v} ends with", "the item at the end of {v}"),
    "{v}[::-1]": split("{v} reversed, {v} from back to front", "{v} backwards", "{v} in reverse order"),
    "set({v})": split("{v} without repetitions, the distinct of {v}", "{v} deduplicated", "the unique items in {v}"),
    "len(set({v}))": split(
        "the number of distinct {v}, how many different {v}", "the count of unlike {v}", "how many unique {v} there are"
    ),
    "sum({v}) / len({v})": split(
        "the average of {v}, the mean of {v}", "the average over {v}", "the arithmetic mean for {v}"
    ),
    "max({v}) - min({v})": split(
        "the range of {v}, from the smallest to the largest of {v}",
        "the width of {v}",
        "the spread between extremes in {v}",
    ),
}
_CODED = {
    "train": ("In Python, {what}:", "# {what}\nPython expression:", "Code for {what}:"),
    "validation": ("Python for {what}:",),
    "test": ("Expression that gives {what}:", "Task: {what}.\nPython:"),
}


def code(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    expression, said = list(_EXPRESSIONS.items())[index % len(_EXPRESSIONS)]
    v = rng.choice(_VARIABLES[part])
    what = rng.choice(said[part]).format(v=v)
    return rng.choice(_CODED[part]).format(what=what), expression.format(v=v)


_PAIRS = ("()", "[]", "{}", "<>")
_CLOSING = {
    "train": ("Brackets: {text}\nClose them:", "Open: {text}\nClosing:", "Complete {text}\nwith:"),
    "validation": ("Still to be closed: {text}\nBy:",),
    "test": ("Balance this: {text}\nMissing:", "Sequence {text}\nends with:"),
}
# Of ten sequences, how many are of a part.
_SHARES = {"train": range(7), "validation": (7,), "test": (8, 9)}


def brackets(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    """Two to four brackets are open, and another may have been closed on the way; a sequence is of one part."""
    while True:
        text: list[str] = []
        opened: list[str] = []
        depth = 2 + index % 3
        closed_after = rng.randrange(2 * depth)
        for level in range(depth):
            opening, closing = rng.choice(_PAIRS)
            text.append(opening)
            opened.append(closing)
            if level == closed_after:
                text += rng.choice(_PAIRS)
        sequence = " ".join(text)
        if zlib.crc32(sequence.encode()) % 10 in _SHARES[part]:
            return rng.choice(_CLOSING[part]).format(text=sequence), " ".join(reversed(opened))
