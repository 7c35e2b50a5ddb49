"""Runs an exported model with nothing but onnxruntime and numpy (and tokenizers, to read and print words).

    python runner.py "prompt" ["another prompt" ...]      text generation: the answers, streamed
    python runner.py --ids 504 3575 282                   token ids in, token ids out
    python runner.py "a sentence" ["another" ...]         other tasks: a vector or scores a line

It runs the model in its own folder, with the native library of the op that lies there, if one does; --model and
--library name others. Files are compared with the hashes in deploy.json (or manifest.json) first; --no-check leaves
that out.

One `Model` may be used by many threads at once: it holds no state of a request.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_NUMBERS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_RESULTS = ("sentence_embedding", "logits", "last_hidden_state")
# What describes a folder: which of its fields has the hashes, and the newest format that is known.
_DESCRIPTIONS = {"deploy.json": ("files", 1), "manifest.json": ("sha256", 2)}
# What is opened here or by a server, so that a list of hashes without one of them is not whole.
_OPENED = (
    *("model.onnx", "model.onnx.data", "adapter.onnx.data", "model.plan"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
)
_LIBRARY_NAME = "libteamlora_onnxruntime.so"
_LARGEST_TEXT = 512 << 20
_MOST_THREADS = 1024
_SPIN_MICROSECONDS = "20"
# A longer prompt is read in parts of so many tokens, which bounds the memory that it takes.
_PART = 512
_LEAST_CAPACITY = 256
# The names of the axis that holds the tokens of a cache in place, and of one whose layer sees so many tokens only.
CAPACITY = re.compile(r"capacity|window_([1-9]\d{0,8})")


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

        if not 0 <= threads <= _MOST_THREADS:
            raise ModelError(f"{threads} threads: give 0 to {_MOST_THREADS}.")
        self.folder = Path(folder)
        self._settings = read_settings(self.folder)
        if check:
            check_files(self.folder, self._settings.hashes)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # A number of its own: left to itself, ONNX Runtime binds each thread to a core, busy or not. Threads that spin
        # for as long as it lets them take the core from those that they wait for, as soon as anything else runs on the
        # machine; threads that do not spin at all wake too late for the next kernel.
        options.intra_op_num_threads = threads or _cores()
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
        try:
            if library is not None:
                # A bare name would be looked for in the system's folders.
                options.register_custom_ops_library(str(Path(library).resolve()))
        except Exception as error:
            raise ModelError(f"{library}: cannot be loaded as a library of ops ({brief(error)}).") from None
        try:
            self._session = ort.InferenceSession(self.folder / "model.onnx", options, ["CPUExecutionProvider"])
        except Exception as error:
            raise ModelError(
                f"{self.folder}: ONNX Runtime {ort.__version__} cannot load the model ({brief(error)})."
            ) from None
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._caches = [value for name, value in self._inputs.items() if name.startswith("past_key_values.")]
        self._check_interface()
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
        """Up to `count` tokens after each prompt (token ids), greedily, until its end-of-text token, which is left out,
        or until the model has no room for more.

        Args:
            on_token: called with (row of the batch, token) as soon as a token is known.

        Raises:
            ModelError: a prompt is empty, too long, or holds what is no token's id; or the model cannot run it.
        """
        count = self.require_room(prompts, count)
        if not self._settings.padded and len(set(map(len, prompts))) > 1:
            return [self._alone(row, prompt, count, on_token) for row, prompt in enumerate(prompts)]
        answers: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        for tokens in self.likeliest(prompts, count, going):
            for row, token in enumerate(tokens):
                going[row] = going[row] and token not in self._settings.stops
                if going[row]:
                    answers[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
            if not any(going):
                break
        return answers

    def _alone(
        self, row: int, prompt: Sequence[int], count: int, on_token: Callable[[int, int], object] | None
    ) -> list[int]:
        """A row of a batch by itself: in the model's rows nothing may stand in front of a text."""
        return self.generate([prompt], count, on_token and (lambda _, token: on_token(row, token)))[0]

    def stream(self, prompt: Sequence[int], count: int = 64) -> Iterator[int]:
        """The likeliest `count` tokens after a prompt, one by one; its end-of-text token is one like any other.

        Raises:
            ModelError: as `generate` does.
        """
        count = self.require_room([prompt], count)
        for tokens in self.likeliest([prompt], count, [True]):
            yield tokens[0]

    def likeliest(self, prompts: Sequence[Sequence[int]], count: int, going: Sequence[bool]) -> Iterator[list[int]]:
        """The next token of each row, `count` times, for which `require_room` found room; rows that are no longer
        `going` may be anything."""
        width = max(map(len, prompts))
        rows = [[*[self._settings.padding] * (width - len(prompt)), *prompt] for prompt in prompts]
        mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int64)
        step = np.array(rows, np.int64)
        kind = InPlaceCache if CAPACITY.fullmatch(str(self._caches[0].shape[2])) else GrowingCache
        cache = kind(self._session, self._caches, len(prompts), width + count)
        for _ in range(count):
            logits = self._read(cache, step, mask)
            self._require_numbers(logits[going])
            tokens = logits.argmax(axis=-1)
            yield tokens.tolist()
            step = tokens[:, None].astype(np.int64)
            mask = np.concatenate([mask, np.ones_like(step)], axis=1)

    def _read(self, cache: GrowingCache | InPlaceCache, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Read more tokens, in parts where they are many: [batch, tokens], and a mask over all so far -> logits of the
        last [batch, vocabulary]."""
        before = mask.shape[1] - ids.shape[1]
        for start in range(0, ids.shape[1], _PART):
            part = ids[:, start : start + _PART]
            seen = mask[:, : before + start + part.shape[1]]
            # Padding on the left: a real token's position is the number of real ones before it.
            positions = np.where(seen > 0, seen.cumsum(axis=1) - 1, 1)[:, -part.shape[1] :]
            given = {"input_ids": part, "attention_mask": seen, "position_ids": positions}
            try:
                logits = cache.run({name: value for name, value in given.items() if name in self._inputs})
            except Exception as error:
                raise ModelError(f"{self.folder}: ONNX Runtime cannot run the model ({brief(error)}).") from None
        return logits[:, -1]

    def require_room(self, prompts: Sequence[Sequence[int]], count: int) -> int:
        """How many tokens can follow the prompts, `count` at most; raises as `generate` does where there is none."""
        if not self.generates:
            raise ModelError(f"{self.folder}: does not generate text.")
        return self._settings.room([self._settings.require_ids(prompt) for prompt in prompts], count)

    def encode(self, inputs: Sequence[Sequence[int]]) -> np.ndarray:
        """Tasks other than generation: one row for each input (token ids).

        Sentence embeddings [batch, hidden], class logits [batch, classes], or hidden states [batch, tokens, hidden].
        """
        if self.generates:
            raise ModelError(f"{self.folder}: generates text; it gives no vectors.")
        inputs = [self._settings.require_ids(row) for row in inputs]
        self._settings.require_room(inputs)
        width = max(map(len, inputs))
        given = {
            "input_ids": [[*row, *[self._settings.padding] * (width - len(row))] for row in inputs],
            "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in inputs],
            "token_type_ids": [[0] * width for _ in inputs],
        }
        feeds = {name: np.array(value, np.int64) for name, value in given.items() if name in self._inputs}
        wanted = next(name for name in _RESULTS if name in self._outputs)
        try:
            found = self._session.run([wanted], feeds)[0]
        except Exception as error:
            raise ModelError(f"{self.folder}: ONNX Runtime cannot run the model ({brief(error)}).") from None
        self._require_numbers(found[feeds["attention_mask"] > 0] if wanted == "last_hidden_state" else found)
        return found

    def _require_numbers(self, found: np.ndarray) -> None:
        if np.isnan(found).any():
            raise ModelError(f"{self.folder}: the model's answer to this is no number (NaN).")

    def _check_interface(self) -> None:
        """Refuse a model that is not one of ours before anything is asked of it."""
        for name, value in self._inputs.items():
            if name not in _NUMBERS and value not in self._caches:
                raise ModelError(f"{self.folder}: its model has an input {name!r:.80}, which is unknown here.")
        for cache in self._caches:
            if cache.type not in NUMPY:
                raise ModelError(f"{self.folder}: has inputs of {cache.type}, which run on a GPU only.")
            sizes = [cache.shape[axis] for axis in (1, 3)] if len(cache.shape) == 4 else [None]
            if not all(isinstance(size, int) for size in sizes) or present_of(cache.name) not in self._outputs:
                raise ModelError(f"{self.folder}: its model's cache {cache.name!r:.80} is not one that is known here.")
        if not any(name in self._outputs for name in (("logits",) if self._caches else _RESULTS)):
            raise ModelError(f"{self.folder}: its model gives no {' or '.join(_RESULTS)}.")

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer (the package tokenizers)."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.folder, self._settings.cut)
        return self._tokenizer


class GrowingCache:
    """Keys and values of a request whose model gives back the past and what is new, as one."""

    def __init__(self, session: Any, caches: Sequence[Any], batch: int, _most: int) -> None:
        self._session = session
        self._past = {c.name: np.zeros((batch, c.shape[1], 0, c.shape[3]), NUMPY[c.type]) for c in caches}
        self._outputs = ["logits", *map(present_of, self._past)]

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Read tokens; their logits [batch, tokens, vocabulary]."""
        logits, *present = self._session.run(self._outputs, {**feeds, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        return logits


class InPlaceCache:
    """Keys and values of a request whose model writes into the buffers that it is given: one for each layer and kind,
    bound to both of its ends, and made longer by a quarter when it is full:
    attention goes over all of it, so that what is not used yet costs time.

    In a layer that sees a window of the text, a buffer that has room for the window and a part of the prompt is a ring:
    the model writes over what is not seen any more, and it grows no further.

    Args:
        most: tokens that it will hold at most.
    """

    def __init__(self, session: Any, caches: Sequence[Any], batch: int, most: int) -> None:
        self._session, self._binding = session, session.io_binding()
        self._most = most
        self._buffers = {c.name: np.zeros((batch, c.shape[1], 0, c.shape[3]), NUMPY[c.type]) for c in caches}
        windows = {c.name: CAPACITY.fullmatch(str(c.shape[2])) for c in caches}
        self._rings = {name: int(found[1]) - 1 + _PART for name, found in windows.items() if found and found[1]}
        self._capacity = 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Read tokens; their logits [batch, tokens, vocabulary]."""
        needed = feeds["attention_mask"].shape[1]
        if needed > self._capacity:
            self._grow(min(max(needed, self._capacity * 5 // 4, _LEAST_CAPACITY), max(needed, self._most)))
        for name, value in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(value))
        # Its size is the call's. It is the first of the outputs, since it was bound first.
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[0].numpy()

    def _grow(self, capacity: int) -> None:
        self._binding.clear_binding_outputs()
        self._binding.bind_output("logits")
        for name, old in self._buffers.items():
            # What a ring holds stands where it stood, as long as it was not full: it wraps from then on.
            rows = min(capacity, self._rings.get(name, capacity))
            new = np.zeros((*old.shape[:2], rows, old.shape[3]), old.dtype)
            new[:, :, : old.shape[2]] = old
            self._buffers[name] = new
            for bind, end in ((self._binding.bind_input, name), (self._binding.bind_output, present_of(name))):
                bind(end, "cpu", 0, new.dtype, new.shape, new.ctypes.data)
        self._capacity = capacity


@dataclass(frozen=True)
class Settings:
    """What describes the model.

    Attributes:
        hashes: SHA-256 of its files.
        vocabulary: ids are below it; None where that is not known. padding: the id that fills a row.
        stops: the ids that end a text.
        most: tokens that the model takes at most, prompt and answer together; None where there is no limit.
        cut: words are cut to so many tokens; None where a longer input is refused.
        padded: rows of one batch may have padding in front.
    """

    hashes: Mapping[str, str]
    vocabulary: int | None
    padding: int
    stops: tuple[int, ...]
    most: int | None
    cut: int | None
    padded: bool = True

    def require_ids(self, ids: Sequence[int]) -> list[int]:
        """The ids of one input, all of which must exist."""
        ids = list(ids)
        if not ids:
            raise ModelError("An empty prompt has nothing to go on from.")
        for id_ in ids:
            if not isinstance(id_, (int, np.integer)) or not 0 <= id_ < (self.vocabulary or 1 << 31):
                known = f"vocabulary of {self.vocabulary}" if self.vocabulary else "vocabulary"
                raise ModelError(f"Token {id_!r:.40} is not in the model's {known}.")
        return ids

    def require_room(self, inputs: Sequence[Sequence[int]]) -> None:
        """Refuse inputs that are longer than the model takes."""
        if not inputs:
            raise ModelError("There is no prompt.")
        longest = max(map(len, inputs))
        if self.most is not None and longest > self.most:
            raise ModelError(f"{longest} tokens; the model takes {self.most}.")

    def room(self, prompts: Sequence[Sequence[int]], count: int) -> int:
        """How many tokens can follow the prompts, `count` at most."""
        if count < 1:
            raise ModelError(f"{count} tokens: give at least 1.")
        self.require_room(prompts)
        longest = max(map(len, prompts))
        if longest == self.most:
            raise ModelError(f"{longest} tokens; the model takes {self.most}, its answer included.")
        return count if self.most is None else min(count, self.most - longest)


def read_settings(folder: Path) -> Settings:
    """From the deploy.json in the model's folder, or from a bundle's manifest.json.

    Raises:
        ModelError: there is none, a newer tool wrote it, or a field is missing or of another type.
    """
    name = next((name for name in _DESCRIPTIONS if os.path.lexists(folder / name)), None)
    if name is None:
        raise ModelError(f"{folder}: holds neither deploy.json nor manifest.json. Is it a model's folder?")
    path, (entry, newest) = folder / name, _DESCRIPTIONS[name]
    fields = read_json(path)
    version = fields.get("format_version")
    if type(version) is int and version > newest:
        raise ModelError(f"{path}: was written by a newer teamlora-export. Use that version's program.")
    hashes: Any = fields.get(entry)
    tokens: Any = fields.get("tokens")

    def fits(name: str, least: int) -> bool:
        return name in tokens and (tokens[name] is None or _is_whole(tokens[name], least))

    if not (
        _is_whole(version, 1)
        and isinstance(hashes, dict)
        and all(isinstance(value, str) for value in hashes.values())
        and isinstance(tokens, dict)
        and all(fits(name, 1) for name in ("vocabulary", "most", "cut"))
        and _is_whole(tokens.get("padding"), 0)
        and isinstance(tokens.get("stops"), list)
        and all(_is_whole(stop, 0) for stop in tokens["stops"])
    ):
        raise ModelError(f"{path}: format_version, {entry} or tokens are not as they should be. Copy it again.")
    return Settings(
        hashes,
        tokens["vocabulary"],
        tokens["padding"],
        tuple(tokens["stops"]),
        tokens["most"],
        tokens["cut"],
        tokens.get("padded") is not False,
    )


def _is_whole(value: object, least: int) -> bool:
    return type(value) is int and least <= value < 1 << 31


def open_tokenizer(folder: Path, cut: int | None) -> Any:
    """The model's tokenizer, from the package tokenizers; it cuts words to `cut` tokens, special ones included.

    Raises:
        ModelError: it is missing, or cannot be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path}: is missing, so words cannot be read (runner.py takes --ids).")
    with _tokenizing(f"{path}: cannot be read as a tokenizer"):
        tokenizer = Tokenizer.from_buffer(read_bytes(path))
        tokenizer.no_padding()
        # What the file itself says of lengths has no meaning: transformers and sentence-transformers set it anew.
        tokenizer.no_truncation()
        if cut is not None:
            tokenizer.enable_truncation(cut)
    return tokenizer


def encode_text(tokenizer: Any, text: str, specials: bool = True) -> list[int]:
    """The token ids of a text; with the special ones that the tokenizer puts around it.

    Raises:
        ModelError: the text is not UTF-8, or the tokenizer fails on it.
    """
    with _tokenizing(f"{text!r:.80}: cannot be read by the tokenizer"):
        text.encode()
        return tokenizer.encode(text, add_special_tokens=specials).ids


@contextmanager
def _tokenizing(what: str) -> Iterator[None]:
    """The package tokenizers panics on some files, which is no Exception."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what} ({brief(error)}).") from None


class TextStream:
    """Turns the tokens after a prompt into text piece by piece: a piece ends where a character does.

    Read with the prompt's end before them: at the start of a text, some tokenizers leave out a token's space.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-8:])
        # A prompt of ids may end within a character, which the answer completes.
        self._shown = tokenizer.decode(self._tokens).rstrip("\ufffd")

    def add(self, token: int) -> str:
        """What `token` adds to the text; nothing while a character is not complete."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\ufffd"):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece


def check_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare every file of the model with its hash.

    Raises:
        ModelError: the list of hashes is not whole, a file is missing, or it is another one.
    """
    listed = {"model.onnx", "model.onnx.data"} <= set(hashes) or any(_is_engine(name) for name in hashes)
    unlisted = [name for name in _OPENED if (folder / name).is_file() and name not in hashes]
    if not listed or unlisted:
        missing = unlisted[0] if unlisted else "the model"
        raise ModelError(f"{folder}: its list of hashes lacks {missing}. Copy the folder again.")
    for file, expected in hashes.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise ModelError(f"{folder}: its list of hashes names {file!r:.80}, which is not in its folder.")
        if _sha256(folder / file) != expected:
            raise ModelError(
                f"{folder / file}: is not the file that belongs here (its SHA-256 differs). Copy it again."
            )


