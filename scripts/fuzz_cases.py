"""What a hostile user gives the command line: mutations of files, and arguments. Everything follows from a seed.

A case has a subject (which file or argument is spoilt, and how) and the command that meets it. `fuzz.py` runs them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file

from teamlora_export.files import sha256_of

# Text that stands in files outside of what a command is given, and may not turn up in what it writes.
SECRET = "s3cret-of-another-user"
# Written into JSON as they stand: json.dumps would not.
_RAW = {
    "@huge": "1" + "0" * 400,
    "@digits": "7" * 5000,
    "@infinity": "Infinity",
    "@nan": "NaN",
    "@deep": "[" * 20_000 + "]" * 20_000,
    "@nested": '{"a":' * 60 + "1" + "}" * 60,
    "@float": "1e308",
}
_VALUES: tuple[Any, ...] = (
    *_RAW,
    None,
    True,
    False,
    0,
    -1,
    1.5,
    3,
    10**9,
    10**12,
    2**63,
    "",
    "x",
    "4",
    "x" * 65_536,
    "\x1b[31mred\x1b[0m\x07",
    "[red]a[/red] [/]",
    "\ud800",
    "../../outside/secret.txt",
    "/etc/hostname",
    "((\\w+)+\\.?)+!",
    "(",
    [],
    {},
    [[1, 2], [3]],
    {"a": {"b": []}},
    ["q_proj", 5],
)
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
    label = _spoil_some_file(rng, folder / "adapter", _TENSORS if rng.random() < 0.4 else ())
    if rng.random() < 0.7:
        return Case(f"adapter: {label}", ("inspect", "adapter"))
    return _export(f"adapter: {label}", "base")


def _spoilt_base(rng: random.Random, folder: Path) -> Case:
    base = rng.choice(("base", "encoder"))
    if base == "base" and rng.random() < 0.15:
        label = _to_pickle(rng, folder / base)
    else:
        label = _spoil_some_file(rng, folder / base, _TENSORS if rng.random() < 0.4 else ())
    return _export(f"{base}: {label}", base)


def _export(label: str, base: str) -> Case:
    adapter = "adapter" if base == "base" else "encoder-adapter"
    return Case(label, ("onnx", base, "-a", adapter, "-o", "out"), "out")


def _spoilt_bundle(rng: random.Random, folder: Path) -> Case:
    bundle = rng.choice(("bundle", "bundle", "encoder-bundle"))
    label = _spoil_some_file(rng, folder / bundle, (_change_graph,) if rng.random() < 0.4 else ())
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
        (1, ("onnx", adapter[1], "-a", adapter[0], "-o", bundle), bundle, ()),
        (1, ("trt", bundle, "--runtime", "tensorrt"), None, ()),
    )
    _, arguments, out, changes = rng.choices(choices, [weight for weight, *_ in choices])[0]
    return arguments, out, changes


def _spoilt_deployment(rng: random.Random, folder: Path) -> Case:
    label = _spoil_some_file(rng, folder / "dist", (_change_graph,) if rng.random() < 0.3 else ())
    if rng.random() < 0.6:
        label += rehash(folder / "dist")
    arguments = rng.choice((("w1 w2", "--tokens", "2"), ("--ids", "5", "6", "--tokens", "2"), ("w1", "w2 w3")))
    if rng.random() < 0.3:
        return Case(f"dist: {label}", ("deploy", "python", "bundle", "-o", "dist"), "dist")
    return Case(f"dist: {label}", arguments, program="dist")


def _spoilt_engine(rng: random.Random, folder: Path) -> Case:
    engines = folder / "bundle" / "engines"
    label = _spoil_some_file(rng, engines)
    if rng.random() < 0.5:
        label += _rehash_engine(engines / "small.engine")
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
    label = rng.choice((_truncate, _flip, _keep, _to_other_kind))(rng, library)
    arguments = rng.choice((("plugins", "info", "plugin.so"), ("generate", "bundle", "w1", "--library", "plugin.so")))
    return Case(f"library: {label}", arguments)


def _spoilt_cache(rng: random.Random, folder: Path) -> Case:
    entries = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    path = rng.choice(sorted(entries))
    label = (rng.choice(_JSON) if path.suffix == ".json" else rng.choice(_BYTES))(rng, path)
    return _export(f"cache: {path.name}: {label}", "base")


def _spoilt_arguments(rng: random.Random, folder: Path) -> Case:
    """A command with one or two of its arguments replaced, or one too many."""
    arguments = list(
        rng.choice(
            (
                ["onnx", "base", "-a", "adapter", "-o", "out", "--dtype", "fp32", "--task", "auto", "--op", "function"],
                ["validate", "bundle", "--engine", "none", "--plugin", "plugin.so", "--json", "out"],
                ["inspect", "bundle", "--json", "out"],
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


# How a file is spoilt.


def _spoil_some_file(rng: random.Random, folder: Path, special: tuple[Callable, ...] = ()) -> str:
    """Spoil a file of `folder` in one of the ways that its kind has, or with one of `special`."""
    if special:
        return rng.choice(special)(rng, folder)
    path = rng.choice(
        sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".md"))
    )
    ways = _BYTES if path.suffix != ".json" or rng.random() < 0.2 else _JSON
    return f"{path.name}: {rng.choice(ways)(rng, path)}"


def _keep(_rng: random.Random, _path: Path) -> str:
    return "kept"


def _truncate(rng: random.Random, path: Path) -> str:
    size = rng.choice((0, 1, 8, 9, rng.randrange(path.stat().st_size + 1), path.stat().st_size - 1))
    os.truncate(path, max(size, 0))
    return f"cut to {size}"


def _flip(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.choice((1, 4, 64))):
        # Headers are where the structure is.
        data[rng.randrange(min(len(data), rng.choice((16, 400, len(data)))))] = rng.randrange(256)
    path.write_bytes(data)
    return "bytes changed"


def _append(rng: random.Random, path: Path) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(100))
    return "bytes appended"


def _not_text(_rng: random.Random, path: Path) -> str:
    path.write_bytes(b'{"a": "\xff\xfe"}')
    return "no UTF-8"


def _remove(_rng: random.Random, path: Path) -> str:
    path.unlink()
    return "removed"


def _to_other_kind(rng: random.Random, path: Path) -> str:
    """Something else of that name: a folder, a FIFO, a link, a sparse giant."""
    kind = rng.choice(("folder", "fifo", "link out", "dangling link", "loop", "device", "giant"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "giant":
        with path.open("wb") as file:
            file.truncate(3 << 30)
    else:
        root = Path(*path.parts[: path.parts.index("case") + 1])
        target = {
            "link out": root / "outside" / "secret.txt",
            "dangling link": "nothing",
            "loop": path.name,
            "device": "/dev/zero",
        }[kind]
        path.symlink_to(target)
    return kind


_BYTES = (_truncate, _flip, _flip, _append, _not_text, _remove, _to_other_kind)


def _change_json(rng: random.Random, path: Path) -> str:
    """A value somewhere in a JSON file is replaced, renamed, doubled or gone."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    place: Any = fields
    trail: list[Any] = []
    while isinstance(place, (dict, list)) and place and (not trail or rng.random() < 0.6):
        key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        trail.append(key)
        parent, place = place, place[key]
    if not trail:
        return "nothing to change"
    way = rng.random()
    if way < 0.15:
        del parent[key]
        value: Any = "(gone)"
    elif way < 0.2 and isinstance(parent, dict):
        value = rng.choice(("\x1b[31m", "", "x" * 3000, "../x", "a\nb"))
        parent[value] = parent.pop(key)
    else:
        value = rng.choice(_VALUES)
        parent[key] = value
    text = json.dumps(fields)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    path.write_text(text, encoding="utf-8")
    return f"{trail} is {value!r:.40}"


