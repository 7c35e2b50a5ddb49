"""Runs an exported model with nothing but onnxruntime and numpy (and tokenizers, to read and print words).

    python runner.py "prompt" ["another prompt" ...]      text generation: the answers, streamed
    python runner.py --ids 504 3575 282                   token ids in, token ids out
    python runner.py "a sentence" ["another" ...]         other tasks: a vector or scores a line

It runs the model in its own folder, with the native library of the op that lies there, if one does; --model and
--library name others. Files are compared with the hashes in deploy.json (or manifest.json) first; --no-check leaves
that out. Tokens are the likeliest; --temperature and what follows it draw them.

One `Model` may be used by many threads at once: it holds no state of a request. `scheduler.py` has many requests share
its steps, as the prompts of one call of `generate` do.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.answers import Answer, Failed
    from teamlora_export.deploy.engine_session import open_session
    from teamlora_export.deploy.failure import ModelError
    from teamlora_export.deploy.model_session import RESULTS
    from teamlora_export.deploy.sampling import GREEDY, Sampling
    from teamlora_export.deploy.scheduler import Scheduler
    from teamlora_export.deploy.slots import MOST_SLOTS, Slots, open_slots
    from teamlora_export.deploy.words import StoppedText, TextStream, encode_text, open_tokenizer
else:
    # Deployed: the files lie beside one another.
    from answers import Answer, Failed
    from engine_session import open_session
    from failure import ModelError
    from model_session import RESULTS
    from sampling import GREEDY, Sampling
    from scheduler import Scheduler
    from slots import MOST_SLOTS, Slots, open_slots
    from words import StoppedText, TextStream, encode_text, open_tokenizer

_LIBRARY_NAME = "libteamlora_onnxruntime.so"
# In place of an adapter's name, which begins with a letter or a digit.
_BASE_ALONE = "-"
# A longer prompt is read in parts of so many tokens, which bounds the memory that it takes.
_PART = 512


class Model:
    """A model in a folder: `generate` or `encode`, by its task.

    Args:
        folder, library, check, threads, device: see `Session`.
    """

    def __init__(
        self, folder: Path, library: Path | None = None, check: bool = True, threads: int = 0, device: str = "cpu"
    ) -> None:
        self._session = open_session(folder, library, check, threads, device=device)
        self.folder, self.settings = self._session.folder, self._session.settings
        self._tokenizer: Any = None

    @property
    def generates(self) -> bool:
        return bool(self._session.caches)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (the package tokenizers)."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.folder, self.settings.cut)
        return self._tokenizer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        count: int = 64,
        on_token: Callable[[int, int], object] | None = None,
        sampling: Sampling = GREEDY,
        adapters: Sequence[str | None] | None = None,
    ) -> list[list[int]]:
        """Up to `count` tokens after each prompt (token ids), until its end-of-text token, which is left out, or until
        the model has no room for more.

        Args:
            on_token: called with (row of the batch, token) as soon as a token is known; `True` ends the row.
            adapters: of a model with a shelf, the name of each prompt's; None: none, for a prompt or for all.

        Raises:
            ModelError: a prompt is empty, too long, or holds what is no token's id; or there is no such adapter, or
                the model cannot run it.
        """
        scheduler, answers = self.ask(prompts, count, sampling, adapters=adapters)
        tokens: list[list[int]] = [[] for _ in prompts]
        for row, token in _arriving(scheduler, answers):
            tokens[row].append(token)
            if on_token is not None and on_token(row, token) is True:
                answers[row].cancel()
        return tokens

    def stream(
        self, prompt: Sequence[int], count: int = 64, sampling: Sampling = GREEDY, adapter: str | None = None
    ) -> Iterator[int]:
        """The tokens of `generate` for one prompt, as they come.

        Raises:
            ModelError: as `generate` does.
        """
        for _, token in _arriving(*self.ask([prompt], count, sampling, adapters=[adapter])):
            yield token

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        sampling: Sampling = GREEDY,
        stops: Collection[int] | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> tuple[Scheduler, list[Answer]]:
        """The requests of `generate`, each of whose steps is a turn of the scheduler's. The first reads the prompts.

        Args:
            stops: the ids that end a text; None: the model's.
        """
        self.require_room(prompts, count)
        named = self.require_adapters(len(prompts), adapters)
        longest = max(map(len, prompts))
        rows = min(len(prompts), self._session.rows or MOST_SLOTS, MOST_SLOTS)
        slots = open_slots(self._session, rows, _PART, longest + count)
        # All of them in one turn.
        scheduler = Scheduler(slots, waiting=len(prompts), reading=len(prompts) * (longest + _PART))
        return scheduler, [
            scheduler.submit(prompt, count, sampling, stops=stops, adapter=adapter)
            for prompt, adapter in zip(prompts, named, strict=True)
        ]

    @property
    def adapters(self) -> list[str]:
        """The names of those that a prompt can have; none where the model has one of its own."""
        return self._session.adapters.names if self._session.adapters is not None else []

    def require_adapters(self, count: int, adapters: Sequence[str | None] | None) -> list[str | None]:
        """The adapter of each of `count` prompts; raises as `generate` does, where there is none of a name."""
        named: list[str | None] = [None] * count if adapters is None else list(adapters)
        if len(named) != count:
            raise ModelError(f"{len(named)} adapters for {count} prompts: name one for each.")
        for name in {name for name in named if name is not None}:
            if self._session.adapters is None:
                raise ModelError(f"{self.folder}: has one adapter of its own, and no other ({name!r:.80}).")
            self._session.adapters.find(name)
        return named

    def slots(self, count: int, part: int = 256, most: int | None = None) -> Slots:
        """Room for `count` texts at a time, for a `Scheduler`; see `Slots`."""
        return open_slots(self._session, count, part, most)

    def require_room(self, prompts: Sequence[Sequence[int]], count: int) -> None:
        """Raises as `generate` does, where a prompt is none that it takes."""
        if not self.generates:
            raise ModelError(f"{self.folder}: does not generate text.")
        self.settings.room([self.settings.require_ids(prompt) for prompt in prompts], count)

    def encode(self, inputs: Sequence[Sequence[int]], adapters: Sequence[str | None] | None = None) -> np.ndarray:
        """Tasks other than generation: one row for each input (token ids).

        Sentence embeddings [batch, hidden], class logits [batch, classes], or hidden states [batch, tokens, hidden].

        Args:
            adapters: see `generate`.

        Raises:
            ModelError: an input is empty, too long, or holds what is no token's id; or there is no such adapter, there
                are more of them than slots, or the model cannot run it.
        """
        if self.generates:
            raise ModelError(f"{self.folder}: generates text; it gives no vectors.")
        inputs = [self.settings.require_ids(row) for row in inputs]
        self.settings.require_room(inputs)
        width = max(map(len, inputs))
        given = {
            "input_ids": [[*row, *[self.settings.padding] * (width - len(row))] for row in inputs],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in inputs],
            "token_type_ids": [[0] * width for _ in inputs],
        }
        feeds = self._session.taken({name: np.array(value, np.int64) for name, value in given.items()})
        wanted = next(name for name in RESULTS if name in self._session.outputs)
        found = self._session.run(wanted, feeds, self.require_adapters(len(inputs), adapters))
        seen = found[feeds["attention_mask"] > 0] if wanted == "last_hidden_state" else found
        if np.isnan(seen).any():
            raise ModelError(f"{self.folder}: the model's answer to this is no number (NaN).")
        return found


def _arriving(scheduler: Scheduler, answers: Sequence[Answer]) -> Iterator[tuple[int, int]]:
    """The tokens of all answers, as (row, token), as they come."""
    while scheduler.busy:
        scheduler.turn()
        for row, answer in enumerate(answers):
            try:
                for token in answer.arrived():
                    yield row, token.id
            except Failed as error:
                raise ModelError(str(error)) from None


def shared_adapters(adapters: Sequence[str], count: int) -> Sequence[str | None] | None:
    """Of `count` prompts, as a command line names them: one that is named once is that of all, `-` is the base alone.
    None: there is none."""
    named = [None if name == _BASE_ALONE else name for name in adapters]
    return named * count if len(named) == 1 else named or None


def answer(
    model: Model,
    prompts: Sequence[str],
    count: int,
    write: Callable[[str], object],
    sampling: Sampling = GREEDY,
    stops: Sequence[str] = (),
    adapters: Sequence[str] = (),
) -> tuple[int, float]:
    """Answer prompts; a single one is streamed. Returns the number of tokens and the seconds that they took.

    Args:
        write: is given the text piece by piece, fit for any terminal.
        stops: strings before the first of which an answer ends.
        adapters: the name of the prompt's own, of each one's, or of the one that all share; nothing: none.
    """
    ids = [encode_text(model.tokenizer, prompt) for prompt in prompts]
    texts = [StoppedText(TextStream(model.tokenizer, given).add, stops) for given in ids]
    # Before anything is written.
    model.require_room(ids, count)
    named = model.require_adapters(len(prompts), shared_adapters(adapters, len(prompts)))
    held: list[list[str]] = [[prompt] for prompt in prompts]

    def take(row: int, token: int) -> bool:
        held[row].append(texts[row].add(token))
        if len(prompts) == 1:
            show(row)
        return texts[row].stopped

    def show(row: int) -> None:
        write(_printable("".join(held[row])))
        held[row].clear()

    if len(prompts) == 1:
        show(0)
    started = time.perf_counter()
    tokens = model.generate(ids, count, take, sampling, named)
    seconds = time.perf_counter() - started
    for row, text in enumerate(texts):
        held[row] += [text.rest(), "\n"]
        show(row)
    return sum(map(len, tokens)), seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="TEXT")
    parser.add_argument("--ids", type=_number, nargs="+", help="token ids of one prompt, in place of words")
    parser.add_argument("--tokens", type=_number, default=64, help="generate at most so many")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token, always; above: drawn")
    parser.add_argument("--top-k", type=_number, default=0, help="draw from so many of the likeliest; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that are so likely together")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of tokens that are there already")
    parser.add_argument("--seed", type=_number, help="the same one draws the same tokens")
    adapter_help = (
        "of a model with several: the name of the one to answer with; again for each prompt's own, - for none"
    )
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME", help=adapter_help)
    parser.add_argument("--stop", action="append", default=[], help="end an answer before this string; again for more")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the model's folder")
    library_help = f"a native library with the op; default: {_LIBRARY_NAME} beside this program, if it is there"
    parser.add_argument("--library", type=Path, help=library_help)
    parser.add_argument("--threads", type=_number, default=0, help="of ONNX Runtime; 0: every core")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:1 and so on, with onnxruntime-gpu")
    parser.add_argument("--no-check", action="store_true", help="do not compare the files with their hashes")
    given = parser.parse_args(arguments)
    if bool(given.prompts) == bool(given.ids):
        parser.error("give TEXT or --ids")
    if given.ids and given.stop:
        parser.error("--stop: is for TEXT")
    for stream in (sys.stdout, sys.stderr):
        # A terminal may know less than the model says.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        _answer(given)
    except ModelError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("Interrupted.")
    except MemoryError:
        _fail("Not enough memory for this model on this machine.")
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed: pip install -r requirements.txt")
    except OSError as error:
        _fail(f"{error.filename or 'The output'}: {error.strerror or error}.")


def _library_beside(device: str = "cpu") -> Path | None:
    """What was deployed with this program. A model's folder is never searched for code."""
    path = Path(__file__).parent / _LIBRARY_NAME
    return path if path.is_file() and device == "cpu" else None


