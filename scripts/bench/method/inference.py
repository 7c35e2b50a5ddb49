"""Time of each family's layers at inference over the base's: as published in PyTorch, traced as they are, exported.

Every way has a base of its own kind beside it, in the same turns: PyTorch without an adapter, the base traced in the
same way, the exported graph with its experts bypassed. One opening of a model is faster than another, by more than the
turns of one opening differ, even where all have their weights in pages of 2 MB: they are opened several times, each
time in a process that nothing has run in.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import traced

from method.apart import run_apart
from method.cells import Place, data_folder
from method.paper import PUBLISHED
from method.plan import Cell, options_of
from teamlora_export.adapter import AdapterSpec, write_adapter
from teamlora_export.bench.graphs import written_graphs
from teamlora_export.bench.measure import make_prompts, open_all
from teamlora_export.bench.rows import GraphRow, Row, generate_in_torch
from teamlora_export.bench.turns import DECODE, PREFILL, Figure, Reader, Workload, judge, take_turns
from teamlora_export.cache import cache_folder
from teamlora_export.engine.onnxruntime_library import find_library
from teamlora_export.errors import ExportError
from teamlora_export.export import export_onnx
from teamlora_export.manifest import MANIFEST_NAME
from teamlora_export.model.base import BaseModel, open_base
from teamlora_export.progress import Reporter
from teamlora_export.staging import scratch_folder
from teamlora_export.train import TrainOptions
from teamlora_export.train.model import adapt, start_adapter

TORCH, TRACED, BODY, NATIVE = PUBLISHED, "published, traced as it is", "our export", "our export, native op"
_BASES = {TORCH: "base, PyTorch", TRACED: "base, traced as it is", BODY: "base, exported", NATIVE: "base, exported"}
_SPREAD = 0.02
LAYERS: Mapping[str, traced.Layer] = {
    "teamlora": traced.TeamLora,
    "hydralora": traced.HydraLora,
    "moelora": traced.MoeLora,
    "lora": traced.PlainLora,
}


@dataclass(frozen=True)
class Asked:
    """How inference is timed.

    Attributes:
        length, count: of a prompt's tokens, and of those after it.
        openings: of all models, in processes of their own: 1, or an even number, of which each counts once, by the
            median of its turns.
        turns: of each opening.
        trace: trace what was not traced before; each takes minutes. Otherwise it is left out.
    """

    length: int = 64
    count: int = 24
    openings: int = 1
    turns: int = 5
    trace: bool = False


def time_inference(place: Place, cell: Cell, asked: Asked, threads: int, reporter: Reporter) -> list[dict[str, Any]]:
    """Rows of one cell's family; its numbers are random, and of no account for speed.

    Raises:
        ExportError: the models cannot be exported, opened or run.
    """
    base = open_base(str(place.base), "text-generation")
    workload = Workload(1, asked.length, asked.count)
    options = options_of(cell, place.settings, place.base, data_folder(place), Path("unused"))
    adapter = with_random_ups(start_adapter(base.signature, options))
    with scratch_folder(place.folder / "inference") as folder, ExitStack() as stack:
        write_adapter(adapter, folder / "adapter")
        bundle = export_onnx(base.name, folder / "adapter", folder / "bundle", cache="in-place", reporter=reporter)
        graphs = stack.enter_context(written_graphs(bundle))
        ways: list[Row] = [
            GraphRow(_BASES[BODY], graphs.bypassed, None, threads),
            GraphRow(BODY, graphs.adapted, None, threads),
        ]
        try:
            library = find_library(None, reporter).path
        except ExportError as error:
            reporter.warn(f"Native op: left out. {error}")
        else:
            ways.append(GraphRow(NATIVE, graphs.adapted, library, threads))
        ways += _traced(base, adapter, cell, graphs.adapted / MANIFEST_NAME, asked.trace, threads)
        ways += [
            _PublishedRow(_BASES[TORCH], base.name, None, options, threads),
            _PublishedRow(TORCH, base.name, adapter, options, threads),
        ]
        prompts = make_prompts(workload, base.config.vocab_size)
        found = [run_apart(_take_turns, ways, workload, prompts, asked.turns, seed) for seed in range(asked.openings)]
    figures = _of_all(found)
    return [row | {"openings": asked.openings} for way in _BASES for row in _rows(way, figures, cell, threads)]


def _take_turns(
    ways: Sequence[Row], workload: Workload, prompts: Sequence[Sequence[int]], turns: int, seed: int
) -> list[Figure]:
    """Each order of opening is followed by its reverse: what is opened later finds memory less scattered."""
    order = np.random.default_rng(seed // 2).permutation(len(ways))
    readers = open_all([ways[i] for i in (order[::-1] if seed % 2 else order)])
    return take_turns(readers, _BASES[BODY], workload, prompts, turns, seed=seed)


def _of_all(openings: Sequence[Sequence[Figure]]) -> list[Figure]:
    """Each opening's median, as the turns of one are alike; of one opening alone its turns."""
    if len(openings) == 1:
        return list(openings[0])
    times: dict[str, dict[str, list[float]]] = {PREFILL: {}, DECODE: {}}
    for figures in openings:
        for figure in figures:
            times[figure.quantity].setdefault(figure.row, []).append(figure.median)
    workload = openings[0][0].workload
    return [
        figure for quantity, of_rows in times.items() for figure in judge(of_rows, _BASES[BODY], quantity, workload)
    ]


