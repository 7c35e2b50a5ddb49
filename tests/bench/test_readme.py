"""What the README and the adapter's card say of scores and of quantisation is what committed files have."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from teamlora_export.adapter import read_adapter
from teamlora_export.files import sha256_of
from teamlora_export.validate.quality import HELD_OUT

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "scripts" / "bench"
sys.path.append(str(BENCH))
from large_pages import LARGE, ratio  # noqa: E402
from method.cells import hash_of_questions  # noqa: E402
from method.figures import listed  # noqa: E402
from method.groups import NAMES, TARGET_NAMES, groups, name_of  # noqa: E402
from method.plan import BASE, EXPERTS, FAMILIES, FULL  # noqa: E402
from method.report import guessing  # noqa: E402
from quantised import BASE as BASE_ROW  # noqa: E402
from quantised import PLAIN, table  # noqa: E402
from spinning import OURS  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
_HOW = ("published", "packed")
ADAPTER = ROOT / "adapters" / "smollm2-teamlora"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def words_of(path: Path) -> str:
    """Without line breaks."""
    return " ".join(path.read_text(encoding="utf-8").split())


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
    lines = []
    for row, other in zip(llama, phi3, strict=True):
        assert row["form"] == other["form"]
        runs_in = "PyTorch, fp32" if row["form"] == "PyTorch" else f"ONNX Runtime, {row['form']}"
        of = f"{row['mean']:.1f} | {row['same']:.1f} % | {other['mean']:.1f} | {other['same']:.1f} %"
        lines.append(f"| {runs_in} | {of} |")
    assert len(lines) == 4 and "\n".join(lines) in README


@pytest.mark.parametrize("folder", ["claims", "claims_half_rate", "claims_phi3"])
def test_a_folder_of_the_benchmark_is_as_it_was_written(folder):
    assert listed(BENCH / folder) == {path.name for path in (BENCH / folder).iterdir()}


def test_what_int4_costs_is_by_question():
    costs = []
    for folder in ("claims", "claims_phi3"):
        text = (BENCH / folder / "README.md").read_text(encoding="utf-8")
        (found,) = re.findall(r"ONNX Runtime, int4 \|.*\| -([0-9.]+ ± [0-9.]+) \(", text)
        costs.append(found)
    assert f"int4 costs {costs[0]} points of one base and {costs[1]} of another" in words_of(ROOT / "README.md")


def test_half_the_rate_has_its_score():
    cell = "teamlora-k4-all-s0"
    half, full = (
        next(result for result in read(BENCH / folder / "figures.json")["scores"] if result["cell"] == cell)
        for folder in ("claims_half_rate", "claims")
    )
    rates = [result["settings"]["learning_rate"] for result in (half, full)]
    assert rates[0] == rates[1] / 2
    told = f"one training of TeamLoRA scored {half['mean']:.1f}, three at the full rate {full['mean']:.1f}, "
    assert told in words_of(ROOT / "README.md")


def test_the_second_base_has_its_score_and_size():
    scores = {result["family"]: result for result in read(BENCH / "claims_phi3" / "figures.json")["scores"]}
    words = words_of(ROOT / "README.md")
    assert (
        f"{scores['teamlora']['parameters']:,} parameters, and scores {scores['teamlora']['mean']:.1f} in bf16" in words
    )


def test_the_table_of_quantisation_is_that_of_its_script():
    found, words = read(BENCH / "quantised.json"), words_of(ROOT / "README.md")
    assert table(found) in README
    rows = {row["weights"]: row for row in found["rows"]}
    assert f"at {rows['int4']['kl'] / rows['int8']['kl']:.0f} times the KL" in words
    assert rows["int4"]["perplexity"] < rows["int8"]["perplexity"], "int4 has a lower one"
    assert f"from {rows[BASE_ROW]['perplexity']:.1f} to {rows[PLAIN]['perplexity']:.1f}." in words


def test_the_held_out_text_is_as_long_as_is_said():
    paragraphs = len((HELD_OUT / "prose.txt").read_text(encoding="utf-8").split("\n\n"))
    tasks = len(read(HELD_OUT / "tasks.json"))
    assert tasks == read(BENCH / "quantised.json")["tasks"], "none is too long for the model"
    assert f"({paragraphs} paragraphs and {tasks} tasks of our own)" in words_of(ROOT / "README.md")


def test_figures_of_one_base_and_adapter_stand_together():
    score, quantised, training = (
        read(path) for path in (ADAPTER / "score.json", BENCH / "quantised.json", ADAPTER / "training.json")
    )
    assert score["base_sha256"] == quantised["base_sha256"] == read(BENCH / "claims" / "figures.json")["base_sha256"]
    name = "adapter_model.safetensors"
    adapter = sha256_of(ADAPTER / name)
    assert score["adapter_sha256"] == quantised["adapter_sha256"] == training["sha256"][name] == adapter


def test_the_adapters_card_has_its_score():
    score, card = read(ADAPTER / "score.json"), words_of(ADAPTER / "README.md")
    assert score["mean"] == statistics.mean(score["by_task"].values())
    assert score["guessing"] == guessing(list(score["by_task"]))
    assert score["questions_sha256"] == hash_of_questions(FULL) and score["questions"] == 11 * FULL.test
    assert (
        f"benchmark's {score['questions']:,} test questions it answers {score['mean']:.1f} % to the letter, in "
        f"{score['dtype']}; guessing gives {score['guessing']:.1f} " in card
    )
    weak = [f"{score['by_task'][task]:.0f} %" for task in ("arithmetic", "ordering", "extraction")]
    guessed = [f"{score['by_task'][task]:.0f} %" for task in ("inference", "paraphrase")]
    for said, share in zip(
        ("add up numbers", "put words in order", "rarely extracts", "yes, no or maybe", "same or different"),
        weak + guessed,
        strict=True,
    ):
        assert f"{said} ({share}" in card


def test_the_adapters_card_has_what_it_makes_of_prose():
    rows = {row["weights"]: row["perplexity"] for row in read(BENCH / "quantised.json")["rows"]}
    assert f"a perplexity of {rows[PLAIN]:.1f}, the base {rows[BASE_ROW]:.1f} " in words_of(ADAPTER / "README.md")


def test_the_adapters_card_has_the_figures_of_its_training():
    training, card = read(ADAPTER / "training.json"), (ADAPTER / "README.md").read_text(encoding="utf-8")
    for task, loss in training["held_out_loss"].items():
        assert f"| {task} | {training['held_out_loss_before'][task]:.3f} | {loss:.3f} |" in card, task
    shares = [100 * share for shares in training["expert_use"].values() for share in shares]
    words = " ".join(card.split())
    assert f"Balance loss {training['balance_loss']:.4f} " in words
    assert f"each expert has {min(shares):.0f} to {max(shares):.0f} % of every task" in words


def test_the_adapters_card_has_its_size():
    adapter, card = read_adapter(ADAPTER), words_of(ADAPTER / "README.md")
    size = (ADAPTER / "adapter_model.safetensors").stat().st_size
    assert f"{adapter.num_parameters:,} parameters in fp16, {size / 1e6:.2f} MB" in card
    least = min(projection.normalizer_floor for projection in adapter.projections.values())
    assert f"routing normaliser can take is {least:.3f} " in card


def test_the_transcript_of_a_training_is_of_the_figures_that_are_kept():
    training = read(ADAPTER / "training.json")
    logged: dict[int, dict[str, float]] = {}
    for entry in training["log"]:
        logged.setdefault(entry["step"], {}).update(entry)
    transcript = README.partition("$ teamlora-export train ")[2].partition("```")[0]
    steps = re.findall(r"^step (\d+) of 300: loss (.+?), balance loss (.+?),", transcript, re.MULTILINE)
    assert len(steps) == 2
    for step, loss, balance in steps:
        entry = logged[int(step)]
        assert (loss, balance) == (f"{entry['loss']:.4f}", f"{entry['balance_loss']:.4f}")
    tasks = re.findall(r"^(\w+): held-out loss (.+), of the base (.+)$", transcript, re.MULTILINE)
    assert len(tasks) == 3
    for task, loss, before in tasks:
        found = (training["held_out_loss"][task], training["held_out_loss_before"][task])
        assert (loss, before) == tuple(f"{value:.4f}" for value in found), task
    count = len(training["held_out_loss"])
    for line in (
        f"{training['rows']:,} rows of {count} tasks, {training['held_out_rows']} rows held out",
        f"teamlora: {training['trained_parameters']:,} trained parameters on",
        f"step 300 of 300: held-out loss {logged[300]['eval_loss']:.4f}",
        f"balance loss: {training['balance_loss']:.4f}",
        f"seconds a step: {training['seconds_per_step']:.3f}",
    ):
        assert f"\n{line}" in transcript


def test_what_is_said_of_inference_in_words_is_that_of_the_figures():
    found = read(BENCH / "claims" / "figures.json")["inference"]
    rows = [row for row in found if row["quantity"] == "decode"]

    def medians(way: str, targets: str, *without: str) -> list[str]:
        of = [row for row in rows if (row["row"], row["targets"]) == (way, targets) and row["family"] not in without]
        sizes = sorted(row["over_base"]["median"] for row in of)
        return [f"{sizes[0]:.2f}", f"{sizes[-1]:.2f}"]

    native, traced = "our export, native op", "published, traced as it is"
    single = [ratio for row in rows if row["row"] == native for ratio in row["ratios"]]
    text = words_of(ROOT / "README.md")
    on = {targets: " to ".join(medians(native, targets)) for targets in ("ffn", "all")}
    assert f"takes {on['ffn']} of the base's on the feed-forward layers and {on['all']} on all projections" in text
    assert f"single ones lie between {min(single):.2f} and {max(single):.2f})" in text
    experts = " and ".join(" to ".join(medians(traced, targets, "lora")) for targets in ("ffn", "all"))
    families = [family for family in FAMILIES if family != "lora"]
    lora = " and ".join(medians(traced, targets, *families)[0] for targets in ("ffn", "all"))
    assert f"The published layers of experts, traced as they are, take {experts}, and LoRA {lora} (" in text
    prefills = [row["seconds"] for row in found if row["quantity"] == "prefill"]
    assert f"took up to {max(max(of) / min(of) for of in prefills):.1f} times another's" in text


def test_what_large_pages_are_worth_is_that_of_the_figures():
    processes = read(BENCH / "large_pages.json")["processes"]
    one, four = processes["1"], processes["4"]
    assert len(one) == len(four) == 8
    text = words_of(ROOT / "README.md")
    assert f"A step then takes {ratio(one, 'decode', 0, LARGE)} of its time" in text
    assert f"a prefill of 64 tokens {ratio(one, 'prefill', 0, LARGE)}" in text
    in_order = ", ".join(ratio(four, "decode", model, LARGE)[:4] for model in range(4))
    assert f"a step of them took, in their order, {in_order}" in text
    for quantity, told in (("decode", "a step took, once more before,"), ("prefill", "a prefill")):
        again = [ratio(of, quantity, model)[:4] for of, models in ((one, 1), (four, 4)) for model in range(models)]
        assert f"{told} {min(again)} to {max(again)}" in text


def test_what_spinning_threads_cost_is_that_of_the_figures():
    seconds = read(BENCH / "spinning.json")["seconds"]
    times = []
    for beside in ("0", "1", "2"):
        left_alone, ours = (seconds[beside][way] for way in ("300,000 rounds", OURS))
        times.append("{1:.2f} ({0:.2f} - {2:.2f})".format(*np.percentile(np.divide(left_alone, ours), (25, 50, 75))))
    text = words_of(ROOT / "README.md")
    assert f"`validate` takes {times[0]} of that time alone, {times[1]} beside one busy process and {times[2]}" in text


def ratios_of(path: Path) -> dict[tuple[str, str], str]:
    """Of `teamlora-export bench`'s file: a row's time over the baseline's, by its name and quantity."""
    found = read(path)
    assert found["quiet"]
    return {
        (figure["row"], figure["quantity"]): "{median:.2f} ({low:.2f} - {high:.2f})".format(**figure["ratio"])
        for figure in found["figures"]
    }


