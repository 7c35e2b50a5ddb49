"""What a text says: facts as JSON, and the answer to a question."""

from __future__ import annotations

import json
import random

from tasks.words import CITIES, JOBS, NAMES, PLACES, THINGS, Part, article

_TEXTS = {
    "train": (
        "Text: {name}, {a_job}, moved from {old} to {city} last year.\nJSON:",
        "Text: In {city} lives {name}, who came from {old} and works as {a_job}.\nJSON:",
        "Record: after years in {old}, {name} became {a_job} in {city}.\nAs JSON:",
        "{name} left {old} and is now {a_job} in {city}.\nname, job and city:",
    ),
    "validation": ("Note: {city} has welcomed {name}, formerly of {old}, as {a_job}.\nObject:",),
    "test": (
        "Passage: {name} used to live in {old}; today {city} is home, and {name} earns a living as {a_job}.\nFields:",
        "Profile. Work: {job}. Home: {city} (before: {old}). Full name: {name}.\nWrite it as JSON:",
        "They hired {name} as {a_job} for the branch at {city}, not {old}.\nStructured:",
    ),
}


def extraction(part: Part, rng: random.Random, _index: int) -> tuple[str, str]:
    """Name, job and city; another city stands by."""
    name, job = rng.choice(NAMES[part]), rng.choice(JOBS[part])
    city, old = rng.sample(CITIES[part], 2)
    text = rng.choice(_TEXTS[part]).format(name=name, job=job, a_job=article(job), city=city, old=old)
    return text, json.dumps({"name": name, "job": job, "city": city})


# A fact, and what is asked about it: its person, its thing or its place.
_FACTS = {
    "train": ("{name} keeps the {thing} in the {place}.", "The {thing} of {name} is in the {place}."),
    "validation": ("{name} hid the {thing} behind the {place}.",),
    "test": ("{name} has left the {thing} near the {place}.", "Near the {place}, {name} saw the {thing}."),
}
_ASKED = {
    "train": {
        "name": ("Question: Whose is the {thing}?\nAnswer:", "Who keeps something in the {place}?\nAnswer:"),
        "thing": ("Question: What is in the {place}?\nAnswer:", "What belongs to {name}?\nAnswer:"),
        "place": ("Question: Where is the {thing}?\nAnswer:", "Which room has what {name} keeps?\nAnswer:"),
    },
    "validation": {
        "name": ("Who hid the {thing}?\nReply:",),
        "thing": ("What did {name} hide?\nReply:",),
        "place": ("Behind what is the {thing}?\nReply:",),
    },
    "test": {
        "name": ("Q: Tell me who was near the {place}.\nA:", "The person with the {thing}:"),
        "thing": ("Q: Name the thing near the {place}.\nA:", "The object of {name}:"),
        "place": ("Q: To find the {thing}, go to the...\nA:", "The location of the {thing}:"),
    },
}


def questions(part: Part, rng: random.Random, index: int) -> tuple[str, str]:
    """Three facts of one frame, and a question about one of them."""
    asked = ("name", "thing", "place")[index % 3]
    rows = zip(rng.sample(NAMES[part], 3), rng.sample(THINGS[part], 3), rng.sample(PLACES[part], 3), strict=True)
    facts = [{"name": name, "thing": thing, "place": place} for name, thing, place in rows]
    text = " ".join(rng.choice(_FACTS[part]).format(**fact) for fact in facts)
    fact = rng.choice(facts)
    return f"{text}\n{rng.choice(_ASKED[part][asked]).format(**fact)}", fact[asked]
