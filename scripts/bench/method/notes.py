"""What stands above the tables: the title, how everything was made, and what a reader has to know of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from method.groups import Rows
from method.plan import BASE, FAMILIES, Settings

_UNKNOWN = "unknown"


def title_of(scores: Rows, quick: bool) -> str:
    """By how many families there are in the tables; of timings alone, all."""
    count = len({result["family"] for result in scores} - {BASE}) or len(FAMILIES)
    families = "one family" if count == 1 else f"{('two', 'three', 'four')[count - 2]} families"
    return f"{'A quick look at' if quick else 'The measure of'} {families} of adapters"


def notes_of(found: Mapping[str, Any], settings: Settings, of_others: Collection[str]) -> list[str]:
    """Paragraphs.

    Args:
        of_others: the cells that another run trained.
    """
    machine, scores = found["machine"], found["scores"]
    notes = [
        f"Made by `{found['command']}` on {machine['processor']}, {machine['cores']} cores; base {found['base']}, "
        f"code {found['code']}.",
        f"Each training: {settings.steps} steps of {settings.batch} rows, learning rate {settings.learning_rate:g}, "
        f"base in {settings.dtype}; {settings.train} rows of each of eleven kinds to train on, {settings.test} to be "
        f"asked, greedily, in {settings.dtype} (beside exports: in fp32); an answer counts when it is right to the "
        "letter, but for white space around it. The adapter that is asked is that of the lowest held-out loss.",
    ]
    if found["quick"]:
        notes.append("**A quick run: one seed, short trainings, few questions. It shows costs; of scores only hints.**")
    if found["pooled"]:
        notes.append(found["pooled"])
    own = [result for result in scores if result["cell"] not in of_others]
    if older := [f"{result['cell']} ({result['code']})" for result in own if result["code"] != found["code"]]:
        notes.append(f"From other versions of the code: {', '.join(older)}.")
    if unsaid := [result["cell"] for result in own if "questions_sha256" not in result]:
        notes.append(f"Which questions were asked, and which rows trained on, is not known of {', '.join(unsaid)}.")
    versions = {", ".join(map(" ".join, r["versions"].items())) for r in scores if "versions" in r}
    if len(versions) > 1:
        notes.append(f"Trained with unlike versions: {'; '.join(sorted(versions))}.")
    notes += _of_processors(scores)
    if found["missing"]:
        notes.append(f"Not run yet: {by_group(found['missing'])}.")
    return notes


def _of_processors(scores: Rows) -> list[str]:
    """On which the cells were trained, where it is not one and the same; older results do not say."""
    by_processor: dict[str, list[str]] = {}
    for result in scores:
        if result["family"] != BASE:
            by_processor.setdefault(result.get("processor", _UNKNOWN), []).append(result["cell"])
    unknown = by_processor.pop(_UNKNOWN, [])
    told = [f"{name}: {by_group(cells)}" for name, cells in sorted(by_processor.items())]
    if not told or (len(told) == 1 and not unknown):
        return []
    if unknown:
        told.append(f"not known of {by_group(unknown)}")
    return [f"Processors round sums in unlike orders. Trained on {'; '.join(told)}."]


def by_group(names: Sequence[str]) -> str:
    """Cells of a group together: `lora-ffn-s1, lora-ffn-s2` are `lora-ffn (seeds 1, 2)`."""
    seeds: dict[str, list[str]] = {}
    for name in names:
        group, _, seed = (name, "", "") if name == BASE else name.rpartition("-s")
        seeds.setdefault(group, []).append(seed)
    return ", ".join(
        group if group == BASE else f"{group} (seed{'s' if len(of) > 1 else ''} {', '.join(of)})"
        for group, of in seeds.items()
    )
