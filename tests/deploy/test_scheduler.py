"""Continuous batching, without a server: texts are the runner's, whoever shares the batch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import readme_block
from waiting import wait_until

sys.path.append(str(Path(__file__).parent))
from scheduled_texts import at_work, finish, greedy, tokens

from teamlora_export.deploy import slots
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.python import deploy_python
from teamlora_export.deploy.runner import Model
from teamlora_export.deploy.sampling import Sampling
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.session import Session

pytest_plugins = ["scheduler_fixtures"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", "in-place"),
        ("mistral", "in-place"),
        ("gemma3", "in-place"),
        ("mistral", "growing"),
        ("llama", "on a device"),
        ("gemma3", "on a device"),
    ],
)
def test_texts_are_the_runners_in_whatever_order_they_come_and_go(name, cache, seed, open_slots):
    """Prompts are read in parts, some texts are cancelled, buffers grow, shrink and, with windows, wrap."""
    drawn = random.Random(seed)
    model = open_slots(name, cache, slots=drawn.choice([1, 2, 5]), part=drawn.choice([3, 8, 64]))
    requests = [
        ([drawn.randrange(3, 384) for _ in range(drawn.randrange(1, 60))], drawn.randrange(1, 60)) for _ in range(12)
    ]
    scheduler, answers = Scheduler(model), []
    for prompt, count in requests:
        answers.append(scheduler.submit(prompt, count))
        for _ in range(drawn.randrange(12)):
            scheduler.turn()
        if drawn.random() < 0.2:
            drawn.choice(answers).cancel()
    finish(scheduler)
    alone = Model(model._session.folder, threads=1)
    for (prompt, count), answer in zip(requests, answers, strict=True):
        (expected,) = alone.generate([prompt], count)
        found = tokens(answer)
        if answer.finish == "cancelled":
            assert found == expected[: len(found)]
        else:
            assert found == expected
            assert answer.finish == ("length" if len(found) == min(count, 128 - len(prompt)) else "stop")
    assert {answer.finish for answer in answers} >= {"length"}
    assert at_work(model) == 0


def test_threads_that_ask_at_once_share_steps_and_get_what_they_get_alone(open_slots):
    model, drawn = open_slots(slots=8), random.Random(3)
    prompts = [[drawn.randrange(3, 384) for _ in range(drawn.randrange(1, 40))] for _ in range(200)]
    expected = greedy(model, prompts, 6)
    shared, read = [], model.read

    def watched(row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The first call is not over before each thread has asked."""
        wait_until(lambda: shared or sum(map(len, (scheduler._waiting, scheduler._reading, scheduler._writing))) == 8)
        shared.append(len(ids))
        return read(row, ids)

    model.read = watched  # type: ignore[method-assign]
    with Scheduler(model, waiting=200) as scheduler, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: tokens(scheduler.submit(prompt, 6)), prompts)) == expected
    assert max(shared) > 4


def test_a_prompt_that_is_read_moves_for_one_that_is_read_before_it(open_slots):
    model = open_slots(slots=2, part=4)
    prompts = [list(range(30, 50)), [9, 10]]
    scheduler = Scheduler(model)
    answers = [scheduler.submit(prompt, 10) for prompt in prompts]
    finish(scheduler)
    assert [tokens(answer) for answer in answers] == greedy(model, prompts, 10)


def test_the_same_seed_draws_the_same_text_in_any_company(open_slots):
    model = open_slots(slots=4)
    drawn = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=11)

    def text(company: int) -> list[int]:
        scheduler = Scheduler(model)
        others = [scheduler.submit([20 + n] * (3 + n), 30, Sampling(1.0, seed=n)) for n in range(company)]
        answer = scheduler.submit([5, 6, 7], 20, drawn)
        finish(scheduler)
        assert all(others)
        return tokens(answer)

    alone = text(0)
    assert text(3) == text(1) == alone != greedy(model, [[5, 6, 7]], 20)[0]


def test_log_probabilities_are_the_models_own(open_slots):
    model = open_slots(slots=1)
    scheduler = Scheduler(model)
    answer = scheduler.submit([5, 6, 7], 3, Sampling(temperature=2.0, top_k=3, seed=1), log_probabilities=True)
    finish(scheduler)
    found, ids = list(answer), [5, 6, 7]
    assert len(found) == 3
    for token in found:
        model.clear(0)
        logits = model.read(0, [ids])[0].astype(np.float64)
        expected = logits[token.id] - np.log(np.exp(logits).sum())
        assert token.log_probability == pytest.approx(expected, abs=1e-4)
        ids.append(token.id)


def test_requests_and_models_that_cannot_be_are_refused(open_slots, make_bundle):
    scheduler = Scheduler(open_slots(most=40))
    for prompt, count, message in (
        ([], 4, "empty prompt"),
        ([384], 4, "not in the model's vocabulary of 384"),
        ([5] * 40, 4, "40 tokens; the model takes 40, its answer included"),
        ([5], 0, "give at least 1"),
    ):
        with pytest.raises(ModelError, match=message):
            scheduler.submit(prompt, count)
    assert not scheduler.busy
    with pytest.raises(ModelError, match="does not generate text"):
        slots.open_slots(Session(make_bundle("bert").folder))
    with pytest.raises(ModelError, match="0 slots"):
        open_slots(slots=0)
    with pytest.raises(ModelError, match="0 waiting"):
        Scheduler(scheduler._model, waiting=0)


def test_deployed_with_the_runner_it_works_as_its_readme_says(make_bundle, tmp_path):
    folder = deploy_python(make_bundle("llama", cache="in-place"), tmp_path / "out")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # It is imported from where it lies, and nothing else of ours is.
    program = f"{readme_block(folder, 'python', 2)}\nimport sys\nassert 'teamlora_export' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