def _rows(way: str, figures: Sequence[Figure], cell: Cell, threads: int) -> list[dict[str, Any]]:
    """Of prefill and decode, where the way was timed."""
    rows = []
    for figure in figures:
        if figure.row != way:
            continue
        own = next(f for f in figures if f.row == _BASES[way] and f.quantity == figure.quantity)
        ratios = np.array(figure.seconds) / np.array(own.seconds)
        low, median, high = np.percentile(ratios, (25, 50, 75)).tolist()
        rows.append(
            {
                "row": way,
                "family": cell.family,
                "experts": cell.experts,
                "targets": cell.targets,
                "quantity": figure.quantity,
                "workload": dataclasses.asdict(figure.workload),
                "threads": threads,
                "seconds": list(figure.seconds),
                "ratios": ratios.tolist(),
                "over_base": {"median": median, "low": low, "high": high},
            }
        )
    return rows


@dataclass(frozen=True)
class _PublishedRow:
    """The published layer in PyTorch, a product for each expert; without an adapter the base."""

    name: str
    base: str
    adapter: AdapterSpec | None
    options: TrainOptions
    threads: int
    libraries: tuple[str, ...] = ("torch", "teamlora_export.model.base", "teamlora_export.train.model")

    def open(self) -> Reader:
        import torch

        torch.set_num_threads(self.threads)
        model = open_base(self.base, "text-generation").load(torch.float32)
        if self.adapter is not None:
            adapt(model, self.adapter, dataclasses.replace(self.options, implementation="published"))
        model.eval()

        def read(prompts: Sequence[Sequence[int]], _count: int) -> Callable[[], object]:
            return generate_in_torch(model, prompts)

        return read


def _traced(base: BaseModel, adapter: AdapterSpec, cell: Cell, manifest: Path, trace: bool, threads: int) -> list[Row]:
    """The base and the published layers, traced whole; none where they have to be traced and shall not."""
    name = f"traced-{base.folder.name}"
    kept = {
        _BASES[TRACED]: (f"{name}-base", {}, None),
        TRACED: (f"{name}-{cell.group}-r{adapter.config.r}", adapter.projections, LAYERS[cell.family]),
    }
    if not trace and not all((cache_folder() / "bench" / folder).is_dir() for folder, _, _ in kept.values()):
        return []
    ways: list[Row] = []
    for row, (folder_name, projections, layer) in kept.items():
        folder = traced.traced_graph(folder_name, base, projections, layer)
        # What the runner knows of the model's tokens.
        shutil.copyfile(manifest, folder / MANIFEST_NAME)
        ways.append(GraphRow(row, folder, None, threads))
    return ways


def with_random_ups(adapter: AdapterSpec) -> AdapterSpec:
    """`adapter` with matrices B that are not zero."""
    rng = np.random.default_rng(0)
    return dataclasses.replace(
        adapter,
        projections={
            path: dataclasses.replace(
                projection,
                ups=tuple(rng.normal(0.0, _SPREAD, up.shape).astype(np.float32) for up in projection.ups),
            )
            for path, projection in adapter.projections.items()
        },
    )
