"""Many adapters on one base: SmolLM2-135M with a shelf of random TeamLoRA adapters, cache in place, the native op.

    python scripts/bench/adapters.py                       all of it
    python scripts/bench/adapters.py --parts mixed swap --adapters 8 --rank 32 --json figures.json

mixed       a step of decoding of eight rows: with eight adapters, with one for all, with none, and with a bundle that
            has one adapter of its own; in turns, the ratio within a turn
sessions    one session with a shelf against one of a bundle with one adapter for each: memory, and tokens a second of
            eight texts; a process of its own for each
swap        eight clients, while another process replaces adapters all the time: requests that failed, and the longest
            time from the end of a step to the end of the next, in steps, without what reading prompts took (1 is none
            lost); beside a run without swaps, and one where that process works on a copy that nobody serves, which
            takes the same share of the machine
many        1, 8, 64 and 512 adapters on the shelf: bytes on disk, seconds to add one, memory with so many slots
zipf        1,000 tenants, the n-th of whom asks 1/n as often as the first: how many requests find their adapter in a
            slot, with the rule that the programs have (the one given back first makes room); simulated

Targets stand behind what was measured.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from method.command import run as run_command

from teamlora_export.adapter import AdapterConfig, write_adapter
from teamlora_export.bundle import Bundle, read_bundle
from teamlora_export.deploy.pages import finish_large_pages
from teamlora_export.deploy.scheduler import Scheduler
from teamlora_export.deploy.session import Session
from teamlora_export.deploy.slots import Slots, open_slots
from teamlora_export.engine.onnxruntime_library import build_library
from teamlora_export.export import export_onnx
from teamlora_export.manifest import write_manifest
from teamlora_export.model.base import open_base
from teamlora_export.model.initialize import new_adapter
from teamlora_export.shelf import add_adapter, replace_adapter

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))
from get_model import get_model  # noqa: E402

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ROWS, _PROMPT, _MB = 8, 64, 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--adapters", type=int, default=8, help="that share a batch")
    parser.add_argument("--rank", type=int, default=8, help="of all four experts together")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0: every core")
    parser.add_argument("--body", action="store_true", help="run the op's definition in place of the native op")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given)
        figures = {part: PARTS[part](bench) for part in given.parts}
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


class Bench:
    """What the parts share: adapters, a bundle with all of them on its shelf, and one with the first alone."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        if set(given.parts) == {"zipf"}:
            return
        self.library = None if given.body else build_library().path
        base = open_base(str(get_model("smollm2")))
        config = AdapterConfig(r=given.rank, lora_alpha=2.0 * given.rank, lora_nums=4, target_modules=_TARGETS)
        self.adapters = {}
        for seed in range(max(given.adapters, 2)):
            self.adapters[f"a{seed}"] = folder / f"a{seed}"
            write_adapter(new_adapter(base.signature, config, seed=seed, spread=0.02), folder / f"a{seed}")
        options = {"cache": "in-place"}
        slots = max(given.adapters, 8)
        self.shelf = export_onnx(base.name, self.adapters, folder / "shelf", slots=slots, **options)
        self.single = export_onnx(base.name, self.adapters["a0"], folder / "single", **options)

    def open(self, bundle: Bundle) -> Session:
        return _open(bundle.folder, self.library, self.given.threads)


def mixed(bench: Bench) -> dict[str, Any]:
    shelf, single = bench.open(bench.shelf), bench.open(bench.single)
    names = list(bench.adapters)
    rows: dict[str, Slots] = {
        "eight adapters": _filled(shelf, [names[row % len(names)] for row in range(_ROWS)]),
        "one adapter": _filled(shelf, [names[0]] * _ROWS),
        "no adapter": _filled(shelf, [None] * _ROWS),
        "a bundle of its own": _filled(single, [None] * _ROWS),
    }
    ids = [[7]] * _ROWS
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(bench.given.turns):
        for name, slots in rows.items():
            started = time.perf_counter()
            slots.read(0, ids)
            times[name].append(time.perf_counter() - started)
    found: dict[str, Any] = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    print(f"mixed: a step of {_ROWS} rows after {_PROMPT} tokens, milliseconds")
    for name, milliseconds in found.items():
        print(f"  {name:22} {milliseconds:8.2f}")
    for name in list(rows)[:-1]:
        for other in list(rows)[1:]:
            if name == other or list(rows).index(other) < list(rows).index(name):
                continue
            ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found[f"{name} / {other}"] = [middle, low, high]
            print(f"  {name} / {other}: {middle:.3f} ({low:.3f} - {high:.3f})")
    print("  target: eight adapters / one adapter at most 1.15")
    return found


def _open(folder: Path, library: Path | None, threads: int) -> Session:
    session = Session(folder, library, check=False, threads=threads)
    finish_large_pages()
    return session