def _other_json(rng: random.Random, path: Path) -> str:
    text = rng.choice(("null", "[]", "3", '"text"', "{}", "{", '{"a": 1, "a": 2}', *_RAW.values()))
    path.write_text(text)
    return f"holds {text:.30}"


_JSON = (_change_json, _change_json, _change_json, _change_json, _other_json)


def _change_tensors(rng: random.Random, folder: Path) -> str:
    """One tensor of a safetensors file is gone, renamed, of another type or shape, or has a NaN."""
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    tensors = dict(load_file(path))
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    types = ("int8", "int64", "bool", "float64")
    way = rng.choice(("gone", "renamed", *types, "flat", "transposed", "empty", "nan", "inf"))
    if way == "renamed":
        tensors[rng.choice((name + "x", "\x1b[31m" + name, "x" * 3000, name.replace(".0.", ".9."), "a\nb"))] = value
    elif way in types:
        tensors[name] = value.astype(way)
    elif way == "flat":
        tensors[name] = value.reshape(-1)
    elif way == "transposed":
        tensors[name] = np.ascontiguousarray(value.T)
    elif way == "empty":
        tensors[name] = value[:0]
    elif way in ("nan", "inf"):
        value.reshape(-1)[rng.randrange(value.size)] = float(way)
        tensors[name] = value
    save_file(tensors, path)
    return f"{name}: {way}"


