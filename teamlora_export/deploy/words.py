"""Words to token ids, and an answer's tokens back to words, piece by piece as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from teamlora_export.deploy.failure import ModelError, brief
    from teamlora_export.deploy.model_folder import read_bytes
else:
    # Deployed: the files lie beside one another.
    from failure import ModelError, brief
    from model_folder import read_bytes

_MOST_STOPS = 16
_LONGEST_STOP = 1024
# Tokens before an answer that its first one is read with.
_BEFORE = 8
# Tokens that one character takes at most; what is no character after so many will be none.
_LONGEST_CHARACTER = 16


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


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """As `encode_text`; the special token that begins a text is put there once, where a chat template wrote it already.

    Raises:
        ModelError: as `encode_text` does.
    """
    ids = encode_text(tokenizer, text)
    if ids[:1] == ids[1:2]:
        bare = encode_text(tokenizer, text, specials=False)
        if ids[1 : len(bare) + 1] == bare:
            return ids[1:]
    return ids


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

    Read with what is before them: at the start of a text, some tokenizers leave out a token's space.

    Raises:
        ModelError: the tokenizer fails on them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The last piece's tokens, and those that are no whole character yet.
        self._before = list(prompt[-_BEFORE:])
        self._tokens: list[int] = []
        # A prompt of ids may end within a character, which the answer completes.
        self._shown = self._decoded(self._before).rstrip("\ufffd")

    def add(self, token: int) -> str:
        """What `token` adds to the text; nothing while a character is not complete."""
        self._tokens.append(token)
        text = self._decoded(self._before + self._tokens)
        piece = text[len(self._shown) :]
        if len(self._tokens) < _LONGEST_CHARACTER and (not piece or piece.endswith("\ufffd")):
            return ""
        if piece:
            self._before, self._shown = self._tokens, self._decoded(self._tokens)
        self._tokens = []
        return piece

    def _decoded(self, tokens: Sequence[int]) -> str:
        with _tokenizing("An answer's tokens cannot be written by the tokenizer"):
            return self._tokenizer.decode(tokens)


class StoppedText:
    """Text that comes in pieces, up to the first of some strings, which is left out.

    What could be the beginning of such a string is held back until it is known.

    Args:
        decode: what a further token adds to the text (`TextStream.add`).
    """

    def __init__(self, decode: Callable[[int], str], stops: Sequence[str]) -> None:
        if len(stops) > _MOST_STOPS or not all(0 < len(stop) <= _LONGEST_STOP for stop in stops):
            raise ModelError(f"stop: give {_MOST_STOPS} strings at most, each of 1 to {_LONGEST_STOP} characters.")
        self._decode, self._stops = decode, stops
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be shown after a further token."""
        self._held += self._decode(token)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.rest()
        kept = max((self._begun(stop) for stop in self._stops), default=0)
        end = len(self._held) - kept
        piece, self._held = self._held[:end], self._held[end:]
        return piece

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        piece, self._held = self._held, ""
        return piece

    def _begun(self, stop: str) -> int:
        """How much of a stop string the text ends with."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((length for length in lengths if self._held.endswith(stop[:length])), 0)
