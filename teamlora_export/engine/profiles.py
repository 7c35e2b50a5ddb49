"""Optimisation profiles: for which shapes an engine is built, and for which it is tuned.

Text generation has two, because prefill and decode want other kernels: "prefill" reads a prompt into an empty cache (or
one with a row that is masked out: Triton's state cannot be empty), "decode" adds one token to a cache of any length.
Where the cache is in place, its buffers have one fixed capacity, the most tokens; they are there from the first call
on, so "prefill" reads any number of tokens against what they hold already: a long prompt in parts.
Other tasks have one profile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from teamlora_export.bundle import Bundle
from teamlora_export.errors import ExportError
from teamlora_export.ports import BATCH, PAST, SEQUENCE, TOTAL, Port, is_capacity, keeps_in_place

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]

# Without --shapes: (batch, tokens) at least, best, at most; tokens at most what the model has positions for.
_GENERATION = ((1, 1), (1, 256), (4, 2048))
_ENCODING = ((1, 1), (8, 128), (32, 512))
_SHAPES = re.compile(r"^" + ",".join([r"(\d{1,9})x(\d{1,9})"] * 3) + "$", re.ASCII)


@dataclass(frozen=True)
class ShapeProfile:
    """One profile: the least, the best and the largest shape of each input."""

    name: str
    inputs: Mapping[str, Range]

    def accepts(self, shapes: Mapping[str, Shape]) -> bool:
        return self.refusal(shapes) is None

    def refusal(self, shapes: Mapping[str, Shape]) -> str | None:
        """The first shape outside of the profile, in words, or None."""
        for name, shape in shapes.items():
            least, _, most = self.inputs[name]
            inside = len(shape) == len(least) and all(
                low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
            )
            if not inside:
                return f"{name} is {list(shape)}, the profile '{self.name}' takes {list(least)} to {list(most)}"
        return None


def make_profiles(bundle: Bundle, shapes: str | None, others: tuple[Port, ...] = ()) -> tuple[ShapeProfile, ...]:
    """The profiles of `bundle` for `--shapes`, "BATCHxTOKENS" three times: at least, best, at most.

    For text generation TOKENS is the length of prompt and answer together; the most is the capacity of a cache in
    place.

    Args:
        others: inputs of the engine that are none of the bundle's own: see `slot_inputs`.

    Raises:
        ExportError: `shapes` is not of that form or not in order, or longer than the model's positions.
    """
    generates = bundle.manifest.task == "text-generation"
    points = _parse(shapes) if shapes else _default(bundle, _GENERATION if generates else _ENCODING)
    limit = bundle.manifest.tokens.most
    if limit is not None and points[2][1] > limit:
        raise ExportError(f"--shapes: {points[2][1]} tokens, but the model has {limit} positions.")
    ports = (*bundle.manifest.inputs, *others)
    if not generates:
        sizes = [{BATCH: batch, SEQUENCE: tokens} for batch, tokens in points]
        return (_profile("all", ports, sizes),)
    if keeps_in_place(bundle.manifest.inputs):
        return _in_place(ports, points)
    prefill = [
        {BATCH: batch, SEQUENCE: tokens, PAST: past, TOTAL: past + tokens}
        for (batch, tokens), past in zip(points, (0, 0, 1), strict=True)
    ]
    decode = [{BATCH: batch, SEQUENCE: 1, PAST: tokens - 1, TOTAL: tokens} for batch, tokens in points]
    return (
        _profile("prefill", ports, prefill),
        _profile("decode", ports, decode),
    )


def capacity_of(profiles: Sequence[ShapeProfile]) -> int | None:
    """Tokens that an in-place cache holds in an engine of `profiles`; None where the cache grows, or there is none."""
    sizes = {
        (least[2], most[2])
        for profile in profiles
        for name, (least, _, most) in profile.inputs.items()
        if name.startswith("past_key_values.")
    }
    fixed = {most for least, most in sizes if least == most}
    return fixed.pop() if len(sizes) == len(fixed) == 1 else None


def choose_capacity(bundle: Bundle, wanted: int | None) -> int | None:
    """Tokens that an in-place cache is to hold where that has to be a number: `wanted`, or as many as an engine built
    without `--shapes` holds. None where the cache grows, or there is none.

    Raises:
        ExportError: it is `wanted` for no such cache, or more than the model takes.
    """
    if not keeps_in_place(bundle.manifest.inputs):
        if wanted is not None:
            raise ExportError(f"--capacity {wanted}: {bundle.folder} keeps no cache in place. Leave it out.")
        return None
    limit = bundle.manifest.tokens.most
    if wanted is not None and limit is not None and wanted > limit:
        raise ExportError(f"--capacity {wanted}: the model takes {limit} tokens.")
    return wanted or _default(bundle, _GENERATION)[2][1]


def _in_place(ports: tuple[Port, ...], points: list[tuple[int, int]]) -> tuple[ShapeProfile, ...]:
    capacity = points[2][1]
    fixed = {str(size): capacity for port in ports for size in port.shape if is_capacity(size)}
    sizes = [{BATCH: batch, TOTAL: tokens, **fixed} for batch, tokens in points]
    # The last part of a prompt may be one token.
    parts = (1, points[1][1], capacity)
    return (
        _profile("prefill", ports, [{**size, SEQUENCE: part} for size, part in zip(sizes, parts, strict=True)]),
        _profile("decode", ports, [{**size, SEQUENCE: 1} for size in sizes]),
    )


def _parse(text: str) -> list[tuple[int, int]]:
    match = _SHAPES.match(text.replace(" ", ""))
    if match is None:
        raise ExportError(f"--shapes {text}: give BATCHxTOKENS three times, such as 1x1,1x128,8x1024.")
    numbers = [int(number) for number in match.groups()]
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    if min(numbers) < 1 or any(sorted(column) != list(column) for column in (numbers[::2], numbers[1::2])):
        raise ExportError(f"--shapes {text}: must be at least 1, and ordered: at least, best, at most.")
    return points


def _default(bundle: Bundle, points: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    limit = bundle.manifest.tokens.most or points[2][1]
    return [(batch, min(tokens, limit)) for batch, tokens in points]


def _profile(name: str, ports: tuple[Port, ...], sizes: list[dict[str, int]]) -> ShapeProfile:
    inputs = {}
    for port in ports:
        least, best, most = (
            tuple(size if isinstance(size, int) else point[size] for size in port.shape) for point in sizes
        )
        inputs[port.name] = (least, best, most)
    return ShapeProfile(name, inputs)