def _filled(session: Session, adapters: Sequence[str | None]) -> Slots:
    slots = open_slots(session, len(adapters), _PROMPT)
    for row, name in enumerate(adapters):
        assert slots.equip(row, slots.find_adapter(name))
    rng = np.random.default_rng(0)
    slots.read(0, rng.integers(3, 40_000, (len(adapters), _PROMPT)).tolist())
    return slots


def sessions(bench: Bench) -> dict[str, Any]:
    """Eight bundles with one adapter each are eight copies of the base."""
    shelf = _in_a_process(_serve, [bench.shelf.folder], list(bench.adapters)[:_ROWS], bench)
    count = min(_ROWS, len(bench.adapters))
    apart = _in_a_process(_serve, [bench.single.folder] * count, [None] * count, bench)
    print(f"sessions: {count} texts, {count} adapters")
    for name, (memory, speed) in (("one session, a shelf", shelf), (f"{count} sessions", apart)):
        print(f"  {name:22} {memory / _MB:8,.0f} MB {speed:8.1f} tokens a second")
    return {"one session": shelf, f"{count} sessions": apart}


def _serve(folders: list[Path], adapters: list[str | None], library: Path | None, threads: int) -> tuple[int, float]:
    """Memory over the interpreter's, and tokens a second of a text for each of `adapters`."""
    before = _resident()
    opened = [_open(folder, library, threads) for folder in folders]
    if len(opened) == 1:
        groups = [_filled(opened[0], adapters)]
    else:
        groups = [_filled(session, [name]) for session, name in zip(opened, adapters, strict=True)]
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < 5:
        for slots in groups:
            slots.read(0, [[7]] * slots.slots)
            tokens += slots.slots
    return _resident() - before, tokens / (time.perf_counter() - started)


def swap(bench: Bench) -> dict[str, Any]:
    folders = [Path(shutil.copytree(bench.shelf.folder, bench.folder / name)) for name in ("swapped", "elsewhere")]
    session = bench.open(read_bundle(folders[0]))
    runs = {"no swaps": None, "edits elsewhere": folders[1], "swaps": folders[0]}
    found = {label: _under_load(bench, session, edited) for label, edited in runs.items()}
    for label, run in found.items():
        print(
            f"swap: {label}: {run['edits']} edits, {run['tokens']} tokens, {run['failures']} failures; a step is "
            f"{run['step'] * 1e3:.1f} ms; from one to the next 99 % at most {run['next 99 %']:.1f} steps, the longest "
            f"{run['next']:.1f}; between two tokens of a text, prompts included, {run['gap']:.1f}"
        )
    print("  target: no failure; the longest at most two steps more than without swaps")
    return found


def _under_load(bench: Bench, session: Session, edited: Path | None) -> dict[str, Any]:
    """Eight clients for a while, and edits of a shelf."""
    names, slots = list(bench.adapters), open_slots(session, _ROWS, _PROMPT)
    # Of each call of the model, when it began and ended, and whether it was a step.
    calls: list[tuple[float, float, bool]] = []
    read = slots.read

    def timed(row: int, ids: Sequence[Sequence[int]]) -> np.ndarray:
        started = time.perf_counter()
        logits = read(row, ids)
        calls.append((started, time.perf_counter(), len(ids[0]) == 1))
        return logits

    slots.read = timed  # type: ignore[method-assign]
    gaps: list[float] = []
    failures: list[str] = []
    stop = threading.Event()

    def ask(client: int, scheduler: Scheduler) -> None:
        rng = np.random.default_rng(client)
        for turn in itertools.count():
            if stop.is_set():
                return
            try:
                prompt, last = rng.integers(3, 40_000, 16).tolist(), None
                for _ in scheduler.submit(prompt, 24, stops=(), adapter=names[(client + turn) % len(names)]):
                    now = time.perf_counter()
                    if last is not None:
                        gaps.append(now - last)
                    last = now
            except Exception as error:
                failures.append(str(error))

    edits, ends = 0, time.perf_counter() + 20
    with Scheduler(slots, waiting=4 * _ROWS) as scheduler, multiprocessing.get_context("spawn").Pool(1) as editor:
        editor.apply(_edit, (None, "", Path()))
        clients = [threading.Thread(target=ask, args=(client, scheduler)) for client in range(_ROWS)]
        for client in clients:
            client.start()
        while time.perf_counter() < ends:
            time.sleep(0.5)
            if edited is not None:
                name, other = (names[(edits + place) % len(names)] for place in (0, 1))
                editor.apply(_edit, (edited, name, bench.adapters[other]))
                edits += 1
        stop.set()
        for client in clients:
            client.join()
    step = statistics.median(end - start for start, end, is_step in calls if is_step)
    times = sorted(seconds / step for seconds in _between_steps(calls))
    return {
        "edits": edits,
        "failures": len(failures),
        "tokens": len(gaps),
        "step": step,
        "next": times[-1],
        "next 99 %": times[len(times) * 99 // 100],
        "gap": max(gaps) / step,
    }


def _edit(folder: Path | None, name: str, source: Path) -> None:
    if folder is not None:
        replace_adapter(folder, name, source)


def _between_steps(calls: Sequence[tuple[float, float, bool]]) -> Iterator[float]:
    """Seconds from the end of each step to the end of the next, but for those in which prompts were read."""
    last, reading = None, 0.0
    for start, end, is_step in calls:
        if not is_step:
            reading += end - start
            continue
        if last is not None:
            yield end - last - reading
        last, reading = end, 0.0


def many(bench: Bench) -> dict[str, Any]:
    found = {}
    for count in (1, 8, 64, 512):
        folder = Path(shutil.copytree(bench.shelf.folder, bench.folder / f"many{count}"))
        bundle = read_bundle(folder)
        _keep_first(bundle, count)
        started = time.perf_counter()
        add_adapter(folder, "last", bench.adapters["a1"])
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in (folder / "adapters").iterdir())
        memory, adapter = _in_a_process(_hold, folder, count, bench)
        base = (folder / "model.onnx.data").stat().st_size
        found[count] = {"disk": size, "add": seconds, "memory": memory, "adapter": adapter, "base": base}
        most = 1.1 * (base + count * adapter)
        print(
            f"many: {count:4} adapters: {size / _MB:8,.1f} MB beside a base of {base / _MB:,.0f}, one more added in "
            f"{seconds:.2f} s; all in memory: {memory / _MB:,.0f} MB, target {most / _MB:,.0f}"
        )
        shutil.rmtree(folder)
    print("  targets: an adapter added in less than 2 s; memory of base + adapters + 10 %")
    return found


