"""Labels for two sentences: does one follow from the other, and do both say the same?"""

from __future__ import annotations

import random

from tasks.words import NAMES, PLACES, THINGS, Part, split, turn, two

# An adjective's comparative, and its opposite.
_COMPARED = split(
    "taller/shorter, older/younger, faster/slower, richer/poorer, louder/quieter",
    "braver/shyer, luckier/unluckier",
    "stronger/weaker, happier/sadder, heavier/lighter, smarter/sillier",
)
_CLAIMED = {
    "train": (
        "Premise: {a} is {more} than {b}, and {b} is {more} than {c}.\nClaim: {claim}\nFollows (yes, no, maybe):",
        "{a} is {more} than {b}. {b} is {more} than {c}.\nIs it true that {claim}\nAnswer:",
        "We know: {b} is {more} than {c}; {a} is {more} than {b}.\nHypothesis: {claim}\nYes, no or maybe:",
    ),
    "validation": ("Facts: {a} is {more} than {b}; also {b} is {more} than {c}.\nSo {claim}\nVerdict:",),
    "test": (
        "Given that {b} is {more} than {c} while {a} is {more} than {b}, decide: {claim}\nmaybe, no, yes:",
        "{a} is {more} than {b}, who is {more} than {c}.\nStatement: {claim}\nJudgement:",
    ),
}


def inference(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    """Three people in an order; a claim that follows, that cannot be, or that is about a fourth."""
    label = turn(("yes", "no", "maybe"), index)
    a, b, c, stranger = rng.sample(NAMES[part], 4)
    more, less = rng.choice(_COMPARED[part]).split("/")
    high, low = rng.choice([(a, b), (b, c), (a, c)])
    if label == "maybe":
        high, low = rng.choice([(stranger, low), (high, stranger)])
    upright = rng.random() < 0.5
    if label == "no":
        high, low = low, high
    claim = f"{high} is {more} than {low}." if upright else f"{low} is {less} than {high}."
    return rng.choice(_CLAIMED[part]).format(a=a, b=b, c=c, more=more, claim=claim), label


# Present, past, passive's preposition turned round: what one gives, another has received.
_GIVEN = split(
    "gave/given, sold/sold, handed/handed, lent/lent",
    "mailed/mailed, offered/offered",
    "sent/sent, showed/shown, brought/brought",
)
_COMPARE = {
    "train": (
        "One: {one}\nTwo: {two}\nSame or different:",
        "First sentence: {one}\nSecond sentence: {two}\nMeaning:",
        "{one}\n{two}\nDo they mean the same or something different:",
    ),
    "validation": ("A) {one}\nB) {two}\nDifferent or same:",),
    "test": ("Compare. {one} / {two}\nThese are same or different:", "Text 1: {one}\nText 2: {two}\nRelation:"),
}
# Ways to say that a gave b the thing in a place; the first is the active voice.
_SAID = {
    "train": (
        "{a} {did} the {thing} to {b} in the {place}.",
        "The {thing} was {done} to {b} by {a} in the {place}.",
        "In the {place}, {a} {did} {b} the {thing}.",
    ),
    "validation": (
        "Inside the {place} {a} {did} {b} the {thing}.",
        "By {a}, the {thing} was {done} to {b} inside the {place}.",
    ),
    "test": (
        "At the {place}, the {thing} was {done} by {a} to {b}.",
        "It was {a} who {did} the {thing} to {b} at the {place}.",
        "{b} was {done} the {thing} by {a} at the {place}.",
    ),
}


def paraphrase(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    """An event told in two ways; where they differ, the people have changed places, or the thing is another."""
    label = turn(("same", "different"), index)
    (a, b), (thing, other) = two(rng, NAMES[part]), two(rng, THINGS[part])
    did, done = rng.choice(_GIVEN[part]).split("/")
    place = rng.choice(PLACES[part])
    first, second = two(rng, _SAID[part])
    one = first.format(a=a, b=b, did=did, done=done, thing=thing, place=place)
    if label == "different":
        if rng.random() < 0.5:
            a, b = b, a
        else:
            thing = other
    both = {"one": one, "two": second.format(a=a, b=b, did=did, done=done, thing=thing, place=place)}
    return rng.choice(_COMPARE[part]).format(**both), label
