"""Words that several kinds of tasks fill their frames with; each belongs to one part."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Words = Mapping[Part, Sequence[str]]


def split(train: str, validation: str, test: str) -> dict[Part, list[str]]:
    """Words of each part, from texts that commas separate."""
    texts: dict[Part, str] = {"train": train, "validation": validation, "test": test}
    return {part: [word.strip() for word in text.split(",")] for part, text in texts.items()}


def turn(options: Sequence[str], index: int) -> str:
    """The option whose turn it is, so that all are used equally often."""
    return options[index % len(options)]


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def two(rng: random.Random, words: Sequence[str]) -> tuple[str, str]:
    first, second = rng.sample(words, 2)
    return first, second


NAMES = split(
    "Ada, Boris, Chen, Dana, Emil, Farah, Goran, Hana, Ivan, Julia, Kofi, Lena, Marco, Nadia, Oscar, Paula, Rashid, "
    "Sofia, Tomas, Vera, Walter, Yuki",
    "Alan, Bella, Carlos, Diego, Elsa, Felix, Greta, Hugo, Irene, Jonas",
    "Amir, Bridget, Clara, David, Esther, Frank, Gloria, Henry, Isabel, Jack, Karen, Leo, Maria, Nora, Peter, Ruth",
)
CITIES = split(
    "Lisbon, Oslo, Quito, Riga, Seoul, Tunis, Berlin, Cairo, Delhi, Geneva, Havana, Lima, Milan, Naples, Prague",
    "Athens, Bogota, Dublin, Kyoto, Manila, Turin",
    "Boston, Chicago, Dallas, Paris, Madrid, Moscow, Tokyo, Vienna, Warsaw, London",
)
JOBS = split(
    "nurse, baker, pilot, lawyer, painter, farmer, teacher, plumber, dentist, singer, driver, tailor",
    "butcher, miner, judge, welder, sailor",
    "doctor, writer, cook, engineer, carpenter, dancer, gardener, librarian, waiter",
)
THINGS = split(
    "key, lamp, book, coin, map, ring, rope, ball, pen, cup, clock, hat, drum, scarf, stamp, candle",
    "bell, fork, mask, vase, comb, kite",
    "letter, knife, camera, umbrella, ticket, watch, violin, mirror, blanket, hammer",
)
PLACES = split(
    "kitchen, garage, attic, cellar, office, garden, hall, barn, library, bathroom",
    "chapel, tower, stable, porch",
    "bedroom, shed, basement, classroom, workshop, pantry, balcony",
)
