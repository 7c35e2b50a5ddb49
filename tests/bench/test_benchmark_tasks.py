"""The benchmark's tasks: their parts share nothing but what a task is about, labels are balanced, answers are right."""

from __future__ import annotations

import ast
import collections
import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts" / "bench"))
from tasks import PARTS, TASKS, formal, make_examples, pairs, reading, reasoning, sentences, words  # noqa: E402

COUNTS = {"train": 400, "validation": 40, "test": 100}
LABELS = {
    "sentiment": {"positive", "negative"},
    "topic": {"sports", "science", "business", "cooking"},
    "inference": {"yes", "no", "maybe"},
    "paraphrase": {"same", "different"},
}
# So many words in a row of one part are in no other.
_RUN = 5


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, list]]:
    return {part: {task: make_examples(task, part, COUNTS[part]) for task in TASKS} for part in PARTS}


def prompts(parts: dict, part: str, task: str) -> set[str]:
    return {example.prompt for example in parts[part][task]}


@pytest.mark.parametrize("task", TASKS)
def test_no_run_of_words_of_one_part_is_in_another(task, parts):
    """Numbers count as one word, and so do brackets: no frame can be the same. That sees what the lists below hide."""

    def runs(part: str) -> set[tuple[str, ...]]:
        found = set()
        for prompt in prompts(parts, part, task):
            said = re.findall(r"\d+|[a-z']+", prompt.lower())
            said = ["0" if word.isdigit() else word for word in said]
            found |= {tuple(said[i : i + _RUN]) for i in range(len(said) - _RUN + 1)}
        return found

    for one, other in combinations(PARTS, 2):
        assert not runs(one) & runs(other)


def test_no_frame_and_no_word_of_a_list_is_of_two_parts():
    tables = [
        value
        for module in (words, sentences, pairs, reading, reasoning, formal)
        for value in vars(module).values()
        if isinstance(value, dict)
    ]
    by_part: dict[str, set[str]] = {part: set() for part in PARTS}

    def collect(value: object, part: str | None) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(inner, key if key in PARTS else part)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                collect(inner, part)
        elif isinstance(value, str) and part is not None:
            by_part[part].add(value.lower())

    for table in tables:
        collect(table, None)
    assert min(map(len, by_part.values())) > 80
    for one, other in combinations(PARTS, 2):
        assert by_part[one] & by_part[other] == set()


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_the_same_for_a_seed_and_have_prompts_of_their_own(task, parts):
    for part, count in COUNTS.items():
        assert len(prompts(parts, part, task)) == count
        assert make_examples(task, part, count) == parts[part][task]
        assert make_examples(task, part, 20, seed=1) != make_examples(task, part, 20, seed=0)
        for example in parts[part][task]:
            assert example.prompt.endswith(":") or re.search(r"(is|with)$", example.prompt) is None
            assert re.fullmatch(r" \S(.*\S)?", example.answer)
    assert not prompts(parts, "train", task) & prompts(parts, "test", task)


@pytest.mark.parametrize("task", LABELS)
def test_labels_are_used_equally_often(task, parts):
    for part in PARTS:
        found = collections.Counter(example.answer.strip() for example in parts[part][task])
        assert set(found) == LABELS[task]
        assert max(found.values()) - min(found.values()) <= 1


def test_no_label_follows_from_one_word_of_the_frame(parts):
    """The commonest label of a frame is no more than chance allows: a guesser by frames learns nothing."""
    for task, labels in LABELS.items():
        for part in PARTS:
            by_cue: dict[str, collections.Counter] = {}
            for example in parts[part][task]:
                cue = example.prompt.rpartition("\n")[2]
                by_cue.setdefault(cue, collections.Counter())[example.answer] += 1
            for cue, found in by_cue.items():
                if (total := found.total()) >= 60 and "claim" not in task:
                    assert max(found.values()) / total < 1 / len(labels) + 0.2, cue


