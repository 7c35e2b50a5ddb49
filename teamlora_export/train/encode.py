"""Rows as token ids, cut into words as the deployed programs do it: what is trained is what will be asked.

    prompt    as a program reads it: with the special tokens that the tokenizer puts around a text; or as a user's turn
              of the model's own chat template, which renders in a limited process of its own
    answer    no special tokens, as it follows what is before it; and then the token that ends a text, or with a
              chat template the one that this puts after an answer
    labels    the answer and its end; nothing is learned from the prompt

Free of torch.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teamlora_export.deploy.chat import Chat
from teamlora_export.deploy.failure import ModelError
from teamlora_export.deploy.words import encode_prompt, encode_text, open_tokenizer
from teamlora_export.errors import ExportError, raise_findings
from teamlora_export.files import read_json
from teamlora_export.tokens import read_tokens
from teamlora_export.train.data import Row
from teamlora_export.train.options import TrainOptions

_DEFAULT_LENGTH = 2048
# What an answer is encoded behind, and no word begins or goes on with; some tokenizers drop a line's end, or make one
# token of it and what is before it.
_ANCHORS = ("\n", "x:", "(")
# An answer that a chat template writes as it is, and writes nothing like it itself.
_SAMPLE = "Yes, 4711."


@dataclass(frozen=True)
class Encoded:
    """One row: `ids`, of which the first `prompt_length` are the prompt's; `task` is a number."""

    ids: tuple[int, ...]
    prompt_length: int
    task: int


@dataclass(frozen=True)
class Lengths:
    """What became of rows that were not read as they are, for the report.

    Attributes:
        most: tokens of a row; cut, skipped: rows that had more.
        ended: where answers are that hold a token that ends a text. spaced: those that the tokenizer begins with a
            space that nobody wrote.
    """

    most: int
    cut: int = 0
    skipped: int = 0
    ended: tuple[str, ...] = ()
    spaced: tuple[str, ...] = ()

    def told(self) -> str | None:
        """Of rows that were too long."""
        words = []
        if self.cut:
            words.append(
                "1 prompt lost its beginning" if self.cut == 1 else f"{self.cut:,} prompts lost their beginning"
            )
        if self.skipped:
            words.append("1 row was left out" if self.skipped == 1 else f"{self.skipped:,} rows were left out")
        return f"Longer than {self.most:,} tokens: {' and '.join(words)}." if words else None

    def doubts(self) -> list[str]:
        """Of answers that are learned as they are, and hardly meant so."""
        found = []
        if self.ended:
            found.append(
                f"Answers that hold a token that ends a text, where the model learns to end: {_some(self.ended)}."
            )
        if self.spaced:
            found.append(
                f"Answers that the tokenizer begins with a space that is not in them: {_some(self.spaced)}. Write them "
                "with the space that follows a prompt."
            )
        return found