def _keep_first(bundle: Bundle, count: int) -> None:
    """A shelf of `count` adapters, in as many slots; those beyond what there are, are copies of others' files."""
    import dataclasses
    import hashlib

    from teamlora_export.shelf import require_shelf

    shelf = require_shelf(bundle)
    first = next(iter(shelf["adapters"].values()))
    content = bytearray((bundle.folder / first["file"]).read_bytes())
    adapters, hashes = {}, {n: h for n, h in bundle.manifest.sha256.items() if not n.startswith("adapters/")}
    for path in (bundle.folder / "adapters").iterdir():
        path.unlink()
    for index in range(count):
        # Another number in each, so that no two are one.
        content[-4:] = np.float32(index).tobytes()
        digest = hashlib.sha256(content).hexdigest()
        file = f"adapters/n{index}.{digest[:16]}.safetensors"
        (bundle.folder / file).write_bytes(content)
        adapters[f"n{index}"], hashes[file] = {**first, "file": file, "sha256": digest}, digest
    changed = dataclasses.replace(bundle.manifest, sha256=hashes, shelf={"slots": count, "adapters": adapters})
    write_manifest(bundle.folder, changed)


def _hold(folder: Path, count: int, library: Path | None, threads: int) -> tuple[int, int]:
    """Memory over the interpreter's with `count` adapters in slots, and of one of them."""
    before = _resident()
    session = _open(folder, library, threads)
    adapters = session.adapters
    assert adapters is not None
    for index in range(count):
        assert adapters.take(adapters.find(f"n{index}")) is not None
    slots = open_slots(session, 1, 8)
    slots.read(0, [[7] * 8])
    slots.read(0, [[7]])
    return _resident() - before, sum(array[0].nbytes for array in adapters.memory.values())


def zipf(bench: Bench) -> dict[str, Any]:
    rng, tenants, requests, at_work = np.random.default_rng(0), 1000, 100_000, 32
    shares = 1 / np.arange(1, tenants + 1)
    asked = rng.choice(tenants, requests, p=shares / shares.sum()).tolist()
    found = {}
    print(f"zipf: {tenants} tenants, {at_work} texts at a time: share of requests whose adapter is in a slot")
    for slots in (32, 64, 128, 256, 512):
        # Of each adapter in a slot, how many texts it has; those without one in the order in which they became free.
        users: collections.OrderedDict[int, int] = collections.OrderedDict()
        texts: collections.deque[int] = collections.deque()
        hits = 0
        for tenant in asked:
            if len(texts) == at_work:
                users[texts[0]] -= 1
                users.move_to_end(texts.popleft())
            if tenant in users:
                hits += 1
            elif len(users) == slots:
                del users[next(other for other, count in users.items() if count == 0)]
            users[tenant] = users.get(tenant, 0) + 1
            texts.append(tenant)
        found[slots] = hits / requests
        print(f"  {slots:4} slots: {hits / requests:.3f}")
    return found


def _in_a_process(work: Callable[..., Any], *given: Any) -> Any:
    """What `work` gives in a fresh process; the last of `given` is the bench."""
    *arguments, bench = given
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (*arguments, bench.library, bench.given.threads))


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


PARTS = {"mixed": mixed, "sessions": sessions, "swap": swap, "many": many, "zipf": zipf}


if __name__ == "__main__":
    run_command(main)