def test_answers_are_right(parts):
    """Worked out here in another way, from the prompts alone."""
    for part in PARTS:
        for example in parts[part]["arithmetic"]:
            a, b = (int(number) for number in re.findall(r"\d+", example.prompt))
            assert int(example.answer) in (a + b, abs(a - b))
            adds = re.search(r"plus|\+|finds|sum|adds|add |joined|in \d+ years", example.prompt.lower())
            assert (int(example.answer) == a + b) == bool(adds)
        for example in parts[part]["ordering"]:
            found = example.answer.strip().split(", ")
            assert found == sorted(found) and len(found) == 4 and all(word in example.prompt for word in found)
        for example in parts[part]["brackets"]:
            opened = "".join(re.findall(r"[][(){}<>]", example.prompt))
            whole = opened + example.answer.replace(" ", "")
            while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", whole)) != whole:
                whole = shorter
            assert not whole
        for example in parts[part]["extraction"]:
            fields = json.loads(example.answer)
            assert list(fields) == ["name", "job", "city"]
            assert all(value in example.prompt for value in fields.values())
        for example in parts[part]["code"]:
            ast.parse(example.answer.strip(), mode="eval")
        for example in parts[part]["questions"]:
            assert len(re.findall(rf"\b{example.answer.strip()}\b", example.prompt)) == 1
        for example in parts[part]["oddity"]:
            kinds = [kind for kind in reasoning._KINDS[part] if example.answer.strip() in kind]
            others = [
                word for word in re.findall(r"[a-z]+", example.prompt) if any(word in k for k in reasoning._KINDS[part])
            ]
            assert len(kinds) == 1 and sum(word in kinds[0] for word in others) == 1


def test_sums_and_differences_end_with_every_digit_in_all_parts_though_no_pair_is_in_two():
    pairs_of: dict[str, set[tuple[int, ...]]] = {}
    for part in PARTS:
        ends = collections.defaultdict(collections.Counter)
        for example in make_examples("arithmetic", part, 400):
            operands = tuple(sorted(map(int, re.findall(r"\d+", example.prompt))))
            pairs_of.setdefault(part, set()).add(operands)
            ends[int(example.answer) == sum(operands)][int(example.answer) % 10] += 1
        for found in ends.values():
            assert set(found) == set(range(10)) and max(found.values()) < 0.2 * found.total(), (part, found)
    for one, other in combinations(PARTS, 2):
        assert not pairs_of[one] & pairs_of[other]


def test_inference_follows_from_the_premises(parts):
    """The order of the three, from the premises; a claim about a fourth is neither."""
    for part in PARTS:
        opposites = dict(pair.split("/") for pair in pairs._COMPARED[part])
        for example in parts[part]["inference"]:
            plain = re.sub(r"(\w+), who is", r"\1. \1 is", example.prompt)
            *premises, claim = re.findall(r"(\w+) is (\w+) than (\w+)", plain)
            more = premises[0][1]
            assert len(premises) == 2 and premises[1][1] == more and opposites[more] != more
            above = {(a, b) for a, _, b in premises}
            above |= {(a, d) for a, b in above for c, d in above if b == c}
            high, low = (claim[0], claim[2]) if claim[1] == more else (claim[2], claim[0])
            expected = "yes" if (high, low) in above else "no" if (low, high) in above else "maybe"
            assert example.answer == f" {expected}", example.prompt


def test_the_command_writes_the_same_files_each_time_and_refuses_what_cannot_be(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "bench" / "write_tasks.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    few = ("--train", "6", "--validation", "2", "--test", "3")
    for name in ("one", "two"):
        done = run("-o", str(tmp_path / name), *few)
        assert done.returncode == 0, done.stderr
    for part, count in {"train": 6, "validation": 2, "test": 3}.items():
        content = (tmp_path / "one" / f"{part}.jsonl").read_text()
        assert content == (tmp_path / "two" / f"{part}.jsonl").read_text()
        rows = [json.loads(line) for line in content.splitlines()]
        assert collections.Counter(row["task"] for row in rows) == dict.fromkeys(TASKS, count)
        assert all(set(row) == {"prompt", "answer", "task"} for row in rows)
    refused = run("-o", str(tmp_path / "three"), "--validation", "100000")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "has not 100000 different examples" in refused.stderr
    assert run("-o", str(tmp_path / "three"), "--test", "0").returncode == 2