class Encoder:
    """Encodes rows for the model in `folder`.

    Attributes:
        most: tokens of a row. ends: whether there is a token that ends a text.

    Raises:
        ExportError: the model has no tokenizer, or --max-length is more than it takes.
    """

    def __init__(self, folder: Path, options: TrainOptions) -> None:
        tokens = read_tokens(folder, "text-generation")
        self.most = _longest(options, tokens.most)
        self.padding = tokens.padding
        self.ends = bool(tokens.stops)
        self._stops, self._end = tokens.stops, tokens.stops[:1]
        self._start = tokens.start
        self._vocabulary = tokens.vocabulary
        self._too_long = options.too_long
        with _explained():
            self._tokenizer = open_tokenizer(folder, None)
            # Some tokenizers put a space before each text, which within a text is one that nobody wrote.
            self._prepends = next(self._behind("a"), self._ids("a")) != self._ids("a")
        if options.chat and not _has_template(folder):
            raise ExportError("--chat: the model has no chat template. Leave the option out.")
        self._chat = Chat(folder) if options.chat else None

    def encode(self, rows: Sequence[Row], tasks: Sequence[str]) -> tuple[list[Encoded], Lengths]:
        """The rows that fit, and what became of the others.

        Raises:
            ExportError: a row is too long, or the tokenizer or the chat template refuses it; all of them by line.
        """
        numbers = {task: number for number, task in enumerate(tasks)}
        encoded: list[Encoded] = []
        findings: list[str] = []
        unread: list[str] = []
        ended: list[str] = []
        self._spaced: list[str] = []
        cut = skipped = 0
        try:
            if self._chat is not None:
                self._end = self._end_of_turn(self._chat)
            for row in rows:
                with _explained(row.where):
                    prompt, answer = self._prompt(row.prompt), self._answer(row)
                if reason := self._why_not(prompt, answer):
                    unread.append(f"{row.where}: {reason}")
                    continue
                if set(self._stops).intersection(answer):
                    ended.append(row.where)
                answer += self._end
                over = len(prompt) + len(answer) - self.most
                if over > 0 and self._too_long == "skip":
                    skipped += 1
                    continue
                if over > 0 and (self._too_long == "error" or len(answer) >= self.most):
                    findings.append(f"{row.where}: {len(prompt) + len(answer):,} tokens, {self.most:,} at most")
                    continue
                if over > 0:
                    prompt = self._without_beginning(prompt, over)
                    cut += 1
                encoded.append(Encoded((*prompt, *answer), len(prompt), numbers[row.task]))
        finally:
            if self._chat is not None:
                self._chat.close()
        raise_findings("Rows that the model cannot read", unread)
        raise_findings("Rows that are too long (raise --max-length, or give --too-long cut or skip)", findings)
        if not encoded:
            raise ExportError(f"No row has {self.most:,} tokens or fewer. Raise --max-length.")
        return encoded, Lengths(self.most, cut, skipped, tuple(ended), tuple(self._spaced))

    def _prompt(self, text: str) -> list[int]:
        if self._chat is None:
            return encode_text(self._tokenizer, text)
        return encode_prompt(self._tokenizer, self._chat.text(json.dumps([{"role": "user", "content": text}])))

    def _answer(self, row: Row) -> list[int]:
        """Without its end."""
        ids = self._ids(row.answer)
        if self._prepends:
            behind = next(self._behind(row.answer), None)
            if behind is None and not row.answer[0].isspace():
                self._spaced.append(row.where)
            ids = ids if behind is None else behind
        return ids

    def _behind(self, text: str) -> Iterator[list[int]]:
        """The tokens of a text that something is before, for each that stays what it is."""
        for anchor in _ANCHORS:
            before = self._ids(anchor)
            ids = self._ids(anchor + text)
            if before and ids[: len(before)] == before:
                yield ids[len(before) :]

    def _why_not(self, prompt: list[int], answer: list[int]) -> str | None:
        """Why the model cannot learn from a row."""
        for name, ids in (("prompt", prompt), ("answer", answer)):
            if not ids:
                return f"the tokenizer makes no token of its {name}"
            if self._vocabulary is not None and max(ids) >= self._vocabulary:
                return f"its {name} has token {max(ids)}, and the model has {self._vocabulary:,}, from 0"
        return None

    def _ids(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text, specials=False)

    def _end_of_turn(self, chat: Chat) -> tuple[int, ...]:
        """Of the tokens that end a text, the first that the template puts after an answer; where it puts none there, or
        does not take an answer, the first of all."""
        turns = [{"role": "user", "content": _SAMPLE}, {"role": "assistant", "content": _SAMPLE}]
        try:
            after = chat.text(json.dumps(turns)).rpartition(_SAMPLE)[2]
            ids = self._ids(after)
        except ModelError:
            ids = []
        return (*(token for token in ids if token in self._stops), *self._stops)[:1]

    def _without_beginning(self, prompt: list[int], over: int) -> list[int]:
        """The token that begins a text stays."""
        start = 1 if prompt[0] == self._start and len(prompt) > over + 1 else 0
        return prompt[:start] + prompt[start + over :]


def digest(rows: Sequence[Encoded], tasks: Sequence[str]) -> str:
    """SHA-256 of what is learned from: the tokens, and which of them are answers of which task."""
    found = hashlib.sha256(json.dumps(list(tasks)).encode())
    for row in rows:
        found.update(array("q", (len(row.ids), row.prompt_length, row.task, *row.ids)).tobytes())
    return found.hexdigest()


def collator(padding: int) -> Callable[[Sequence[Encoded]], dict[str, Any]]:
    """Makes a batch of rows: input_ids, attention_mask and labels (-100: not learned), int64 [rows, longest]."""

    def collate(rows: Sequence[Encoded]) -> dict[str, Any]:
        import torch

        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), padding)
        labels = torch.full((len(rows), longest), -100)
        mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for i, row in enumerate(rows):
            length = len(row.ids)
            ids[i, :length] = torch.tensor(row.ids)
            labels[i, row.prompt_length : length] = ids[i, row.prompt_length : length]
            mask[i, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def _some(where: Sequence[str]) -> str:
    return f"{len(where):,}, the first in {where[0]}" if len(where) > 1 else where[0]


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path, "Download the model again.", folder).get("chat_template"))


def _longest(options: TrainOptions, positions: int | None) -> int:
    if options.max_length is None:
        return min(_DEFAULT_LENGTH, positions or _DEFAULT_LENGTH)
    if positions is not None and options.max_length > positions:
        raise ExportError(f"--max-length {options.max_length}: the model has {positions:,} positions.")
    return options.max_length


@contextmanager
def _explained(where: str = "") -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ExportError(f"{where}: {error}" if where else str(error)) from None
