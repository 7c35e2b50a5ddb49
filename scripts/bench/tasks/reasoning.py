"""Sums, alphabetical order, and the word that does not belong."""

from __future__ import annotations

import random
import zlib

from tasks.words import NAMES, Part, split, turn

_SUMS = {
    "train": {
        "+": (
            "Question: What is {a} plus {b}?\nResult:",
            "{a} + {b} =\nResult:",
            "{name} has {a} coins and finds {b} more. Coins now:",
        ),
        "-": (
            "Question: What is {a} minus {b}?\nResult:",
            "{a} - {b} =\nResult:",
            "{name} has {a} coins and loses {b} of them. Coins now:",
        ),
    },
    "validation": {
        "+": ("Compute the sum of {a} and {b}:", "To {a} stamps {name} adds {b}. Together:"),
        "-": ("Compute {a} less {b}:", "Of {a} stamps {name} gives {b} away. Left:"),
    },
    "test": {
        "+": (
            "Add {b} to {a}. Answer:",
            "There were {a} birds on the roof, then {b} others joined. Total:",
            "{name} is {a}. Age in {b} years:",
        ),
        "-": (
            "Subtract {b} from {a}. Answer:",
            "There were {a} birds on the roof, then {b} flew off. Total:",
            "{name} is {a}. Age {b} years ago:",
        ),
    },
}
# Of ten pairs of operands, how many are of a part.
_SHARES = {"train": range(7), "validation": (7,), "test": (8, 9)}


def arithmetic(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    """A sum or a difference of numbers up to 60. A pair of operands is of one part, by a hash: answers of all parts
    end with every digit."""
    sign = turn("+-", index)
    while True:
        b, a = sorted(rng.sample(range(2, 61), 2))
        if zlib.crc32(f"{a} {b}".encode()) % 10 in _SHARES[part]:
            break
    text = rng.choice(_SUMS[part][sign]).format(a=a, b=b, name=rng.choice(NAMES[part]))
    return text, str(a + b if sign == "+" else a - b)


_SORTED = split(
    "apple, bread, cloud, door, engine, forest, glass, house, island, jar, kettle, lemon, moon, needle, ocean, pearl, "
    "queen, river, stone, tiger, uncle, valley, window, yard, zebra, arrow, bridge, circle, dragon, eagle",
    "anchor, bottle, castle, desert, elbow, flame, guitar, hill, idol, jacket, lion, monkey",
    "actor, basket, camel, diamond, earth, flower, grape, honey, insect, jungle, kitten, ladder, mountain, nest, "
    "orange, pencil, rabbit, salad, temple, village, winter",
)
_SORTING = {
    "train": (
        "Words: {words}\nSorted:",
        "Put in alphabetical order: {words}\nOrder:",
        "Unsorted: {words}\nFrom A to Z:",
    ),
    "validation": ("Alphabetise: {words}\nDone:",),
    "test": ("List these by alphabet: {words}\nList:", "Input: {words}\nAlphabetical output:"),
}


def ordering(part: Part, rng: random.Random, _index: int) -> tuple[str, str]:
    words = rng.sample(_SORTED[part], 4)
    return rng.choice(_SORTING[part]).format(words=", ".join(words)), ", ".join(sorted(words))


_KINDS: dict[Part, list[list[str]]] = {
    "train": [
        ["apple", "pear", "plum", "cherry", "banana", "peach"],
        ["dog", "cat", "horse", "cow", "sheep", "goat"],
        ["red", "blue", "green", "yellow", "purple", "brown"],
        ["piano", "flute", "trumpet", "cello", "harp", "drum"],
        ["shirt", "coat", "sock", "skirt", "glove", "belt"],
        ["table", "chair", "sofa", "desk", "shelf", "bed"],
    ],
    "validation": [
        ["rose", "tulip", "daisy", "lily"],
        ["seven", "twelve", "thirty", "four"],
        ["soldier", "clerk", "priest", "miner"],
        ["milk", "coffee", "wine", "juice"],
    ],
    "test": [
        ["car", "truck", "train", "bicycle", "bus"],
        ["carrot", "onion", "potato", "cabbage", "spinach"],
        ["hawk", "sparrow", "owl", "crow", "duck"],
        ["gold", "silver", "copper", "iron", "tin"],
        ["finger", "knee", "shoulder", "nose", "ankle"],
    ],
}
_ODD = {
    "train": (
        "Which does not belong: {words}?\nAnswer:",
        "Three are alike, one is not: {words}\nThe other kind:",
        "Words: {words}\nOdd one out:",
    ),
    "validation": ("Find the intruder among {words}:",),
    "test": ("One of {words} is unlike the rest. It is:", "{words}\nThe one to remove:"),
}


def oddity(part: Part, rng: random.Random, _index: int) -> tuple[str, str]:
    kind, other = rng.sample(_KINDS[part], 2)
    odd = rng.choice(other)
    words = [*rng.sample(kind, 3), odd]
    rng.shuffle(words)
    return rng.choice(_ODD[part]).format(words=", ".join(words)), odd