def over(path: Path, row: str, other: str, quantity: str) -> str:
    """A row's time over another's, turn by turn: median and quartiles."""
    seconds = {figure["row"]: figure["seconds"] for figure in read(path)["figures"] if figure["quantity"] == quantity}
    low, median, high = np.percentile(np.divide(seconds[row], seconds[other]), (25, 50, 75))
    return f"{median:.2f} ({low:.2f} - {high:.2f})"


def test_the_table_of_speeds_is_that_of_the_figures():
    rows = {
        "TeamLoRA r=8, native op": "TeamLoRA, cache in place, native op",
        "TeamLoRA r=8, growing, native op": "TeamLoRA, growing cache, native op",
        "TeamLoRA r=8, body": "TeamLoRA, cache in place, body",
        "TeamLoRA r=8, growing, body": "TeamLoRA, growing cache, body",
        "genai, un-adapted": "no adapter, onnxruntime-genai",
        "genai, LoRA r=8": "plain LoRA r=8, onnxruntime-genai",
    }
    ratios = ratios_of(BENCH / "speed.json")
    lines = [f"| {name} | {ratios[row, 'decode']} | {ratios[row, 'prefill']} |" for row, name in rows.items()]
    assert "\n".join(lines) in README
    decode, prefill = (ratios["the baseline again", quantity] for quantity in ("decode", "prefill"))
    text = words_of(ROOT / "README.md")
    assert f"The baseline over itself was {decode} and {prefill}, all rows" in text
    added = over(BENCH / "speed.json", "genai, LoRA r=8", "genai, un-adapted", "decode")
    assert f"adds {added[2:4]} % to one of onnxruntime-genai's ({added} in turns)" in text
    ours = [
        over(BENCH / "speed.json", "TeamLoRA r=8, native op", "genai, LoRA r=8", of) for of in ("decode", "prefill")
    ]
    assert ours[0].startswith("1.0") and f"ours {ours[1][:4]} of the time at prefill" in text


def test_the_headlines_figures_are_those_of_its_file():
    ratios = ratios_of(BENCH / "headline.json")
    native, body, again = (
        [ratios[row, quantity] for quantity in ("decode", "prefill")]
        for row in ("native op", "op's body", "the baseline again")
    )
    text = words_of(ROOT / "README.md")
    assert f"took {native[0]} of the time of the bypassed graph at decode and {native[1]} at prefill" in text
    assert f"the body {body[0]} and {body[1]}, where" in text
    assert f"the baseline over itself {again[0]} and {again[1]}. Another" in text
