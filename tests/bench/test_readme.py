"""What the README and the adapter's card say of scores and of quantisation is what committed files have."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"
sys.path.append(str(BENCH))
from method.cells import hash_of_questions  # noqa: E402
from method.groups import NAMES, TARGET_NAMES, groups, name_of  # noqa: E402
from method.plan import BASE, EXPERTS, FAMILIES, FULL  # noqa: E402
from method.report import guessing  # noqa: E402
from quantised import table  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
_HOW = ("published", "packed")
ADAPTER = ROOT / "adapters" / "smollm2-teamlora"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of_scores(found: dict) -> list[str]:
    """A family and what it adapts, its number of parameters, its average with the spread over seeds; all groups."""
    lines = []
    for results in groups(found["scores"]).values():
        first, means = results[0], [result["mean"] for result in results]
        if first["family"] != BASE:
            spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
            of = (name_of(first), TARGET_NAMES[first["targets"]], f"{first['parameters']:,}")
            lines.append(f"| {' | '.join(of)} | {len(means)} | {statistics.mean(means):.1f}{spread} |")
    return [*lines, f"| guessing | | | | {guessing(list(found['scores'][0]['by_task'])):.1f} |"]


def lines_of_steps(found: dict) -> list[str]:
    """Time over LoRA's step, of the feed-forward layers: for each number of experts, one by one and packed."""
    over = {
        (row["family"], row["implementation"], row["experts"]): f"{row['over_lora']['median']:.2f}"
        for row in found["steps"]
        if row["targets"] == "ffn"
    }
    return [
        f"| {NAMES[family]} | {' | '.join(', '.join(over[family, how, k] for k in EXPERTS) for how in _HOW)} |"
        for family in FAMILIES
        if family != "lora"
    ]


def lines_of_inference(found: dict) -> list[str]:
    """Time over the base's, at decode and at prefill, of each way with four experts."""
    over = {
        (row["family"], row["targets"], row["row"], row["quantity"]): f"{row['over_base']['median']:.2f}"
        for row in found["inference"]
        if row["experts"] in (1, 4)
    }
    ways = list(dict.fromkeys(row["row"] for row in found["inference"]))
    return [
        f"| {NAMES[family]} | {TARGET_NAMES[targets]} | "
        + " | ".join(
            f"{over[family, targets, way, 'decode']} / {over[family, targets, way, 'prefill']}" for way in ways
        )
        + " |"
        for targets in TARGET_NAMES
        for family in FAMILIES
    ]


@pytest.mark.parametrize("lines_of", [lines_of_scores, lines_of_steps, lines_of_inference])
def test_the_tables_of_the_method_are_those_of_the_benchmark(lines_of):
    lines = lines_of(read(BENCH / "claims" / "figures.json"))
    assert len(lines) >= 3 and "\n".join(lines) in README


def test_the_table_of_exports_is_that_of_the_benchmark_on_both_bases():
    llama, phi3 = (read(BENCH / folder / "figures.json")["exports"] for folder in ("claims", "claims_phi3"))
    assert len(llama) == 4
    for row, other in zip(llama, phi3, strict=True):
        assert row["form"] == other["form"]
        runs_in = "PyTorch, fp32" if row["form"] == "PyTorch" else f"ONNX Runtime, {row['form']}"
        of = f"{row['mean']:.1f} | {row['same']:.1f} % | {other['mean']:.1f} | {other['same']:.1f} %"
        assert f"| {runs_in} | {of} |" in README


def test_the_second_base_has_its_score_and_size():
    scores = {result["family"]: result for result in read(BENCH / "claims_phi3" / "figures.json")["scores"]}
    words = " ".join(README.split())
    assert (
        f"{scores['teamlora']['parameters']:,} parameters, and scores {scores['teamlora']['mean']:.1f} in bf16" in words
    )


def test_the_table_of_quantisation_is_that_of_its_script():
    assert table(read(BENCH / "quantised.json")["rows"]) in README


def test_the_adapters_card_has_its_score():
    score, card = read(ADAPTER / "score.json"), " ".join((ADAPTER / "README.md").read_text(encoding="utf-8").split())
    assert score["mean"] == statistics.mean(score["by_task"].values())
    assert score["questions_sha256"] == hash_of_questions(FULL) and score["questions"] == 11 * FULL.test
    assert f"answers {score['mean']:.1f} % to the letter, in {score['dtype']}; guessing gives" in card


def test_the_adapters_card_has_the_losses_of_its_training():
    training, card = read(ADAPTER / "training.json"), (ADAPTER / "README.md").read_text(encoding="utf-8")
    for task, loss in training["held_out_loss"].items():
        assert f"| {task} | {training['held_out_loss_before'][task]:.3f} | {loss:.3f} |" in card, task
