"""Ways to spoil a file: its bytes, its kind, values of its JSON, its tensors, its graph. Each says what it did."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import load_file, save_file

from teamlora_export.files import sha256_of

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


def spoil_some_file(rng: random.Random, folder: Path, special: tuple[Callable, ...] = ()) -> str:
    """Spoil a file of `folder` in one of the ways that its kind has, or with one of `special`."""
    if special:
        return rng.choice(special)(rng, folder)
    path = rng.choice(
        sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".md"))
    )
    ways = BYTES if path.suffix != ".json" or rng.random() < 0.2 else JSON
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


LIBRARY = (_truncate, _flip, _keep, _to_other_kind)
BYTES = (_truncate, _flip, _flip, _append, _not_text, _remove, _to_other_kind)


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


JSON = (_change_json, _change_json, _change_json, _change_json, _other_json)


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


def to_pickle(rng: random.Random, folder: Path) -> str:
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


TENSORS = (_change_tensors, _change_tensors, _change_header, to_pickle)


def change_graph(rng: random.Random, folder: Path) -> str:
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
            fields = _fields_of(folder / name)
            for file in fields[entry]:
                if (folder / file).is_file() and (folder / file).stat().st_size < 1 << 30:
                    fields[entry][file] = sha256_of(folder / file)
            (folder / name).write_text(json.dumps(fields), encoding="utf-8")
        except Exception:
            continue
    return ", rehashed"


def _fields_of(path: Path) -> dict[str, Any]:
    """What a description says; one that has become a device or a giant is not read."""
    if not path.is_file() or path.stat().st_size >= 1 << 30:
        raise OSError(path)
    return json.loads(path.read_text(encoding="utf-8"))


def rehash_engine(engine: Path) -> str:
    try:
        path = engine.with_suffix(".json")
        fields = _fields_of(path)
        fields["sha256"] = sha256_of(engine)
        path.write_text(json.dumps(fields), encoding="utf-8")
    except Exception:
        return ""
    return ", rehashed"
