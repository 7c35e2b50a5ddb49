"""Greedy text from a bundle with nothing but onnxruntime and numpy (and tokenizers, to read and print words).

run_bundle.py BUNDLE "prompt"            words in, words out
run_bundle.py BUNDLE --ids 504 3575 282  token ids in, token ids out
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--ids", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if (arguments.prompt is None) == (arguments.ids is None):
        parser.error("give a prompt or --ids")

    if arguments.ids:
        print(*generate(arguments.bundle, arguments.ids, arguments.tokens))
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.bundle / "tokenizer.json"))
    prompt = arguments.prompt.replace("\\n", "\n")
    started = time.perf_counter()
    tokens = generate(arguments.bundle, tokenizer.encode(prompt).ids, arguments.tokens)
    print(prompt + tokenizer.decode(tokens))
    print(f"({len(tokens)} tokens in {time.perf_counter() - started:.1f} s, loading included)")


def generate(bundle: Path, ids: list[int], count: int) -> list[int]:
    """Up to `count` tokens after `ids`, greedily, until the model's end-of-text token."""
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    stop = json.loads((bundle / "config.json").read_text()).get("eos_token_id")
    feeds = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16 if "16" in value.type else np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    names = [value.name for value in session.get_outputs()]
    step, total, tokens = list(ids), 0, []
    while len(tokens) < count:
        feeds["input_ids"] = np.array([step], np.int64)
        feeds["position_ids"] = np.arange(total, total + len(step), dtype=np.int64)[None]
        total += len(step)
        feeds["attention_mask"] = np.ones((1, total), np.int64)
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        token = int(outputs["logits"][0, -1].argmax())
        if token in (stop if isinstance(stop, list) else [stop]):
            break
        tokens.append(token)
        step = [token]
        feeds = {
            name.replace("present", "past_key_values"): value for name, value in outputs.items() if name != "logits"
        }
    return tokens


if __name__ == "__main__":
    main()