def _answer(given: argparse.Namespace) -> None:
    model = Model(
        given.model, given.library or _library_beside(given.device), not given.no_check, given.threads, given.device
    )
    drawn = Sampling(given.temperature, given.top_k, given.top_p, given.repetition_penalty, seed=given.seed)
    if given.ids and model.generates:
        named = shared_adapters(given.adapter, 1)
        found = model.generate([given.ids], given.tokens, sampling=drawn, adapters=named)
        _write(" ".join(map(str, found[0])) + "\n")
    elif given.ids:
        _write(
            " ".join(map(str, np.ravel(model.encode([given.ids], shared_adapters(given.adapter, 1))[0]).tolist()))
            + "\n"
        )
    elif model.generates:
        prompts = [prompt.replace("\\n", "\n") for prompt in given.prompts]
        count, seconds = answer(model, prompts, given.tokens, _write, drawn, given.stop, given.adapter)
        print(f"({count} tokens, {count / seconds:.1f} a second)", file=sys.stderr)
    else:
        texts = [encode_text(model.tokenizer, text) for text in given.prompts]
        for row in model.encode(texts, shared_adapters(given.adapter, len(texts))):
            _write(json.dumps(row.astype(float).tolist()) + "\n")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _fail(message: str) -> None:
    print(f"Error: {_printable(message, keep='')}", file=sys.stderr, flush=True)
    # What is left in the output's buffer may have nowhere to go.
    os._exit(2)


def _printable(text: str, keep: str = "\n\t") -> str:
    """`text` with its control characters escaped, but for those in `keep`: a terminal would obey them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def _number(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number")
    return int(text)


if __name__ == "__main__":
    main()
