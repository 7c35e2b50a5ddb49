"""What a hostile user gives the command line: a spoilt file or argument, and the command that meets it.

Everything follows from a random generator. `fuzz_mutations.py` spoils files, `fuzz.py` runs the cases.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from fuzz_mutations import (
    BYTES,
    JSON,
    LIBRARY,
    TENSORS,
    change_graph,
    rehash,
    rehash_engine,
    spoil_some_file,
    to_pickle,
)

# Text that stands in files outside of what a command is given, and may not turn up in what it writes.
SECRET = "s3cret-of-another-user"
_NUMBERS = ("-3", "0", "1", "99999999999999999999", "1e400", "nan", "2.5", "", "x", "\x1b[31m", "0x10")
_NAMES = (
    "",
    "~",
    "~nobody/x",
    "nowhere",
    "x" * 5000,
    "a/" * 3000,
    "../../..",
    "/dev/null",
    "/proc/self/mem",
    "/dev/zero",
    "\x1b[31mred",
    "[red]x[/]",
    os.fsdecode(b"\xff\xfe"),
    "-",
    "--",
    "a\nError: b",
    "fp32",
    "☃",
)


@dataclass(frozen=True)
class Case:
    """One run: what was spoilt, the arguments, and where its standard output leads.

    Attributes:
        out: what the command may write, relative to the case's folder; None: nothing.
        changes: files that a command may write besides.
        program: "cli", or the deployed Python program in a folder.
        stdout: "file", "closed", "full", "pipe" (nobody reads it) or "ascii".
    """

    label: str
    arguments: tuple[str, ...]
    out: str | None = None
    changes: tuple[str, ...] = ()
    program: str = "cli"
    stdout: str = "file"


def make_case(rng: random.Random, folder: Path, kinds: Collection[str] = ()) -> Case:
    """Spoil something in `folder`, a copy of the world, and say what to run on it.

    Args:
        kinds: names of `KINDS`; none means all.
    """
    chosen = [KINDS[kind] for kind in kinds or KINDS]
    make = rng.choices([make for _, make in chosen], [weight for weight, _ in chosen])[0]
    return make(rng, folder)


def _spoilt_adapter(rng: random.Random, folder: Path) -> Case:
    label = spoil_some_file(rng, folder / "adapter", TENSORS if rng.random() < 0.4 else ())
    if rng.random() < 0.7:
        return Case(f"adapter: {label}", ("inspect", "adapter"))
    return _export(f"adapter: {label}", "base")


def _spoilt_base(rng: random.Random, folder: Path) -> Case:
    base = rng.choice(("base", "encoder"))
    if base == "base" and rng.random() < 0.15:
        label = to_pickle(rng, folder / base)
    else:
        label = spoil_some_file(rng, folder / base, TENSORS if rng.random() < 0.4 else ())
    return _export(f"{base}: {label}", base)


def _export(label: str, base: str) -> Case:
    adapter = "adapter" if base == "base" else "encoder-adapter"
    return Case(label, ("onnx", base, "-a", adapter, "-o", "out"), "out")


def _spoilt_bundle(rng: random.Random, folder: Path) -> Case:
    bundle = rng.choice(("bundle", "bundle", "encoder-bundle"))
    label = spoil_some_file(rng, folder / bundle, (change_graph,) if rng.random() < 0.4 else ())
    if rng.random() < 0.6:
        label += rehash(folder / bundle)
    return Case(f"{bundle}: {label}", *_on_bundle(rng, bundle))


def _on_bundle(rng: random.Random, bundle: str) -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    adapter = ("adapter", "base") if bundle == "bundle" else ("encoder-adapter", "encoder")
    validate = ("validate", bundle, "--base", adapter[1], "--adapter", adapter[0])
    target = rng.choice(("python", "genai", "cpp", "triton"))
    choices = (
        (4, ("inspect", bundle), None, ()),
        (4, ("generate", bundle, "w1 w2", "--tokens", "2"), None, ()),
        (2, ("embed", bundle, "w1 w2"), None, ()),
        (4, ("deploy", target, bundle, "-o", "out"), "out", ()),
        (2, ("trt", "graph", bundle, "-o", "out", "--dtype", "fp16"), "out", ()),
        (1, validate, None, (f"{bundle}/manifest.json",)),
        (1, ("bench", bundle, "--length", "2", "--count", "1", "--turns", "1", "--no-memory"), None, ()),
        (1, ("onnx", adapter[1], "-a", adapter[0], "-o", bundle), bundle, ()),
        (1, ("trt", bundle, "--runtime", "tensorrt"), None, ()),
    )
    _, arguments, out, changes = rng.choices(choices, [weight for weight, *_ in choices])[0]
    return arguments, out, changes


def _spoilt_deployment(rng: random.Random, folder: Path) -> Case:
    label = spoil_some_file(rng, folder / "dist", (change_graph,) if rng.random() < 0.3 else ())
    if rng.random() < 0.6:
        label += rehash(folder / "dist")
    arguments = rng.choice((("w1 w2", "--tokens", "2"), ("--ids", "5", "6", "--tokens", "2"), ("w1", "w2 w3")))
    if rng.random() < 0.3:
        return Case(f"dist: {label}", ("deploy", "python", "bundle", "-o", "dist"), "dist")
    return Case(f"dist: {label}", arguments, program="dist")


def _spoilt_engine(rng: random.Random, folder: Path) -> Case:
    engines = folder / "bundle" / "engines"
    label = spoil_some_file(rng, engines)
    if rng.random() < 0.5:
        label += rehash_engine(engines / "small.engine")
    engine = "bundle/engines/small.engine"
    arguments, out = rng.choice(
        (
            (("inspect", engine), None),
            (("deploy", "cpp", "bundle", "--engine", "small", "-o", "out"), "out"),
            (("deploy", "triton", "bundle", "--engine", "small", "-o", "out"), "out"),
            (("trt", "refit", engine, "-a", "adapter"), None),
        )
    )
    return Case(f"engine: {label}", arguments, out)


def _spoilt_library(rng: random.Random, folder: Path) -> Case:
    library = folder / "plugin.so"
    library.write_bytes(rng.choice((b"", b"\x7fELF" + rng.randbytes(100), b"text", (folder / "real.so").read_bytes())))
    label = rng.choice(LIBRARY)(rng, library)
    arguments = rng.choice((("plugins", "info", "plugin.so"), ("generate", "bundle", "w1", "--library", "plugin.so")))
    return Case(f"library: {label}", arguments)


def _spoilt_cache(rng: random.Random, folder: Path) -> Case:
    entries = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    path = rng.choice(sorted(entries))
    label = (rng.choice(JSON) if path.suffix == ".json" else rng.choice(BYTES))(rng, path)
    return _export(f"cache: {path.name}: {label}", "base")


def _spoilt_arguments(rng: random.Random, folder: Path) -> Case:
    """A command with one or two of its arguments replaced, or one too many."""
    arguments = list(
        rng.choice(
            (
                ["onnx", "base", "-a", "adapter", "-o", "out", "--dtype", "fp32", "--task", "auto", "--op", "function"],
                ["validate", "bundle", "--engine", "none", "--plugin", "plugin.so", "--json", "out"],
                ["inspect", "bundle", "--json", "out"],
                ["bench", "bundle", "--length", "2", "--batch", "1", "--count", "1", "--turns", "1", "--no-memory"],
                ["generate", "bundle", "w1", "--tokens", "2"],
                ["embed", "encoder-bundle", "w1"],
                ["trt", "bundle", "--runtime", "tensorrt", "--shapes", "1x1,1x16,1x32", "--memory", "1"],
                ["trt", "bundle", "--runtime", "tensorrt", "--compute-capability", "8.9", "--optimization-level", "3"],
                ["trt", "graph", "bundle", "-o", "out", "--dtype", "bf16"],
                ["trt", "refit", "bundle/engines/small.engine", "-a", "adapter", "--bundle", "bundle"],
                ["plugins", "info", "plugin.so"],
                ["deploy", "python", "bundle", "-o", "out"],
                ["deploy", "cpp", "bundle", "-o", "out", "--engine", "small"],
                ["deploy", "genai", "bundle", "-o", "out", "--library", "lib.so"],
                ["deploy", "triton", "bundle", "-o", "out", "--name", "m", "--instances", "1", "--batch", "2"],
                ["deploy", "triton", "bundle", "-o", "out", "--sequences", "4", "--engine", "small"],
            )
        )
    )
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(1, len(arguments))
        value = rng.choice(_NUMBERS + _NAMES) if rng.random() < 0.8 else rng.choice(sorted(os.listdir(folder)))
        if rng.random() < 0.85:
            arguments[place] = value
        else:
            arguments.insert(place, value)
    out = arguments[arguments.index("-o") + 1] if "-o" in arguments[:-1] else None
    wrote = tuple(arguments[arguments.index("--json") + 1 :][:1]) if "--json" in arguments else ()
    return Case("arguments", tuple(arguments), out, wrote)


def _healthy_with_odd_output(rng: random.Random, _folder: Path) -> Case:
    arguments = rng.choice(
        (("inspect", "bundle"), ("inspect", "adapter", "--json", "-"), ("generate", "bundle", "w1 w2", "--tokens", "2"))
    )
    return Case("odd output", arguments, stdout=rng.choice(("closed", "full", "pipe", "ascii")))


# How often, and what.
KINDS: dict[str, tuple[int, Callable[[random.Random, Path], Case]]] = {
    "adapter": (5, _spoilt_adapter),
    "base": (4, _spoilt_base),
    "bundle": (5, _spoilt_bundle),
    "deployment": (3, _spoilt_deployment),
    "engine": (2, _spoilt_engine),
    "library": (1, _spoilt_library),
    "cache": (1, _spoilt_cache),
    "arguments": (6, _spoilt_arguments),
    "output": (1, _healthy_with_odd_output),
}


def copy_world(world: Path, folder: Path) -> None:
    shutil.copytree(world, folder, symlinks=True)