def _change_header(rng: random.Random, folder: Path) -> str:
    """The header of a safetensors file says something else than the file holds."""
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header[rng.choice(sorted(name for name in header if name != "__metadata__"))]
    field = rng.choice(("dtype", "shape", "data_offsets"))
    entry[field] = rng.choice(("F8_E4M3", "I4", [], [1 << 62, 4], [-1, 3], [0, 1 << 60], 5, None, [[1]], "F16"))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"header's {field} is {entry[field]}"


def _to_pickle(rng: random.Random, folder: Path) -> str:
    """The same tensors as a `.bin` file, with one that is no plain tensor, or with code in it."""
    import torch

    path = next(iter(sorted(folder.glob("*.safetensors"))))
    state: dict[Any, Any] = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    name = rng.choice(sorted(state))
    odd: dict[str, Callable[[], Any]] = {
        "sparse": lambda: state[name].to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([state[name], state[name][:1]]),
        "meta": lambda: state[name].to("meta"),
        "huge": lambda: torch.zeros(1).expand(1 << 40),
        "integers": lambda: state[name].to(torch.int8),
        "complex": lambda: state[name].to(torch.complex64),
        "quantised": lambda: torch.quantize_per_tensor(state[name], 0.1, 0, torch.qint8),
        "NaN": lambda: state[name] * float("nan"),
        "a list": lambda: [1, 2],
        "code": lambda: _Code(),
        "plain": lambda: state[name],
    }
    way = rng.choice(sorted(odd))
    state[name] = odd[way]()
    path.unlink()
    stem = "adapter_model" if path.name.startswith("adapter") else "pytorch_model"
    torch.save(state, folder / f"{stem}.bin", _use_new_zipfile_serialization=rng.random() < 0.8)
    if rng.random() < 0.2:
        rng.choice((_truncate, _flip))(rng, folder / f"{stem}.bin")
    return f"{name} in a .bin: {way}"


class _Code:
    """What would leave a trace if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("unpickled",))


_TENSORS = (_change_tensors, _change_tensors, _change_header, _to_pickle)


def _change_graph(rng: random.Random, folder: Path) -> str:
    """An ONNX file that is read without complaint, and is not what it was."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    node = rng.choice(graph.node)
    tensor = rng.choice(graph.initializer)
    ways: dict[str, Callable[[], object]] = {
        "a node is gone": lambda: graph.node.remove(node),
        "an unknown op": lambda: setattr(node, "op_type", "Frobnicate\x1b[31m"),
        "an input of nobody": lambda: node.input.append("nobody"),
        "a weight is gone": lambda: graph.initializer.remove(tensor),
        "no output": lambda: graph.output.pop(),
        "no inputs": lambda: graph.ClearField("input"),
        "another type": lambda: setattr(tensor, "data_type", 99),
        "another shape": lambda: tensor.dims.append(1 << 40),
        "another file": lambda: [setattr(e, "value", "../outside/secret.txt") for e in tensor.external_data[:1]],
        "no functions": lambda: model.ClearField("functions"),
        "an opset of tomorrow": lambda: setattr(model.opset_import[0], "version", 9999),
        "no graph": lambda: model.ClearField("graph"),
    }
    way = rng.choice(sorted(ways))
    ways[way]()
    path.write_bytes(model.SerializeToString())
    return f"graph: {way}"


def rehash(folder: Path) -> str:
    """Make the hashes of a bundle or a deployment those of its files, so that more than the hash must notice."""
    for name, entry in (("manifest.json", "sha256"), ("deploy.json", "files")):
        try:
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
            for file in fields[entry]:
                if (folder / file).is_file() and (folder / file).stat().st_size < 1 << 30:
                    fields[entry][file] = sha256_of(folder / file)
            (folder / name).write_text(json.dumps(fields), encoding="utf-8")
        except Exception:
            continue
    return ", rehashed"


def _rehash_engine(engine: Path) -> str:
    try:
        path = engine.with_suffix(".json")
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["sha256"] = sha256_of(engine)
        path.write_text(json.dumps(fields), encoding="utf-8")
    except Exception:
        return ""
    return ", rehashed"


def copy_world(world: Path, folder: Path) -> None:
    shutil.copytree(world, folder, symlinks=True)