def _is_engine(name: str) -> bool:
    return name == "model.plan" or (name.startswith("engines/") and name.endswith(".engine"))


def _sha256(path: Path) -> str:
    try:
        with _open(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). Copy the folder again.") from None


def answer(model: Model, prompts: Sequence[str], count: int, write: Callable[[str], object]) -> tuple[int, float]:
    """Answer prompts; a single one is streamed. Returns the number of tokens and the seconds that they took.

    Args:
        write: is given the text piece by piece, fit for any terminal.
    """
    ids = [encode_text(model.tokenizer, prompt) for prompt in prompts]
    # Before anything is written.
    model.require_room(ids, count)
    started = time.perf_counter()
    if len(prompts) == 1:
        text = TextStream(model.tokenizer, ids[0])
        write(_printable(prompts[0]))
        tokens = model.generate(ids, count, lambda _row, token: write(_printable(text.add(token))))
        write("\n")
    else:
        tokens = model.generate(ids, count)
        for prompt, given, row in zip(prompts, ids, tokens, strict=True):
            text = TextStream(model.tokenizer, given)
            write(_printable(prompt + "".join(map(text.add, row))) + "\n")
    return sum(map(len, tokens)), time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", metavar="TEXT")
    parser.add_argument("--ids", type=_number, nargs="+", help="token ids of one prompt, in place of words")
    parser.add_argument("--tokens", type=_number, default=64, help="generate at most so many")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the model's folder")
    library_help = f"a native library with the op; default: {_LIBRARY_NAME} beside this program, if it is there"
    parser.add_argument("--library", type=Path, default=_library_beside(), help=library_help)
    parser.add_argument("--threads", type=_number, default=0, help="of ONNX Runtime; 0: every core")
    parser.add_argument("--no-check", action="store_true", help="do not compare the files with their hashes")
    given = parser.parse_args(arguments)
    if bool(given.prompts) == bool(given.ids):
        parser.error("give TEXT or --ids")
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


