"""The rows of a training as the model reads them: held out, encoded, counted, and known by what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from teamlora_export.progress import Reporter
from teamlora_export.train.data import Row, Rows, shared_prompts, split_rows
from teamlora_export.train.encode import Encoded, Encoder, Lengths, digest
from teamlora_export.train.options import TrainOptions

# As `Material.hashes` has them, beside files.
PARTS = ("rows as tokens", "held-out rows as tokens")


@dataclass(frozen=True)
class Material:
    """The rows of a training, encoded.

    Attributes:
        hashes: SHA-256 of the files, by name, and of what the model reads of each part. lengths: of both parts.
    """

    rows: list[Encoded]
    held_out: list[Encoded]
    tasks: list[str]
    hashes: dict[str, str]
    encoder: Encoder
    lengths: Lengths


def read_material(
    options: TrainOptions, read: Rows, held_out: Rows | None, folder: Path, reporter: Reporter
) -> Material:
    """The rows in their parts.

    Args:
        held_out: rows of files of their own; None: `options.held_out_share` of `read`.
        folder: of the base's tokenizer.

    Raises:
        ExportError: the model cannot read them.
    """
    rows, kept = read.rows, held_out.rows if held_out is not None else []
    if options.held_out_share:
        rows, kept = split_rows(read.rows, options.held_out_share, options.seed)
    if both := shared_prompts(rows, kept):
        reporter.warn(f"{both:,} of {len(kept):,} held-out rows have a prompt that is trained on.")
    encoder = Encoder(folder, options)
    if not encoder.ends:
        reporter.warn("The model names no token that ends a text: answers are trained without an end.")
    tasks = sorted({row.task for row in (*rows, *kept)})
    parts = [_encode_part(part, encoder, tasks, reporter) for part in (rows, kept)]
    encoded = [found for found, _ in parts]
    cut, skipped = (sum(getattr(lengths, name) for _, lengths in parts) for name in ("cut", "skipped"))
    hashes = {**read.sha256, **(held_out.sha256 if held_out is not None else {})}
    # What the model reads of them, which the tokenizer and its end tokens decide as well.
    hashes |= {name: digest(part, tasks) for name, part in zip(PARTS, encoded, strict=True) if part}
    held = f", {_count(encoded[1], 'row')} held out" if kept else ""
    reporter.say(f"{_count(encoded[0], 'row')} of {_count(tasks, 'task')}{held}")
    lengths = dataclasses.replace(parts[0][1], cut=cut, skipped=skipped)
    return Material(encoded[0], encoded[1], tasks, hashes, encoder, lengths)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things):,} {name}{'s' if len(things) != 1 else ''}"


def _encode_part(
    rows: Sequence[Row], encoder: Encoder, tasks: Sequence[str], reporter: Reporter
) -> tuple[list[Encoded], Lengths]:
    if not rows:
        return [], Lengths(encoder.most)
    encoded, lengths = encoder.encode(rows, tasks)
    if told := lengths.told():
        reporter.warn(told)
    for doubt in lengths.doubts():
        reporter.warn(doubt)
    return encoded, lengths
