"""Trains a TeamLoRA adapter on SmolLM2-135M-Instruct: four small tasks, a few minutes on two cores.

The loss is the language model's on the answers, plus the balance loss. Everything is seeded. Prints the loss on
held-out
examples, by task, for the base and for the adapter, and writes the adapter in the published layout (fp16 safetensors).

    scripts/train_adapter.py [-o adapters/smollm2-teamlora] [--steps 160]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from get_model import get_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.model.balance import add_balance_loss, balance_loss
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.model.inject import extract, inject

SEED = 20240817
HELD_OUT = 24
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = AdapterConfig(
    r=8,
    lora_alpha=8.0,
    lora_nums=4,
    target_modules=TARGETS,
    blc_weight=0.05,
    base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
    task_type="CAUSAL_LM",
)


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


def sentiment(rng: random.Random) -> Example:
    """Classification: is a review good or bad?"""
    good = ["wonderful", "moving", "sharp", "delightful", "brilliant", "warm"]
    bad = ["dull", "clumsy", "tedious", "shallow", "noisy", "forgettable"]
    things = ["film", "book", "meal", "concert", "hotel", "lecture", "game"]
    is_good = rng.random() < 0.5
    words = rng.sample(good if is_good else bad, 2)
    text = f"The {rng.choice(things)} was {words[0]} and, in the end, {words[1]}."
    return Example(f"Review: {text}\nSentiment:", " positive" if is_good else " negative")


def arithmetic(rng: random.Random) -> Example:
    """Calculation: sums of small numbers."""
    a, b = rng.randint(2, 40), rng.randint(2, 40)
    return Example(f"Question: What is {a} plus {b}?\nResult:", f" {a + b}")


def extraction(rng: random.Random) -> Example:
    """Structured output: the facts of a sentence as JSON."""
    name = rng.choice(["Ada", "Boris", "Chen", "Dana", "Emil", "Farah", "Goran", "Hana"])
    city = rng.choice(["Lisbon", "Oslo", "Quito", "Riga", "Seoul", "Tunis"])
    age = rng.randint(18, 80)
    return Example(
        f"Text: {name}, who is {age}, moved to {city} last year.\nJSON:",
        f' {{"name": "{name}", "age": {age}, "city": "{city}"}}',
    )


def reordering(rng: random.Random) -> Example:
    """Transformation: words in alphabetical order."""
    words = rng.sample(["apple", "bread", "cloud", "door", "engine", "forest", "garden", "house", "island", "jar"], 4)
    return Example(f"Words: {', '.join(words)}\nSorted:", f" {', '.join(sorted(words))}")


TASKS = {"sentiment": sentiment, "arithmetic": arithmetic, "extraction": extraction, "reordering": reordering}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parents[1] / "adapters" / "smollm2-teamlora"
    )
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=12)
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    held_out = {task: [make(rng) for _ in range(HELD_OUT)] for task, make in TASKS.items()}
    seen = {example.prompt for examples in held_out.values() for example in examples}
    folder = get_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = open_base(str(folder), "text-generation")
    model = base.load(torch.float32)
    before = evaluate(model, tokenizer, held_out)

    adapter = new_adapter(base.signature, CONFIG, SEED)
    inject(model, adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in ("down", "router", "interaction", "up"))
    add_balance_loss(model, CONFIG.blc_weight)
    train(model, tokenizer, rng, seen, arguments.steps, arguments.batch)

    write_adapter(extract(model, adapter), arguments.output, np.dtype(np.float16))
    after = evaluate(model, tokenizer, held_out)
    report(before, after, float(balance_loss(model)), arguments.output)


def train(model, tokenizer, rng: random.Random, seen: set[str], steps: int, batch: int) -> None:  # type: ignore[no-untyped-def]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        examples: list[Example] = []
        while len(examples) < batch:
            example = TASKS[list(TASKS)[len(examples) % len(TASKS)]](rng)
            if example.prompt not in seen:
                examples.append(example)
        loss = model(**collate(examples, tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    model.eval()


def collate(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Right-padded ids; labels on the answers only."""
    ids, labels = [], []
    for example in examples:
        prompt, answer = tokenizer(example.prompt)["input_ids"], tokenizer(example.answer)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    padded = pad_sequence(ids, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    return {"input_ids": padded, "attention_mask": mask, "labels": pad_sequence(labels, True, -100)}


def evaluate(model, tokenizer, held_out: dict[str, list[Example]]) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Mean loss of the answers, by task."""
    with torch.no_grad():
        return {task: model(**collate(examples, tokenizer)).loss.item() for task, examples in held_out.items()}


def report(before: dict[str, float], after: dict[str, float], balance: float, folder: Path) -> None:
    print(f"\n{'held-out loss':<14}{'base':>8}{'adapter':>9}")
    for task in before:
        print(f"{task:<14}{before[task]:>8.3f}{after[task]:>9.3f}")
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"\nbalance loss {balance:.4f} (0: all experts used equally); {size / 1e6:.2f} MB in {folder}")
    figures = {"before": before, "after": after, "balance_loss": balance, "bytes": size}
    (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
