"""What the README and the adapter's card say of scores and of quantisation is what committed files have."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"
sys.path.append(str(BENCH))
from method.cells import hash_of_questions  # noqa: E402
from method.groups import groups, name_of  # noqa: E402
from method.plan import BASE, FULL  # noqa: E402
from method.report import guessing  # noqa: E402
from quantised import table  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
ADAPTER = ROOT / "adapters" / "smollm2-teamlora"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_table_of_scores_is_that_of_the_benchmark():
    """A family, its number of parameters, and its average with the spread over seeds."""
    scores = read(BENCH / "claims" / "figures.json")["scores"]
    for group, results in groups(scores).items():
        if group.endswith(("-k4-ffn", "lora-ffn", "-k4-ffn-half")) and results[0]["family"] != BASE:
            means = [result["mean"] for result in results]
            name = name_of(results[0]).replace(", k=4", "")
            figures = f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}"
            assert f"| {name} | {results[0]['parameters']:,} | {figures} |" in README, group
    assert f"| guessing | | {guessing(list(scores[0]['by_task'])):.1f} |" in README


def test_the_table_of_exports_is_that_of_the_benchmark():
    exports = read(BENCH / "claims" / "figures.json")["exports"]
    assert len(exports) >= 4
    for row in exports:
        assert f" {row['mean']:.1f} | {row['same']:.1f} % |" in README or row["form"] == "PyTorch", row["form"]


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
