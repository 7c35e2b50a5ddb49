"""Runs an exported model with nothing but onnxruntime and numpy (and tokenizers, to read and print words).

    python runner.py "prompt" ["another prompt" ...]      text generation: the answers, streamed
    python runner.py --ids 504 3575 282                   token ids in, token ids out
    python runner.py "a sentence" ["another" ...]         other tasks: a vector or scores a line

It runs the model in its own folder; --model names another. Files are compared with the hashes in deploy.json (or
manifest.json) first; --no-check leaves that out.

One `Model` may be used by many threads at once: it holds no state of a request.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class ModelError(Exception):
    """The model's folder is not what it should be, or the request is not; the message says what and where."""


class Model:
    """A model in a folder: `generate` or `encode`, by its task.

    Args:
        library: a native library with the op, to be used in place of the definition inside the model.
        check: compare the files with their hashes first.
        threads: of ONNX Runtime; 0 takes every core.
    """

    def __init__(self, folder: Path, library: Path | None = None, check: bool = True, threads: int = 0) -> None:
        import onnxruntime as ort

        self.folder = Path(folder)
        if check:
            check_files(self.folder)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if library is not None:
            options.register_custom_ops_library(str(library))
        try:
            self._session = ort.InferenceSession(self.folder / "model.onnx", options, ["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(
                f"{self.folder}: ONNX Runtime {ort.__version__} cannot load the model ({error})."
            ) from None
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._caches = [value for name, value in self._inputs.items() if name.startswith("past_key_values.")]
        for cache in self._caches:
            if cache.type not in _NUMPY:
                raise ModelError(f"{self.folder}: has inputs of {cache.type}, which run on a GPU only.")
        self._settings = read_settings(self.folder)
        self._tokenizer: Any = None

    @property
    def generates(self) -> bool:
        return bool(self._caches)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        count: int = 64,
        on_token: Callable[[int, int], object] | None = None,
    ) -> list[list[int]]:
        """Up to `count` tokens after each prompt (token ids), greedily, until its end-of-text token, which is left out.

        Args:
            on_token: called with (row of the batch, token) as soon as a token is known.
        """
        if not self.generates:
            raise ModelError(f"{self.folder}: does not generate text.")
        if not prompts or not all(prompts):
            raise ModelError("An empty prompt has nothing to go on from.")
        width = max(map(len, prompts))
        self._settings.require_room(width, count)
        rows = [[self._settings.padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
        step = np.array(rows, np.int64)
        answers: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        feeds = {c.name: np.zeros((len(prompts), c.shape[1], 0, c.shape[3]), _NUMPY[c.type]) for c in self._caches}
        for _ in range(count):
            # Padding on the left: a real token's position is the number of real ones before it.
            positions = np.where(mask > 0, mask.cumsum(axis=1) - 1, 1)[:, -step.shape[1] :]
            given = {"input_ids": step, "attention_mask": mask, "position_ids": positions}
            feeds.update({name: value for name, value in given.items() if name in self._inputs})
            outputs = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
            tokens = outputs.pop("logits")[:, -1].argmax(axis=-1)
            for row, token in enumerate(tokens.tolist()):
                going[row] = going[row] and token not in self._settings.stops
                if going[row]:
                    answers[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
            if not any(going):
                break
            feeds = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
            step = tokens[:, None].astype(np.int64)
            mask = np.concatenate([mask, np.ones_like(step)], axis=1)
        return answers

    def encode(self, inputs: Sequence[Sequence[int]]) -> np.ndarray:
        """Tasks other than generation: one row for each input (token ids).

        Sentence embeddings [batch, hidden], class logits [batch, classes], or hidden states [batch, tokens, hidden].
        """
        if self.generates:
            raise ModelError(f"{self.folder}: generates text; it gives no vectors.")
        if not inputs or not all(inputs):
            raise ModelError("An empty input has nothing to encode.")
        width = max(map(len, inputs))
        given = {
            "input_ids": [[*row, *[self._settings.padding] * (width - len(row))] for row in inputs],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in inputs],
            "token_type_ids": [[0] * width for _ in inputs],
        }
        feeds = {name: np.array(value, np.int64) for name, value in given.items() if name in self._inputs}
        wanted = next(n for n in ("sentence_embedding", "logits", "last_hidden_state") if n in self._outputs)
        return self._session.run([wanted], feeds)[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (the package tokenizers)."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.folder)
        return self._tokenizer


@dataclass(frozen=True)
class Settings:
    """What the model's configuration says of its tokens.

    Attributes:
        stops: the tokens that end a text. padding: the one that fills a row.
        positions: tokens of prompt and answer together; None where no limit is known.
    """

    stops: tuple[int, ...]
    padding: int
    positions: int | None

    def require_room(self, width: int, count: int) -> None:
        """Refuse a prompt of `width` tokens that cannot have an answer of `count`."""
        if self.positions and width + count > self.positions:
            raise ModelError(f"{width} tokens and {count} more do not fit into the model's {self.positions} positions.")


def read_settings(folder: Path) -> Settings:
    """From config.json and generation_config.json in the model's folder."""
    config = _read_json(folder / "config.json")
    settings = {**config, **_read_json(folder / "generation_config.json")}
    stops = settings.get("eos_token_id")
    return Settings(
        stops=tuple(stops if isinstance(stops, list) else [] if stops is None else [stops]),
        padding=int(settings.get("pad_token_id") or 0),
        positions=config.get("max_position_embeddings") or config.get("n_positions"),
    )


def open_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, from the package tokenizers."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path}: is missing, so words cannot be read (runner.py takes --ids).")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """Turns tokens into text piece by piece: a piece ends where a character does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """What `token` adds to the text; nothing while a character is not complete."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def check_files(folder: Path) -> None:
    """Compare every file of the model with its hash in deploy.json, or in a bundle's manifest.json.

    Raises:
        ModelError: there are no hashes, a file is missing, or it is another one.
    """
    for name, entry in (("deploy.json", "files"), ("manifest.json", "sha256")):
        if (folder / name).is_file():
            hashes = _read_json(folder / name).get(entry, {})
            break
    else:
        raise ModelError(f"{folder}: holds neither deploy.json nor manifest.json. Is it a model's folder?")
    for file, expected in hashes.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ModelError(f"{folder / name}: names {file}, which is not in its folder.")
        if not (folder / file).is_file():
            raise ModelError(f"{folder / file}: is missing. Copy the folder again.")
        with (folder / file).open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != expected:
            raise ModelError(
                f"{folder / file}: is not the file that belongs here (its SHA-256 differs). Copy it again."
            )


def answer(model: Model, prompts: Sequence[str], count: int, write: Callable[[str], object]) -> tuple[int, float]:
    """Answer prompts; a single one is streamed. Returns the number of tokens and the seconds that they took."""
    ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    started = time.perf_counter()
    if len(prompts) == 1:
        text = TextStream(model.tokenizer)
        write(prompts[0])
        tokens = model.generate(ids, count, lambda _row, token: write(text.add(token)))
        write("\n")
    else:
        tokens = model.generate(ids, count)
        for prompt, row in zip(prompts, tokens, strict=True):
            write(prompt + model.tokenizer.decode(row) + "\n")
    return sum(map(len, tokens)), time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="TEXT")
    parser.add_argument("--ids", type=int, nargs="+", help="token ids of one prompt, in place of words")
    parser.add_argument("--tokens", type=int, default=64, help="generate at most so many")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the model's folder")
    parser.add_argument("--library", type=Path, help="a native library with the op")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: every core")
    parser.add_argument("--no-check", action="store_true", help="do not compare the files with their hashes")
    given = parser.parse_args(arguments)
    if bool(given.prompts) == bool(given.ids):
        parser.error("give TEXT or --ids")
    try:
        model = Model(given.model, given.library, not given.no_check, given.threads)
        if given.ids:
            values = model.generate([given.ids], given.tokens)[0] if model.generates else model.encode([given.ids])[0]
            print(*np.ravel(values).tolist())
        elif model.generates:
            prompts = [prompt.replace("\\n", "\n") for prompt in given.prompts]
            count, seconds = answer(model, prompts, given.tokens, _write)
            print(f"({count} tokens, {count / seconds:.1f} a second)", file=sys.stderr)
        else:
            for row in model.encode([model.tokenizer.encode(text).ids for text in given.prompts]):
                print(json.dumps(row.astype(float).tolist()))
    except ModelError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None


if __name__ == "__main__":
    main()