def _library_beside() -> Path | None:
    """What was deployed with this program. A model's folder is never searched for code."""
    path = Path(__file__).parent / _LIBRARY_NAME
    return path if path.is_file() else None


def _answer(given: argparse.Namespace) -> None:
    model = Model(given.model, given.library, not given.no_check, given.threads)
    if given.ids:
        values = model.generate([given.ids], given.tokens)[0] if model.generates else model.encode([given.ids])[0]
        _write(" ".join(map(str, np.ravel(values).tolist())) + "\n")
    elif model.generates:
        prompts = [prompt.replace("\\n", "\n") for prompt in given.prompts]
        count, seconds = answer(model, prompts, given.tokens, _write)
        print(f"({count} tokens, {count / seconds:.1f} a second)", file=sys.stderr)
    else:
        for row in model.encode([encode_text(model.tokenizer, text) for text in given.prompts]):
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


def _cores() -> int:
    """Processor cores that this process may use; two threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len({_core_of(processor) for processor in os.sched_getaffinity(0)})


def _core_of(processor: int) -> str:
    """The processors of one core, as the system writes them; the processor alone where it does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(processor)


def present_of(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def brief(error: BaseException) -> str:
    """The first line of what another library says."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]}..."


def _open(path: Path) -> Any:
    """A regular file for reading; opening a FIFO would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path) -> bytes:
    try:
        with _open(path) as file:
            data = file.read(_LARGEST_TEXT + 1)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None
    if len(data) > _LARGEST_TEXT:
        raise ModelError(f"{path}: is larger than such a file can be.")
    return data


def read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({brief(error)}). Copy it again.") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: does not hold a JSON object. Copy it again.")
    return fields


if __name__ == "__main__":
    main()
