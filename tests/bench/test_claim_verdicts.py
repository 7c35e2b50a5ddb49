"""What the measure of the method tells: differences with their errors, verdicts on the paper, and tables."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
from method.paper import PUBLISHED, verdicts
from method.plan import BASE, FAMILIES, Cell
from method.report import tables, write_plot
from method.significance import Gap, difference, interval, luck_of, student


def _result(family: str, right: str, seed: int = 0, share: float = 1.0) -> dict:
    cell = Cell(family, 1 if family in ("lora", BASE) else 4, "ffn", share, seed)
    bits = {"one": right, "two": right[::-1]}
    by_task = {task: 100 * found.count("1") / len(found) for task, found in bits.items()}
    return {
        "cell": cell.name,
        **dataclasses.asdict(cell),
        "code": "8aab571b",
        "rank": 8,
        "parameters": 100,
        "best_step": None if family == BASE else 300,
        "mean": np.mean(list(by_task.values())),
        "by_task": by_task,
        "right": bits,
    }


def test_a_difference_has_the_error_of_its_questions_and_of_its_trainings():
    ours = [_result("teamlora", "111101110111"), _result("teamlora", "111111110111", seed=1)]
    theirs = [_result("moelora", "101001100011", seed=1), _result("moelora", "101001110011")]
    gap = difference(ours, theirs)
    means = [np.mean([[int(b) for b in r["right"]["one"]] for r in results], axis=0) for results in (ours, theirs)]
    by_question = means[0] - means[1]
    by_seed = [ours[0]["mean"] - theirs[1]["mean"], ours[1]["mean"] - theirs[0]["mean"]]
    # Of a training, pooled over both sides; each side's mean is of two of them.
    luck = np.mean([np.var([result["mean"] for result in results], ddof=1) for results in (ours, theirs)])
    assert gap.points == pytest.approx(100 * by_question.mean()) == pytest.approx(np.mean(by_seed))
    parts = (100**2 * 2 * by_question.var(ddof=1) / 12 / 2**2, luck * 2 / 2)
    assert gap.error == pytest.approx(math.sqrt(sum(parts))) and gap.seeds == 2
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 22 + parts[1] ** 2 / 2)
    assert gap.margin == pytest.approx(student(freedom) * gap.error)
    # Of a seed that the others do not have, nothing but how much luck there is.
    of_both = luck_of([ours, theirs])
    assert of_both.variance == pytest.approx(luck) and of_both.freedom == 2
    assert difference([*ours, _result("teamlora", "0" * 12, seed=2)], theirs, of_both) == gap
    # Of one question a task, no verdict, however well seeds agree.
    of_one = [
        [_result(family, bit, seed) for seed in range(2)] for family, bit in (("teamlora", "1"), ("moelora", "0"))
    ]
    assert not difference(*of_one).tells and str(difference(*of_one)) == "+100.0 points (of one question a task)"
    # Of one seed, no verdict, nor of two that are not the same.
    assert not difference([_result("teamlora", "1" * 12)], [_result("moelora", "0" * 12)]).tells
    assert not difference(ours[:1], theirs[:1]).tells and difference(ours[:1], theirs[:1]).seeds == 1


def test_students_t_is_that_of_the_tables_and_goes_between_them():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980, 1e6: 1.960}
    assert {freedom: round(student(freedom), 3) for freedom in known} == known
    assert student(2) > student(2.5) > student(3)


@pytest.mark.parametrize(("luck", "told_at_least"), [(0.2, 0.7), (0.5, 0.3)])
def test_equal_methods_seldom_get_a_verdict_and_unequal_ones_do(luck, told_at_least):
    """Eleven tasks of a hundred questions, three seeds of four families; `luck` of a training moves all answers of a
    task, in logits.

    Of equal methods one of twenty has a verdict (and of a hundred draws at the most ten, all but surely). Of a
    thousand draws 1 and 4 %; a difference of 5 points is told in 85 and 47 %.
    """
    rng = np.random.default_rng(0)

    def trained(easy: np.ndarray, shift: float) -> list[dict]:
        results = []
        for seed in range(3):
            logits = easy + shift + rng.normal(0.0, luck, (len(easy), 1))
            right = rng.random(easy.shape) < 1 / (1 + np.exp(-logits))
            rows = np.where(right, b"1", b"0")
            bits = {f"task{i}": row.tobytes().decode() for i, row in enumerate(rows)}
            results.append({**_result("moelora", "01", seed), "right": bits})
        return results

    def told(shift: float) -> tuple[float, float]:
        gaps = []
        for _ in range(100):
            easy = rng.normal(0, 1.5, (11, 100)) + rng.normal(0, 1, (11, 1))
            families = [trained(easy, by) for by in (shift, 0.0, 0.0, 0.0)]
            gaps.append(difference(families[0], families[1], luck_of(families)))
        return float(np.mean([gap.tells for gap in gaps])), float(np.mean([gap.points for gap in gaps]))

    assert told(0.0)[0] <= 0.1
    share, points = told(0.3)
    assert points == pytest.approx(4.8, abs=1) and share >= told_at_least


def test_two_seeds_that_agree_by_luck_are_not_sure_of_it():
    """Of equal methods, where luck has ten times the variance that the questions have: of an interval of 95 % one of
    twenty draws is outside. Two seeds of a comparison alone, one degree of freedom, are outside in one of eight; those
    of four families, pooled, in one of seventeen. (Of 600 draws with an error of one point.)"""
    rng = np.random.default_rng(0)

    def told(freedom: int) -> float:
        points = rng.normal(0.0, math.sqrt(1 + 10), 600)
        variances = 10 * rng.chisquare(freedom, 600) / freedom
        gaps = (Gap(by, 1.0, 1089, of, freedom, 2) for by, of in zip(points, variances, strict=True))
        return float(np.mean([gap.tells for gap in gaps]))

    of_four = luck_of([[_result(family, "01", seed) for seed in range(2)] for family in FAMILIES])
    assert of_four.freedom == 4
    assert told(1) > 0.095 and told(of_four.freedom) < 0.085


def test_the_tables_say_what_agrees_with_the_paper_and_what_does_not(tmp_path):
    scores = [
        _result(BASE, "000000000100"),
        *(_result("teamlora", "111101110111", seed) for seed in range(3)),
        *(_result("moelora", "000000000000", seed) for seed in range(3)),
        *(_result("lora", "111101110110", seed) for seed in range(3)),
        _result("hydralora", "000000000000"),
        *(_result("teamlora", "111001110011", seed, share=0.5) for seed in range(3)),
    ]
    row = {"experts": 4, "parameters": 1, "moved": 0.0107, "over_lora": {"median": 1.5, "low": 1.4, "high": 1.7}}
    steps = [
        {
            **row,
            "row": family,
            "family": family,
            "targets": targets,
            "implementation": how,
            "seconds": [seconds] * 5 + [4],
        }
        for family, targets, how, seconds in (
            ("teamlora", "ffn", "published", 3.0),
            ("teamlora", "ffn", "packed", 2.0),
            ("moelora", "ffn", "published", 4.0),
            ("teamlora", "all", "published", 4.2),
            ("moelora", "all", "published", 4.0),
        )
    ]
    ratio = {"median": 1.25, "low": 1.2, "high": 1.3}
    timed = {"experts": 4, "targets": "ffn", "quantity": "decode", "over_base": ratio, "openings": 6}
    workload = {"batch": 1, "length": 64, "count": 24}
    in_torch = {"one": "1111", "two": "1100"}
    answered = {"PyTorch": in_torch, "fp32": in_torch, "int4": {"one": "1110", "two": "1000"}}
    exports = [
        {"cell": "c", "form": form, "mean": mean, "same": 90.0, "bytes": size, "right": answered[form]}
        for form, mean, size in (("PyTorch", 75.0, 0), ("fp32", 75.0, 5_000_000), ("int4", 50.0, 5_000_000))
    ]
    found = {
        "title": "A look",
        "notes": ["First.", "Second."],
        "seeds": [0],
        "scores": scores,
        "steps": steps,
        "inference": [
            {**timed, "family": family, "row": way, "workload": workload, "ratios": [ratio * by for by in ratios]}
            for family, ratios in (
                ("teamlora", [1.2, 1.25, 1.25, 1.25, 1.25, 1.3]),
                ("moelora", [1.45] + [1.5] * 4 + [1.55]),
            )
            for way, ratio in ((PUBLISHED, 1.0), ("our export", 0.5))
        ],
        "exports": exports,
    }
    text = tables(found)
    size = "of equal size on gate, up, down:"
    assert f"MoELoRA {size} +83.3 points (± 16.5 at 95 %, 3 seeds); the paper +0.6. Agrees" in text
    assert f" LoRA {size} +8.3 points (± 12.2 at 95 %, 3 seeds); the paper +1.5. Cannot tell: within the error." in text
    of_one_seed = "+83.3 points (standard error of the questions alone 7.9); the paper +1.2."
    assert f"{of_one_seed} Cannot tell: fewer than two common seeds." in text
    assert "half the parameters over a MoELoRA on gate, up, down: +66.7 points (± 20.8 at 95 %, 3 seeds)." in text
    assert "half the parameters over one with all of them on gate, up, down: -16.7 points (± 16.5 at" in text
    assert "- Of 3 pairs of families of equal size, k=4 on gate, up, down, none is farther apart than 99.8" in text
    assert "\n- Differences of less than 12.2 to 20.8 points cannot be told here; the paper's are 0.6 to 1.5. " in text
    step = "- A training step of TeamLoRA"
    assert f"{step} (one by one) over MoELoRA's (one by one), k=4 on gate, up, down: 0.75 (95 %: 0.75 - 1.00)" in text
    assert "; the paper 0.70. Does not agree: what it saves, if anything, is less." in text
    assert f"{step} (packed) over MoELoRA's (one by one), k=4 on gate, up, down: 0.50 (95 %" in text
    assert "| 3.00 | 1.50 (1.40 - 1.70) | 1.07 % |" in text
    # The paper's are of the feed-forward layers.
    assert (
        f"{step} (one by one) over MoELoRA's (one by one), k=4 on all projections: 1.05 (95 %: 1.00 - 1.05).\n" in text
    )
    assert (
        "- Inference with TeamLoRA over MoELoRA's, decode, k=4 on gate, up, down: published, PyTorch 0.83 "
        "(95 %: 0.77 - 0.90); the paper 0.71 where 40 % faster is 1/1.4, and 0.60 where it is 40 % less time. Agrees "
        "that it takes less, but saves less of it. Our export 0.83 (95 %: 0.77 - 0.90).\n"
    ) in text
    # What the paper says, it says of no other targets.
    elsewhere = [{**row, "targets": "all"} for row in found["inference"]]
    assert (
        "decode, k=4 on all projections: published, PyTorch 0.83 (95 %: 0.77 - 0.90). Our export 0.83 (95 %"
        in tables({**found, "inference": elsewhere})
    )
    assert "with its bases in turns of its own, of 6 openings of all models." in text
    # Another opening differs by more than the turns of one do.
    opened_once = tables({**found, "inference": [{**row, "openings": 1} for row in found["inference"]]})
    assert "in turns of its own, of one opening of all models." in opened_once
    assert "published, PyTorch 0.83 (of too few turns or openings for an interval); the paper 0.71" in opened_once
    assert "| TeamLoRA, k=4 | gate, up, down | decode | 1.25 (1.20 - 1.30) |" in text
    assert "| c | ONNX Runtime, int4 | 5 MB | 50.0 | -25.0 (0 won, 2 lost) | 90.0 % |" in text
    assert "| c | ONNX Runtime, fp32 | 5 MB | 75.0 | 0 (the same) | 90.0 % |" in text
    # By question: each of two tasks loses ten of forty, which has a variance of 3/16 a question (n - 1: 39).
    many = [{**row, "right": {task: bits * 10 for task, bits in row["right"].items()}} for row in exports]
    error = 100 * math.sqrt(2 * (3 / 16 * 40 / 39) / 40) / 2
    told = f"-25.0 ± {student(78) * error:.1f} (0 won, 20 lost)"
    assert f"| c | ONNX Runtime, int4 | 5 MB | 50.0 | {told} | 90.0 % |" in tables({**found, "exports": many})
    assert "| c | PyTorch, fp32 | - | 75.0 | - | 90.0 % |" in text
    assert "| the base | - | - | 0 | 1 | - | 8.3 | - |" in text
    other_steps = [{**score, "best_step": 100} if score["seed"] == 1 else score for score in scores]
    assert "| 3 | 100, 300 | " in tables({**found, "scores": other_steps}) and "100, 300" not in text
    assert " points on gate, up, down (8 degrees of freedom)." in text
    # A comparison of two versions of the code says so in its own line.
    assert "Of unlike code" not in text
    mixed = [{**score, "code": "0c0de"} if score["family"] == "moelora" else score for score in scores]
    (line,) = (line for line in verdicts({**found, "scores": mixed}) if "half the parameters over a MoELoRA" in line)
    assert line.endswith(" Of unlike code: TeamLoRA, k=4, half the parameters: 8aab571b; MoELoRA, k=4: 0c0de.")
    # What luck gives, beside what the base has without being taught the form of an answer.
    of_three = {"topic": 90, "code": 10, "oddity": 31}
    asked = {"by_task": of_three, "right": dict.fromkeys(of_three, "1" * 100)}
    guessed = tables({**found, "scores": [{**scores[1], **asked}]})
    assert " In oddity no family is above guessing (where that gives nothing: above 5) by more" in guessed
    assert "no family is above guessing" not in text
    hardly = {"by_task": {**of_three, "code": 8}, "right": asked["right"]}
    assert " In code, oddity no family" in tables({**found, "scores": [{**scores[1], **hardly}]})
    assert "| guessing | - | 25 | 0 | 25 |\n\nGuessing among the answers that a task has gives 16.7" in guessed
    assert "on average. The base was taught neither" in text and "The base was taught" not in guessed
    # Timings alone, on a machine with nothing else to do, and scores alone.
    alone = tables({**found, "scores": [], "exports": []})
    assert "## Scores" not in alone and "the paper 0.70" in alone and "## A training step" in alone
    assert "## A training step" not in tables({**found, "steps": [], "inference": []})
    # A machine is told once for each code that was timed there, whatever else it did at the time.
    on = {"processor": "a processor", "cores": 2, "versions": {"torch": "2"}}
    timings = [
        {**row, "code": code, "machine": {**on, "load": load}}
        for row, code, load in zip(found["inference"], ("0ne", "0ne", "0ne", "tw0"), range(4), strict=True)
    ]
    mixed = tables({**found, "inference": timings})
    assert [line for line in mixed.splitlines() if line.startswith("Timed on")] == [
        f"Timed on a processor, 2 cores, with torch 2, code {told}."
        for told in ("0ne; load before each: 0.0 to 2.0", "tw0; load before each: 3.0")
    ]
    assert "0.90). Rows are of unlike code, machines or openings." in mixed and "unlike code, machines" not in text
    write_plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def _by_experts(scores: dict[int, str]) -> dict:
    results = [
        {**_result("teamlora", right, seed), "cell": f"teamlora-k{k}-ffn-s{seed}", "experts": k}
        for k, right in scores.items()
        for seed in range(3)
    ]
    return {"scores": results, "steps": [], "inference": []}


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({2: "0" * 12, 4: "1" * 12, 8: "0" * 12}, "Agrees."),
        ({2: "0" * 12, 4: "0" * 12, 8: "1" * 12}, "Does not agree."),
        ({2: "0" * 12, 4: "1" * 12, 8: "1" * 12}, "Cannot tell."),
    ],
)
def test_the_best_number_of_experts_has_a_verdict(scores, told):
    (line,) = verdicts(_by_experts(scores))
    assert line.endswith(f"The paper has k=4 best. {told}")


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        ([0.69, 0.7, 0.7, 0.7, 0.7, 0.71], "Agrees."),
        ([0.8] * 6, "Agrees that it takes less, but saves less of it."),
        ([0.6] * 6, "Agrees that it takes less, but saves more of it."),
        ([0.9, 0.9, 0.9, 0.9, 0.9, 1.1], "Does not agree: what it saves, if anything, is less."),
        ([0.6, 0.9, 0.9, 0.9, 0.9, 1.1], "Cannot tell which takes less."),
        ([1.2] * 6, "Does not agree: it takes more."),
        ([0.7] * 5, "Cannot tell which takes less."),
    ],
)
def test_a_time_has_a_verdict_from_six_turns(ratios, told):
    row = {"experts": 4, "targets": "ffn", "implementation": "published"}
    steps = [
        {**row, "family": "teamlora", "seconds": ratios},
        {**row, "family": "moelora", "seconds": [1.0] * len(ratios)},
    ]
    (line,) = verdicts({"scores": [], "steps": steps, "inference": []})
    assert line.endswith(f"; the paper 0.70. {told}")
    assert interval([3, 1, 2, 4, 9, 5, 8, 7, 6]).bounds == (2, 8)


def test_families_are_compared_over_all_numbers_of_experts_where_two_seeds_of_each_tell_it():
    def results(family: str, right: str, seeds: int, k: int) -> list[dict]:
        found = []
        for seed in range(seeds):
            cell = Cell(family, k, "ffn", 1.0, seed)
            # Of other answers each, so that trainings have luck.
            bits = right[seed:] + right[:seed]
            found.append({**_result(family, bits), **dataclasses.asdict(cell), "cell": cell.name})
        return found

    def told(ours: int, theirs: int) -> list[str]:
        scores = []
        for k, right, other in (
            (2, "1110111101", "1010011000"),
            (4, "1111111110", "1010010101"),
            (8, "1" * 10, "01" * 5),
        ):
            scores += [*results("teamlora", right, 3, k), *results("moelora", other, theirs if k == 8 else ours, k)]
        found = {"scores": scores, "steps": [], "inference": []}
        return [line for line in verdicts(found) if "together" in line]

    (line,) = told(3, 2)
    # Of three pairs 40 points, of three more 40, and of two 50.
    assert line.startswith(
        "- TeamLoRA over MoELoRA of equal size on gate, up, down, k = 2, 4 and 8 together: +42.5 points"
    )
    assert line.endswith("8 trainings of each). Better.")
    assert not told(3, 1)


def test_luck_is_that_of_trainings_on_the_same_targets():
    """One that is large on all projections takes nothing from what is told of the feed-forward layers."""

    def margins(scores: list[dict]) -> list[str]:
        lines = verdicts({"scores": scores, "steps": [], "inference": []})
        return [line.partition("(")[2].partition(" at")[0] for line in lines if "gate, up, down: +" in line]

    def results(family: str, targets: str, rights: list[str]) -> list[dict]:
        cells = [Cell(family, 4, targets, 1.0, seed) for seed in range(len(rights))]
        return [
            {**_result(family, right, cell.seed), **dataclasses.asdict(cell), "cell": cell.name}
            for cell, right in zip(cells, rights, strict=True)
        ]

    steady = results("teamlora", "ffn", ["1" * 11 + "0", "1" * 12]) + results("moelora", "ffn", ["01" * 6, "0110" * 3])
    unsteady = results("teamlora", "all", ["1" * 12, "0" * 12]) + results("moelora", "all", ["0" * 12, "1" * 12])
    [alone], [beside] = margins(steady), margins([*steady, *unsteady])
    assert alone == beside
    told = [line for line in verdicts({"scores": [*steady, *unsteady], "steps": [], "inference": []}) if "luck" in line]
    assert "on gate, up, down (2 degrees of freedom), 70.7 points on all projections (2 degrees of freedom)." in told[0]
