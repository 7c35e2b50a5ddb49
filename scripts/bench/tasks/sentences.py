"""Labels for one sentence: what its writer thinks, and what it is about."""

from __future__ import annotations

import random

from tasks.words import Part, split, turn

_GOOD = split(
    "wonderful, moving, sharp, delightful, brilliant, warm, charming, flawless, gripping, generous",
    "splendid, lively, elegant, refreshing",
    "superb, touching, clever, excellent, beautiful, inspiring, enjoyable, marvelous",
)
_BAD = split(
    "dull, clumsy, tedious, shallow, noisy, forgettable, bland, careless, confusing, stale",
    "dreadful, sloppy, gloomy, lifeless",
    "awful, boring, terrible, disappointing, ugly, pointless, annoying, horrible",
)
_REVIEWED = split(
    "film, meal, concert, hotel, lecture, game, exhibition, play",
    "tour, podcast, museum, opera",
    "movie, restaurant, novel, album, show, holiday, course",
)
_ASPECTS = split(
    "plot, service, music, food, design, acting",
    "pace, staff, sound, style",
    "story, ending, price, atmosphere, dialogue",
)
_PRAISED = {
    "train": (
        "Review: The {thing} was {a} and, in the end, {b}.\nSentiment (positive or negative):",
        "Review: We found the {thing} {a}, and its {aspect} {b}.\nPositive or negative:",
        "A guest wrote: what {a} {aspect}! The whole {thing} felt {b}.\nSentiment:",
        "Feedback on a {thing}: {a}, {b}.\nThis is positive or negative:",
    ),
    "validation": (
        "Someone says that this {thing} seemed {a} with {b} {aspect}.\nNegative or positive:",
        "Note: {a} {thing}; the {aspect} is {b}.\nMood:",
    ),
    "test": (
        "Comment: I thought the {aspect} of the {thing} was {a}. It is {b}.\nOpinion, positive or negative:",
        '"Such a {a} {thing}, with {b} {aspect} throughout."\nThe writer\'s view:',
        "Rating by a visitor. {aspect}: {a}. {thing}: {b}.\nPositive or negative overall:",
    ),
}
_NOT = {"train": ("not {}", "anything but {}"), "validation": ("in no way {}",), "test": ("far from {}", "hardly {}")}


def sentiment(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    """Two adjectives, one of which may be the opposite, denied."""
    label = turn(("positive", "negative"), index)
    meant, opposite = (_GOOD, _BAD) if label == "positive" else (_BAD, _GOOD)
    a, b = rng.sample(meant[part], 2)
    if rng.random() < 0.4:
        b = rng.choice(_NOT[part]).format(rng.choice(opposite[part]))
    frame = rng.choice(_PRAISED[part])
    return frame.format(a=a, b=b, thing=rng.choice(_REVIEWED[part]), aspect=rng.choice(_ASPECTS[part])), label


_SUBJECTS = {
    "sports": split(
        "the goalkeeper, a young sprinter, the coach, the home team, the champion, a veteran striker",
        "the referee, a rower",
        "the tennis player, the captain, a rookie pitcher, the cyclist",
    ),
    "science": split(
        "the astronomer, a biologist, the laboratory, the physicist, a space probe, the chemist",
        "the telescope, a geologist",
        "a research group, the satellite, a neuroscientist, the microscope",
    ),
    "business": split(
        "the bank, a retailer, the chief executive, the car maker, an investor, the airline",
        "the insurer, a broker",
        "the company, a startup, the supermarket chain, the oil producer",
    ),
    "cooking": split(
        "the chef, a pastry cook, the recipe, grandmother, the kitchen team, a street vendor",
        "the grill master, a brewer",
        "the baker, the dessert, a cookbook author, the soup",
    ),
}
_EVENTS = {
    "sports": split(
        "won the final, missed a penalty, broke the record, trained for the cup, scored twice, lost the match",
        "reached the podium, was sent off",
        "beat the favourites, retired injured, took the gold medal, finished the race",
    ),
    "science": split(
        "found a new planet, measured the particles, studied the cells, published the experiment, tested a vaccine, "
        "mapped the genome",
        "recorded an earthquake, dated the fossil",
        "discovered a bacterium, confirmed the theory, observed a distant galaxy, analysed the molecules",
    ),
    "business": split(
        "raised its prices, sold its shares, cut hundreds of jobs, reported a profit, bought a rival, opened a factory",
        "paid a dividend, went bankrupt",
        "announced a merger, borrowed millions, doubled its revenue, signed a contract",
    ),
    "cooking": split(
        "added more garlic, simmered the sauce, kneaded the dough, used fresh basil, roasted the onions, whipped cream",
        "seasoned the stew, melted the butter",
        "needed a pinch of salt, fried the mushrooms, baked with cinnamon, stirred in the cheese",
    ),
}
_TOLD = {
    "train": (
        "News: {when}, {subject} {event}.\nTopic:",
        "Headline: {subject} {event}, {when}\nSports, science, business or cooking:",
        "It was said that {subject} {event} {when}.\nThis is about:",
    ),
    "validation": ("Report: {subject}, {when}, {event}.\nSection:", "{when}: {subject} {event}\nCategory:"),
    "test": (
        "Today's story: {subject} {event} {when}.\nWhich of cooking, business, science, sports:",
        "People talk about how {subject} {event} {when}.\nSubject:",
        "Short item. {when} {subject} {event}.\nField:",
    ),
}
_WHEN = split(
    "on Monday, last week, in the morning, after a long wait, in June, despite the rain",
    "on Sunday, at noon, in March",
    "on Friday, yesterday, this autumn, in the evening, before dawn",
)


def topic(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    label = turn(tuple(_SUBJECTS), index)
    words = {"subject": _SUBJECTS[label], "event": _EVENTS[label], "when": _WHEN}
    return rng.choice(_TOLD[part]).format(**{name: rng.choice(of[part]) for name, of in words.items()}), label
